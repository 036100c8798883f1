"""The verbs on a Stable Diffusion XL in small: from a recipe to pairs, an adapter, an evaluation and a report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polyalign.core.checkpoint import latest
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.image import stages
from polyalign.modalities.image.training import reference_identity

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import LORA, digest, lines, only_generated, polyalign, recipe, save_base, write_recipe  # noqa: E402

SIDES = ("chosen", "rejected")
BLOCK = {"wins", "losses", "ties", "rate", "wilson", "rate_with_ties", "bootstrap", "sign_test_p", "prompts"}


@pytest.fixture(scope="module")
def aligned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with an SFT arm, and the folder of its run."""
    root = tmp_path_factory.mktemp("aligned")
    config = write_recipe(root, recipe(base, arms={"sft": {"name": "sft"}}))
    assert polyalign("align", config, root / "run") == 0
    return config, root / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_report_says_its_verdict_and_where_it_lies(aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = aligned
    assert polyalign("report", config, run) == 0
    said = capsys.readouterr().out
    verdict = read(run / "report.json")["verdict"]
    assert f"{verdict['state']}: {verdict['sentence']}" in said and f"report: {run / 'report.html'}" in said


def test_align_makes_every_product(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    files = ("config.yaml", "metrics.jsonl", "environment.json", "evaluation.json", "stages.json", "report.html", "report.json")
    assert [name for name in (*files, LORA, f"arms/sft/{LORA}", "pairs/summary.json") if not (run / name).is_file()] == []
    assert PairStore(run / "pairs").validate() == read(run / "pairs" / "summary.json")["pairs"] == 6
    assert sorted(read(run / "stages.json")) == ["evaluate", "generate", "train", "train sft"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["aligned", "arms", "base"]
    for name in ("base", "aligned", "arms/sft"):
        pictures = sorted((run / "samples" / name).iterdir())
        assert len(pictures) == 4
        assert all(Image.open(picture).size == (32, 32) for picture in pictures)
    assert (last := latest(run / "checkpoints")) is not None and last.step == 3


def test_the_environment_is_recorded_without_the_machine(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    environment = read(run / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["hashes"]["base"].startswith("tiny-xl@sha256:")
    assert environment["hashes"]["pairs_sha256"] == PairStore(run / "pairs").content_hash()
    assert str(run) not in json.dumps(environment)


def test_the_card_names_base_and_pairs_by_their_hashes(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    for folder in (run / "adapter", run / "arms" / "sft" / "adapter"):
        card = (folder / "README.md").read_text()
        assert "| base | tiny-xl@sha256:" in card
        assert f"| pairs_sha256 | {PairStore(run / 'pairs').content_hash()} |" in card


def test_the_evaluation_has_every_field_of_the_contract(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    evaluation = read(run / "evaluation.json")
    assert evaluation["judge"] == {"name": "saturation", "version": "1", "parts": ["saturation"]}
    assert evaluation["prompts"] == 4
    assert set(evaluation["win_rate"]) == BLOCK
    assert sum(evaluation["win_rate"][side] for side in ("wins", "losses", "ties")) == 4
    assert set(evaluation["other_judges"]) == {"shapes"}
    assert set(evaluation["other_judges"]["shapes"]) == BLOCK | {"parts", "version"}
    assert set(evaluation["arms"]) == {"sft"} and BLOCK < set(evaluation["arms"]["sft"])
    assert all(set(evaluation["scores"][side]) == {"mean", "interval"} for side in ("base", "aligned"))
    assert set(evaluation["tasks"]) == {"single_object", "two_object", "counting", "colors"}
    for item in evaluation["items"]:
        assert set(item) == {"prompt", "seed", "task", "base_score", "aligned_score", "base_image", "aligned_image"}
        assert (run / item["base_image"]).is_file() and (run / item["aligned_image"]).is_file()
    trained_on = {condition["prompt"] for condition in PairStore(run / "pairs").conditions()}
    assert trained_on.isdisjoint(item["prompt"] for item in evaluation["items"])


def test_the_report_holds_the_verdict(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    page, verdict = (run / "report.html").read_text(encoding="utf-8"), read(run / "report.json")["verdict"]
    assert verdict["state"] == "not evaluated"  # the deciding judge is a picture statistic, which is no judge of quality
    assert verdict["sentence"] in page and verdict["rule"] in page
    assert "No environment was recorded" not in page


def test_run_again_does_nothing(aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = aligned
    before = {path: digest(path) for path in run.rglob("*") if path.is_file() and path.suffix not in (".html", ".json")}
    before[run / "stages.json"] = digest(run / "stages.json")
    capsys.readouterr()
    # what changes no weight but by rounding makes nothing anew either
    harmless = ("log_every=2", "save_every=1", "keep_checkpoints=1", "micro_batch_size=2", "gradient_checkpointing=true")
    assert polyalign("align", config, run, *(f"train.{setting}" for setting in harmless)) == 0
    said = capsys.readouterr().err
    assert [f"{stage}: done already, kept" in said for stage in ("generate", "train", "train sft", "evaluate")] == [True] * 4
    assert {path: digest(path) for path in before if path.name != "config.yaml"} == {
        path: content for path, content in before.items() if path.name != "config.yaml"
    }


def test_a_plan_says_that_all_is_done(aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = aligned
    assert polyalign("align", config, run, "--dry-run") == 0
    plan = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [words[-1] for words in plan if words[1] in ("generate", "train", "evaluate")] == ["done"] * 4


def test_another_rank_keeps_the_pairs_and_trains_anew(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs are samples of the base: what is trained of it does not make them stale."""
    config, run = aligned
    capsys.readouterr()
    assert polyalign("align", config, run, "model.lora.rank=3", "--dry-run") == 0
    plan = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")}
    assert "done" in plan["generate"]
    assert "stale" in plan["train"] and "model.lora.rank 2 -> 3" in plan["train"]


def test_beta_is_told_in_every_convention(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = aligned
    assert polyalign("train", config, only_generated(run, tmp_path / "run"), "train.steps=1", "arms={}") == 0
    told = "beta 500 (mean_half) is mean 250, sum 0.976562, sum_half 1.95312, nats 0.00195312 (256 latent elements"
    assert told in capsys.readouterr().err


def test_export_copies_and_never_overwrites(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = aligned
    assert polyalign("export", config, run, "--to", str(tmp_path / "mine")) == 0
    weights = {path.name: digest(path) for path in (run / "adapter").iterdir() if path.name != "README.md"}
    assert weights.items() <= {path.name: digest(path) for path in (tmp_path / "mine").iterdir()}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # no unfinished copy is left
    assert polyalign("export", config, run, "--to", str(tmp_path / "mine")) == 2
    assert "exists already; nothing was written" in capsys.readouterr().err


def test_an_export_shows_how_it_was_evaluated(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    """The training's card, then every judge's win rate with its interval, and base over aligned on the first prompts."""
    config, run = aligned
    assert polyalign("export", config, run, "--to", str(tmp_path / "mine")) == 0
    card, evaluation = (tmp_path / "mine" / "README.md").read_text(), read(run / "evaluation.json")
    assert card.startswith((run / "adapter" / "README.md").read_text())
    rate = evaluation["win_rate"]
    low, high = rate["bootstrap"]
    assert f"| {evaluation['judge']['name']} | {rate['wins']} | {rate['losses']} | {rate['ties']} |" in card
    assert f"{rate['rate_with_ties']:.3f} | {low:.3f} to {high:.3f} |" in card
    assert f"base {evaluation['scores']['base']['mean']:.4g} (" in card
    assert all(f"| {name} |" in card for name in evaluation["other_judges"])
    prompts = list(dict.fromkeys(item["prompt"] for item in evaluation["items"]))[:8]
    assert ", ".join(f"`{prompt}`" for prompt in prompts) in card
    first = [item["prompt"] for item in evaluation["items"]].index(prompts[-1])
    with Image.open(tmp_path / "mine" / "samples.png") as grid:
        pixels = np.asarray(grid)
    for row, side in enumerate(("base", "aligned")):
        with Image.open(run / "samples" / side / f"{first:05d}.png") as picture:
            drawn = np.asarray(picture.convert("RGB"))
        height, width = drawn.shape[0] + 2, drawn.shape[1] + 2
        corner = row * height + 1, (len(prompts) - 1) * width + 1
        assert np.array_equal(pixels[corner[0] : corner[0] + height - 2, corner[1] : corner[1] + width - 2], drawn)


def test_what_was_evaluated_otherwise_is_not_in_the_card(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = aligned
    assert polyalign("export", config, run, "sampler.steps=3", "--to", str(tmp_path / "mine")) == 0
    assert (tmp_path / "mine" / "README.md").read_text() == (run / "adapter" / "README.md").read_text()
    assert not (tmp_path / "mine" / "samples.png").exists()


def test_an_arm_is_exported_with_its_own_figures(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = aligned
    assert polyalign("export", config, run, "--arm", "sft", "--to", str(tmp_path / "mine")) == 0
    weights = "pytorch_lora_weights.safetensors"
    assert digest(tmp_path / "mine" / weights) == digest(run / "arms" / "sft" / "adapter" / weights)
    rate = read(run / "evaluation.json")["arms"]["sft"]
    assert f"| {rate['wins']} | {rate['losses']} | {rate['ties']} |" in (tmp_path / "mine" / "README.md").read_text()
    assert polyalign("export", config, run, "--arm", "kto") == 2
    assert "there is no arm 'kto' in this recipe; it has sft" in capsys.readouterr().err


def test_export_of_another_recipe_or_an_unfinished_training_is_refused(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, finished = aligned
    assert polyalign("export", config, finished, "train.steps=4", "--to", str(tmp_path / "mine")) == 2
    assert "was not trained with this recipe (train.steps 3 -> 4)" in capsys.readouterr().err
    run = only_generated(finished, tmp_path / "run")
    shutil.copytree(finished / "adapter", run / "adapter")
    assert polyalign("export", config, run, "--to", str(tmp_path / "mine")) == 2
    assert "adapter was there before, without a record" in capsys.readouterr().err
    ledger = read(finished / "stages.json")
    ledger["train"]["finished"] = False
    (run / "stages.json").write_text(json.dumps(ledger))
    assert polyalign("export", config, run, "--to", str(tmp_path / "mine")) == 2
    assert "the training is not complete (was interrupted)" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_changed_base_makes_pairs_training_and_evaluation_stale(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other weights under the same name; a note beside them is none of the model's files."""
    base = save_base(tmp_path / "tiny-xl")
    config, run = write_recipe(tmp_path, recipe(base)), tmp_path / "run"

    def status() -> list[str]:
        capsys.readouterr()
        assert polyalign("align", config, run, "--dry-run") == 0
        plan = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")}
        return [plan[stage] for stage in ("generate", "train", "evaluate")]

    for verb in ("generate", "train", "evaluate"):
        assert polyalign(verb, config, run) == 0
    (base / "notes.md").write_text("mine")
    assert [line.split()[2] for line in status()] == ["done"] * 3
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert all("stale" in line and "model_files.base" in line for line in status())


def test_prompts_that_were_trained_on_are_no_test(
    aligned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the training begins, and again before an evaluation; other prompts of a file are taken."""
    config, generated = aligned
    trained = [condition["prompt"] for condition in PairStore(generated / "pairs").conditions()]
    for name, lines_of_it in {
        "mixed": ["a dog", *trained[:5], f"  {trained[5].upper()}"],
        "other": ["a dog", "a cat"],
    }.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines_of_it))
    run = only_generated(generated, tmp_path / "run")
    mixed, other = (
        ("arms={}", f"evaluate.prompts={{file: {tmp_path / name}.txt}}", "evaluate.judges=[{name: saturation}]")
        for name in ("mixed", "other")
    )
    assert polyalign("train", config, run, *mixed) == 2
    message = capsys.readouterr().err
    assert "6 of these prompts are also prompts of the pairs that are trained on" in message
    assert [prompt for prompt in trained[:5] if repr(prompt) not in message] == []
    assert "and 1 more" in message and "a dog" not in message
    assert not (run / "checkpoints").exists()
    assert polyalign("train", config, run, *other) == 0 and polyalign("evaluate", config, run, *other) == 0
    assert [item["prompt"] for item in read(run / "evaluation.json")["items"]] == ["a dog", "a cat"]
    assert polyalign("evaluate", config, run, *mixed) == 2
    assert "also prompts of the pairs" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["align", "generate", "evaluate"])
def test_only_training_works_in_several_processes(
    verb: str, aligned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = aligned
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert polyalign(verb, config, run) == 2
    assert f"torchrun --nproc_per_node 2 -m polyalign.modalities.image.train CONFIG run={run}" in capsys.readouterr().err


def test_export_before_training(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_recipe(tmp_path, recipe(base))
    assert polyalign("generate", config, tmp_path / "run") == 0
    assert polyalign("export", config, tmp_path / "run") == 2
    assert "nothing was trained yet. Run 'polyalign train CONFIG' first" in capsys.readouterr().err


def test_training_without_pairs_says_what_to_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polyalign.modalities.image.train import main

    config = write_recipe(tmp_path, recipe(base))
    assert main([str(config), f"run={tmp_path / 'run'}"]) == 2
    assert "Run 'polyalign generate CONFIG' first" in capsys.readouterr().err


def test_full_training_exports_a_model_that_is_evaluated(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, generated = aligned
    run = only_generated(generated, tmp_path / "run")
    full = ("model.train=full", "train.reference.seat=frozen", "arms={}", "train.optimizer.learning_rate=1e-4")
    assert polyalign("align", config, run, *full) == 0
    assert lines(run)[0]["rewards/margins"] == 0.0
    weights = load_file(run / "adapter" / "unet" / "diffusion_pytorch_model.safetensors")
    last = latest(run / "checkpoints")
    assert last is not None
    assert all(torch.equal(weights[name], tensor) for name, tensor in last.weights("policy").items())
    pictures = [(run / "samples" / name / "00000.png").read_bytes() for name in ("base", "aligned")]
    assert pictures[0] != pictures[1]
    assert read(run / "evaluation.json")["prompts"] == 4


def test_automatic_beta_moves_and_is_recorded(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, generated = aligned
    run = only_generated(generated, tmp_path / "run")
    auto = "objective.beta.auto={warmup_steps: 1, decay: 0.5}"
    assert polyalign("train", config, run, auto, "arms={}", "train.steps=4") == 0
    betas = [line["beta"] for line in lines(run)]
    assert betas[0] == 500 and len(set(betas)) > 1


def test_what_was_trained_whole_is_opened_without_the_bases_address(base: Path, tmp_path: Path) -> None:
    model = {"base": "owner/name", "train": "full", "revision": "main", "variant": "fp16", "single_file_config": "owner/other"}
    settings = stages.SCHEMA.model_validate(recipe(base, model=model))
    _, opened = stages.open_trained(settings, RunFolder(tmp_path), base)
    assert opened.identity.startswith("tiny-xl@sha256:")


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"model": {"dtype": "bfloat16"}}, True),
        ({"model": {"vae_dtype": "bfloat16"}}, True),
        ({"model": {"attention": "xformers"}}, True),
        ({"model": {"prediction_type": "epsilon"}}, True),
        ({"model": {"single_file_config": "owner/name"}}, True),
        ({"train": {"mixed_precision": "bf16"}}, True),
        ({"prepare": {"posterior": "mode"}}, True),
        ({"likelihood": {"weighting": "snr"}}, True),
        ({"seed": 4}, True),
        ({"model": {"lora": {"rank": 3}}}, False),
        ({"train": {"steps": 9, "micro_batch_size": 1}}, False),
        ({"objective": {"name": "ipo", "reduction": "sum"}}, False),
    ],
)
def test_cached_scores_belong_to_what_they_depend_on(change: dict[str, Any], other: bool, base: Path) -> None:
    def identity(content: dict[str, Any]) -> str:
        return reference_identity(stages.SCHEMA.model_validate(content), base="base@1", pairs="2")

    plain = recipe(base)
    changed = {
        **plain,
        **{key: {**plain.get(key, {}), **part} if key in ("model", "train") else part for key, part in change.items()},
    }
    assert (identity(plain) != identity(changed)) is other


@pytest.fixture
def pictures_with_names(tmp_path: Path) -> Path:
    """Twelve pairs of pictures with captions, of which the chosen ones are more colourful."""
    folder = tmp_path / "mine"
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
    for number in range(12):
        grey = 10 * number
        Image.new("RGB", (40, 36), (255, grey, grey)).save(folder / "chosen" / f"{number:02d}.png")
        Image.new("RGB", (32, 32), (grey + 20, grey, grey)).save(folder / "rejected" / f"{number:02d}.png")
        caption = f"a red square number {number}" if number % 2 == 0 else f"A red  Square number {number - 1}"
        (folder / "chosen" / f"{number:02d}.txt").write_text(caption)
    return folder


def test_the_users_own_pictures(base: Path, pictures_with_names: Path, tmp_path: Path) -> None:
    """Folders in, report out; the captions of a share of the pairs are kept out of training, and evaluated on."""
    content = recipe(base, pairs={"source": "folders", "folder": str(pictures_with_names)})
    content["evaluate"] = {"held_out": 0.3, "seeds_per_prompt": 2, "judges": [{"name": "saturation"}]}
    run = tmp_path / "run"
    assert polyalign("align", write_recipe(tmp_path, content), run) == 0
    evaluation = read(run / "evaluation.json")
    evaluated = [item["prompt"] for item in evaluation["items"]]
    assert 0 < len(set(evaluated)) < 12 and len(evaluated) == 2 * len(set(evaluated))
    assert 2 * len({" ".join(prompt.lower().split()) for prompt in evaluated}) == len(set(evaluated))  # another case, one side
    assert len({item["seed"] for item in evaluation["items"]}) == len(evaluated)
    card = (run / "adapter" / "README.md").read_text()
    assert f"| pairs | {12 - len(set(evaluated))} |" in card
    assert (run / "report.html").is_file()


def test_a_picture_changed_under_its_name_in_a_list_is_imported_anew(
    base: Path, pictures_with_names: Path, tmp_path: Path
) -> None:
    """The list of a JSON-lines source only names its pictures: the stage has to see them too."""
    lines_of = [{"prompt": f"a red square number {n}", **{side: f"{side}/{n:02d}.png" for side in SIDES}} for n in range(12)]
    listing = pictures_with_names / "pairs.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines_of)))
    config = write_recipe(tmp_path, recipe(base, pairs={"source": "jsonl", "path": str(listing)}))
    run = tmp_path / "run"
    assert polyalign("generate", config, run) == 0
    first = PairStore(run / "pairs").content_hash()
    assert polyalign("generate", config, run) == 0 and PairStore(run / "pairs").content_hash() == first
    Image.new("RGB", (40, 36), (1, 2, 3)).save(pictures_with_names / "chosen" / "03.png")
    assert polyalign("generate", config, run) == 0
    store = PairStore(run / "pairs")
    assert store.content_hash() != first and store.rows([3])[0]["chosen"].getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "keeps none of the 12 pairs aside"), (0.9999, "keeps all of the 12 pairs aside")]
)
def test_a_share_that_leaves_one_side_empty(
    share: float, said: str, base: Path, pictures_with_names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(base, pairs={"source": "folders", "folder": str(pictures_with_names)})
    content["evaluate"] = {"held_out": share, "judges": [{"name": "saturation"}]}
    assert polyalign("align", write_recipe(tmp_path, content), tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "run" / "pairs" / "summary.json").is_file()
