"""Pairs from prompts: what is made, that a killed generation ends in the same bytes, and what is refused."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.image.pairs import GenerationSettings, generate_pairs, read_samples

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import polyalign, recipe, write_recipe  # noqa: E402

SETTINGS = GenerationSettings(samples_per_prompt=4, prompts_per_shard=3, batch_size=5, sampler={"steps": 7})
CONDITIONS = [{"prompt": f"square {number}", "task": "colour", "wanted": number % 3} for number in range(8)]
MODEL = Model(network=torch.nn.Identity(), parts={}, identity="squares@sha256:beef")


class Squares:
    """A sampler: one square in one of eight greys, by the seed. Depends on the batch's size, as real kernels do."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = 0, fail_at

    def sample(self, model, conditions, seeds):
        self.calls += 1
        if self.calls == self.fail_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Image.new("RGB", (4, 4), (seed % 8 * 30, len(seeds), 0)) for seed in seeds]


class Brightness:
    """A judge: the brighter the better, in four levels, so that there are ties; nothing for the third kind of prompt."""

    name, version = "brightness", "2"

    def score(self, conditions, outputs):
        return [
            0.0 if condition["wanted"] == 2 else output.getpixel((0, 0))[0] // 60 / 4
            for condition, output in zip(conditions, outputs, strict=True)
        ]


def generate(
    folder, *, conditions=CONDITIONS, adapter=None, judge=None, settings=SETTINGS, seed=3, progress=lambda done, total: None
):
    return generate_pairs(
        adapter or Squares(),
        MODEL,
        conditions,
        judge or Brightness(),
        settings=settings,
        folder=folder,
        seed=seed,
        progress=progress,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_best_against_worst_with_all_provenance(tmp_path):
    seen = []
    summary = generate(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(12, 32), (24, 32), (32, 32)]
    store = PairStore(tmp_path)
    assert store.validate() == summary["pairs"] == len(store)
    assert store.missing(3) == []
    for row in store.rows(range(len(store))):
        prompt, best, worst = (int(part) for part in row["pair_id"].split("-"))
        assert row["condition"] == CONDITIONS[prompt]
        provenance = row["provenance"]
        assert provenance["chosen_seed"] == seed_of(3, "sample", prompt, best)
        assert provenance["rejected_seed"] == seed_of(3, "sample", prompt, worst)
        assert (provenance["model"], provenance["model_hash"]) == ("squares", "sha256:beef")
        assert provenance["sampler"] == {"steps": 7} and provenance["judges"] == {"brightness": {"version": "2"}}
        chosen, rejected = row["chosen_scores"]["brightness"], row["rejected_scores"]["brightness"]
        greys = [seed_of(3, "sample", prompt, number) % 8 * 30 for number in range(4)]
        assert chosen == max(greys) // 60 / 4 > rejected == min(greys) // 60 / 4
        assert row["chosen"].getpixel((0, 0))[0] == greys[best]


def test_summary_counts_everything(tmp_path):
    summary = generate(tmp_path, settings=replace(SETTINGS, mode="all_pairs", margin=0.3))
    assert (summary["prompts"], summary["samples"]) == (8, 32)
    comparisons = 0
    for prompt in range(8):
        distinct = len({seed_of(3, "sample", prompt, number) % 8 for number in range(4)})
        comparisons += distinct * (distinct - 1) // 2
    duplicates = sum(4 - len({seed_of(3, "sample", prompt, number) % 8 for number in range(4)}) for prompt in range(8))
    assert summary["pairs"] + summary["ties_dropped"] + summary["below_margin"] == comparisons
    assert summary["duplicates_dropped"] > 0 and summary["ties_dropped"] > 0 and summary["below_margin"] > 0
    # batches of 5 give some equal greys another second channel, so not every equal grey is an identical picture
    assert summary["duplicates_dropped"] <= duplicates
    assert summary["no_pair_prompts"] >= 2  # prompts 2 and 5, whose samples all score alike
    assert sum(summary["score_histogram"]["counts"]) == 32
    assert summary["judge"] == {"name": "brightness", "version": "2"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    example = summary["examples"][0]
    assert example["chosen_score"] - example["rejected_score"] > 0.3
    assert len(read_samples(PairStore(tmp_path))) == 32


def test_limit_on_pairs_of_a_prompt(tmp_path):
    summary = generate(tmp_path, settings=replace(SETTINGS, mode="all_pairs", max_pairs_per_prompt=1))
    assert summary["over_limit"] > 0
    prompts = [row["condition"]["prompt"] for row in PairStore(tmp_path).rows(range(summary["pairs"]))]
    assert len(prompts) == len(set(prompts))


def test_generation_again_makes_nothing_and_changes_nothing(tmp_path):
    generate(tmp_path)
    before, idle = contents(tmp_path), Squares()
    generate(tmp_path, adapter=idle)
    assert contents(tmp_path) == before and idle.calls == 0


@pytest.mark.parametrize("call", [2, 4, 5, 7])
def test_killed_and_resumed_is_uninterrupted_byte_for_byte(tmp_path, call):
    """``kill -9`` in the middle of the first, second and third shard (batches: 3, 3, 2)."""
    generate(tmp_path / "whole")
    script = textwrap.dedent(f"""
        import importlib.util, sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("made", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.generate(Path(sys.argv[1]), adapter=module.Squares(fail_at={call}))
    """)
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=os.environ | {"PYTHONPATH": _import_path()})
    assert done.returncode == -signal.SIGKILL
    finished = (call - 1) // 3
    assert [path.name for path in PairStore(folder).shards()] == [f"pairs-{index:05d}.parquet" for index in range(finished)]
    assert not (folder / "summary.json").exists()
    (folder / ".pairs-00001.parquet.77.tmp").write_bytes(b"half a shard")
    resumed = Squares()
    generate(folder, adapter=resumed)
    assert resumed.calls == 8 - 3 * finished
    assert contents(folder) == contents(tmp_path / "whole")


def _import_path():
    import polyalign

    return os.pathsep.join([str(Path(polyalign.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def test_a_shard_with_samples_but_no_pairs_is_made_again(tmp_path):
    generate(tmp_path / "whole")
    generate(tmp_path / "cut")
    (tmp_path / "cut" / "pairs-00001.parquet").unlink()
    (tmp_path / "cut" / "samples-00002.parquet").unlink()
    generate(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"settings": replace(SETTINGS, margin=0.5)}, "settings was"),
        ({"conditions": CONDITIONS[:-1]}, "prompts was"),
    ],
)
def test_pairs_made_in_another_way_are_not_continued(tmp_path, change, said):
    generate(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        generate(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_score_that_is_no_number_names_judge_prompt_and_seed(tmp_path):
    class Broken(Brightness):
        def score(self, conditions, outputs):
            return [float("nan") if condition["prompt"] == "square 4" else 1.0 for condition in conditions]

    with pytest.raises(UserError, match=f"'brightness'.*nan.*'square 4'.*{seed_of(3, 'sample', 4, 0)}"):
        generate(tmp_path, judge=Broken())
    assert [path.name for path in PairStore(tmp_path).shards()] == ["pairs-00000.parquet"]


def test_no_pair_at_all_says_why(tmp_path):
    undecided = [{"prompt": "p", "wanted": 2}, {"prompt": "q", "wanted": 2}]
    with pytest.raises(UserError, match="none of 8 samples of 2 prompts: 2 ties"):
        generate(tmp_path, conditions=undecided)
    with pytest.raises(UserError, match="no prompts"):
        generate(tmp_path / "none", conditions=[])


def test_with_a_real_tiny_model(tmp_path, tiny_models):
    from polyalign.modalities.image.adapter import ImageAdapter
    from polyalign.modalities.image.settings import ImageModelSettings

    class Redness:
        name, version = "redness", "1"

        def score(self, conditions, outputs):
            return [float(sum(output.convert("RGB").getchannel(0).tobytes())) for output in outputs]

    adapter = ImageAdapter(ImageModelSettings(base=str(tiny_models["sdxl"]), sampling_steps=2, guidance=1.0, device="cpu"))
    model = adapter.load()
    conditions = [{"prompt": "a red circle"}, {"prompt": "two green dots"}]
    settings = GenerationSettings(samples_per_prompt=2, prompts_per_shard=1)
    for name in ("first", "second"):
        made = generate_pairs(
            adapter,
            model,
            conditions,
            Redness(),
            settings=settings,
            folder=tmp_path / name,
            seed=0,
            progress=lambda done, all: None,
        )
        assert made["pairs"] == 2
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    row = PairStore(tmp_path / "first").rows([0])[0]
    assert row["provenance"]["model_hash"].startswith("sha256:")
    again = adapter.sample(model, [row["condition"]], [row["provenance"]["chosen_seed"]])[0]
    assert again.tobytes() == row["chosen"].tobytes()


# --- pairs that a recipe reads ------------------------------------------------------------------------------------------------


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def votes(tmp_path):
    """Pick-a-Pic with a person who likes grey better than red three times of four, a tie and a bad label."""
    rows = [
        {"jpg_0": png((255, n, n)), "jpg_1": png((n, n, n)), "label_0": float(n == 3), "caption": f"square {n}"}
        for n in range(4)
    ]
    rows += [{**rows[0], "label_0": 0.5}, {**rows[1], "label_0": 3.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "votes.parquet")
    return tmp_path / "votes.parquet"


def generated(base, tmp_path, name, pairs):
    config = write_recipe(tmp_path / name, recipe(base, pairs=pairs))
    return polyalign("generate", config, tmp_path / name / "run"), tmp_path / name / "run" / "pairs"


def test_pairs_that_are_read_and_judged_anew(base, votes, tmp_path, capsys):
    code, pairs = generated(base, tmp_path, "first", {"source": "pickapic", "path": str(votes)})
    assert code == 2 and "votes.parquet row 5: label_0 must be 0, 0.5 or 1, found 3.0" in capsys.readouterr().err
    assert PairStore(pairs).shards() == []
    code, pairs = generated(base, tmp_path, "first", {"source": "pickapic", "path": str(votes), "on_bad_row": "drop"})
    summary = json.loads((pairs / "summary.json").read_text())
    assert code == 0 and (summary["pairs"], summary["ties_dropped"], summary["rows_dropped"]) == (4, 1, 1)
    feedback = {"source": "relabel", "store": str(pairs), "judges": [{"name": "saturation"}]}
    code, anew = generated(base, tmp_path, "second", feedback)
    summary = json.loads((anew / "summary.json").read_text())
    assert code == 0 and summary["disagreement"] == 0.75 and summary["judge"]["name"] == "saturation"
    for row in PairStore(anew).rows(range(4)):
        assert row["chosen"].getpixel((0, 0))[0] == 255
        assert row["chosen_scores"]["saturation"] > row["rejected_scores"]["saturation"]
    capsys.readouterr()
    assert generated(base, tmp_path, "second", feedback)[0] == 0
    assert "generate: done already" in capsys.readouterr().err


def test_pictures_against_the_bases_own_samples(base, tmp_path):
    (tmp_path / "real").mkdir()
    for number in range(3):
        (tmp_path / "real" / f"{number}.png").write_bytes(png((255, number, 0)))
        (tmp_path / "real" / f"{number}.txt").write_text("a red square")
    code, pairs = generated(base, tmp_path, "own", {"source": "own_samples", "folder": str(tmp_path / "real")})
    rows = PairStore(pairs).rows(range(3))
    assert code == 0 and [row["chosen"].getpixel((0, 0)) for row in rows] == [(255, number, 0) for number in range(3)]
    assert len({row["rejected"].tobytes() for row in rows}) == 3 and rows[0]["rejected"].size == (32, 32)
    assert rows[0]["provenance"]["model_hash"].startswith("sha256:") and rows[0]["provenance"]["sampler"]["steps"] == 2
    before = PairStore(pairs).content_hash()
    PairStore(pairs).shard_path(0).unlink()
    assert generated(base, tmp_path, "own", {"source": "own_samples", "folder": str(tmp_path / "real")})[0] == 0
    assert PairStore(pairs).content_hash() == before


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ({"source": "own_samples"}, "source 'own_samples' needs 'folder', the one that holds pictures and their captions"),
        ({"source": "pickapik", "path": "x"}, "pairs.source: must be one of generate, folders, .*did you mean pickapic"),
        ({"source": "jsonl"}, "source 'jsonl' needs 'path', a file of lines with prompt, chosen and rejected"),
        ({"source": "relabel", "store": "x"}, "source 'relabel' needs at least one of 'judges'"),
        ({"source": "relabel", "store": "x", "judges": [{"name": "nobody"}]}, "no judge 'nobody'"),
        ({"source": "rows", "path": "x", "options": {"splt": "train"}}, "options: split, prompt, chosen, rejected"),
        ({"source": "rows", "path": "x", "options": {"split": 3}}, "options.split: .*string"),
        ({"source": "rows", "path": "x", "on_bad_row": "skip"}, "pairs.on_bad_row: must be one of error, drop|on_bad_row"),
        ({"source": "rows", "path": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_recipes_that_cannot_be_read_from(base, tmp_path, capsys, pairs, said):
    code, folder = generated(base, tmp_path, "run", pairs)
    assert code == 2 and not folder.exists()
    assert re.search(said, capsys.readouterr().err)
