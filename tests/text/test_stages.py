"""The verbs on a Llama in small: from a recipe to pairs, an adapter, an evaluation and a report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.generation import read_samples
from polyalign.modalities.text import stages
from polyalign.modalities.text.training import conditions_of, open_model, settings_of

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import (
    JUDGE,
    LORA,
    digest,
    of_rows,
    polyalign,
    preferences,
    prompts_file,
    read,
    recipe,
    write_lines,
    write_recipe,
)  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tiny_texts: dict[str, Path]) -> Path:
    return tiny_texts["llama"]


@pytest.fixture(scope="module")
def aligned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe that makes its pairs, with an SFT arm, and the folder of its run."""
    root = tmp_path_factory.mktemp("aligned")
    config = write_recipe(root, recipe(base, root, arms={"sft": {"name": "sft"}}))
    assert polyalign("align", config, root / "run") == 0
    return config, root / "run"


def refused(capsys: pytest.CaptureFixture[str], verb: str, config: Path, run: Path, *overrides: str) -> str:
    """What a command that is refused says."""
    capsys.readouterr()
    assert polyalign(verb, config, run, *overrides) == 2
    return capsys.readouterr().err


def test_align_makes_every_product(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    files = ("config.yaml", "metrics.jsonl", "environment.json", "evaluation.json", "stages.json", "report.html", "report.json")
    assert [name for name in (*files, LORA, f"arms/sft/{LORA}", "pairs/summary.json") if not (run / name).is_file()] == []
    assert sorted(read(run / "stages.json")) == ["evaluate", "generate", "train", "train sft"]
    store = PairStore(run / "pairs")
    assert store.kind.name == "text" and store.validate() == read(run / "pairs" / "summary.json")["pairs"] > 0
    weights = load_file(run / LORA)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_pairs_are_samples_as_the_judge_prefers_them(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    store, samples = PairStore(run / "pairs"), read_samples(PairStore(run / "pairs"))
    assert len(samples) == 18
    assert samples[4].seed == seed_of(3, "sample", 1, 1)
    for row in store.rows(range(len(store))):
        assert row["chosen_scores"]["text_rules"] > row["rejected_scores"]["text_rules"]
        assert row["condition"]["task"] in ("short", "long") and row["chosen"] != row["rejected"]
        assert row["provenance"]["sampler"]["max_new_tokens"] == 6


def test_beta_is_that_of_language_models(aligned: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    _, run = aligned
    said = read(run / "stages.json")["train"]["inputs"]["objective"]["beta"]
    assert (said["value"], said["convention"]) == (0.1, "nats")
    given = {"objective": {"name": "dpo", "beta": {"value": 0.3}}, "arms": {"a": {"name": "simpo"}, "b": {"name": "robust"}}}
    made = stages.SCHEMA.model_validate(recipe(base, tmp_path, **given))
    assert (made.objective.beta.value, made.objective.beta.convention) == (0.3, "nats")
    assert made.arms["a"].beta.value == 2.0, "an objective's own beta for tokens stays"
    assert made.arms["b"].beta.convention == "nats"


def test_the_evaluation_has_every_field(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    evaluation = read(run / "evaluation.json")
    assert evaluation["judge"]["name"] == "text_rules" and evaluation["prompts"] == 5
    assert sum(evaluation["win_rate"][side] for side in ("wins", "losses", "ties")) == 5
    assert set(evaluation["arms"]) == {"sft"} and set(evaluation["tasks"]) == {"short", "long"}
    assert set(evaluation["lengths"]["words"]) == {"base", "aligned", "change", "interval", "base_spread"}
    lines = [json.loads(line) for line in (run / "samples" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 5
    for item, line in zip(evaluation["items"], lines, strict=True):
        assert set(item) == {"prompt", "seed", "task", "base_score", "aligned_score", "base_text", "aligned_text"}
        assert (item["prompt"], item["base_text"], item["aligned_text"]) == (line["prompt"], line["base"], line["aligned"])
        assert isinstance(line["sft"], str)
    trained_on = {condition["prompt"] for condition in PairStore(run / "pairs").conditions()}
    assert trained_on.isdisjoint(item["prompt"] for item in evaluation["items"])


def test_base_answers_are_the_bases(aligned: tuple[Path, Path]) -> None:
    """Those of the evaluation are what the base gives for these prompts and seeds, in whatever batches."""
    config, run = aligned
    settings = stages.SCHEMA.model_validate(dict(read_config(run)))
    adapter, model = open_model(settings)
    items = read(run / "evaluation.json")["items"]
    again = [adapter.sample(model, [{"prompt": item["prompt"]}], [item["seed"]])[0] for item in items]
    assert again == [item["base_text"] for item in items]
    assert config.is_file()


def read_config(run: Path) -> Any:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def test_run_again_does_nothing(aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = aligned
    before = {path: digest(path) for path in run.rglob("*") if path.is_file() and "report" not in path.name}
    capsys.readouterr()
    assert polyalign("align", config, run) == 0
    said = capsys.readouterr().err
    assert [f"{stage}: done already, kept" in said for stage in ("generate", "train", "train sft", "evaluate")] == [True] * 4
    assert {path: digest(path) for path in before} == before


def test_the_same_recipe_gives_the_same_bytes(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = aligned
    assert polyalign("align", config, tmp_path / "again", "arms={}") == 0
    for name in (LORA, "samples/outputs.jsonl", "pairs/pairs-00000.parquet", "pairs/pairs-00001.parquet"):
        if name != "samples/outputs.jsonl":  # it has the arm's answers too
            assert digest(tmp_path / "again" / name) == digest(run / name)
    items = [read(folder / "evaluation.json")["items"] for folder in (run, tmp_path / "again")]
    assert items[0] == items[1]


def test_an_interrupted_generation_ends_in_the_same_bytes(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = aligned
    part = tmp_path / "part"
    assert polyalign("generate", config, part) == 0
    (part / "pairs" / "pairs-00001.parquet").unlink()
    ledger = read(part / "stages.json")
    ledger["generate"]["finished"] = False
    (part / "stages.json").write_text(json.dumps(ledger))
    assert polyalign("generate", config, part) == 0
    assert digest(part / "pairs" / "pairs-00001.parquet") == digest(run / "pairs" / "pairs-00001.parquet")


def test_an_interrupted_evaluation_keeps_its_answers(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = aligned
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    ledger = read(copy / "stages.json")
    ledger["evaluate"]["finished"] = False
    (copy / "stages.json").write_text(json.dumps(ledger))
    kept = copy / "samples" / "base" / "00000.json"
    kept.write_text(json.dumps(["kept"] * 4), encoding="utf-8")
    (copy / "samples" / "base" / "00001.json").unlink()
    assert polyalign("evaluate", config, copy) == 0
    texts = [item["base_text"] for item in read(copy / "evaluation.json")["items"]]
    assert texts[:4] == ["kept"] * 4
    assert texts[4] == read(run / "evaluation.json")["items"][4]["base_text"]


def test_another_rank_keeps_the_pairs_and_trains_anew(aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = aligned
    capsys.readouterr()
    assert polyalign("align", config, run, "model.lora.rank=3", "--dry-run") == 0
    plan = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")}
    assert "done" in plan["generate"] and "stale" in plan["train"] and "model.lora.rank 2 -> 3" in plan["train"]


def test_the_report_shows_both_answers(aligned: tuple[Path, Path]) -> None:
    _, run = aligned
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="answer"') >= 2 * 5 and "heldout 3: what is it?" in page
    assert "log-probability against the reference" in page and "Margins by timestep" not in page
    said = page.split("</style>")[1].split('<section id="environment"')[0]  # there the command of these tests is named
    assert "picture" not in said


def test_an_export_is_what_peft_opens(aligned: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, run = aligned
    assert polyalign("export", config, run, "--to", str(tmp_path / "out")) == 0
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in network.named_parameters())


# --- pairs that are there already ---------------------------------------------------------------------------------------------


def test_rows_to_a_report_with_prompts_kept_aside(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(20)))
    run = tmp_path / "run"
    assert polyalign("align", config, run) == 0
    items, card = read(run / "evaluation.json")["items"], (run / "adapter" / "README.md").read_text()
    assert 1 < len(items) < 20 and f"| pairs | {20 - len(items)} |" in card
    assert f"evaluate.held_out = 0.35 keeps {len(items)} of 20 pairs ({len(items) / 20:.0%}) aside" in capsys.readouterr().err
    written = (run / "config.yaml").read_bytes()
    assert "nope.jsonl" in refused(capsys, "align", config, run, "pairs.path=nope.jsonl")
    assert (run / "config.yaml").read_bytes() == written, "no stage has begun with that file"
    first = PairStore(run / "pairs").rows([0])[0]
    assert first["chosen"] == " yes, it is 0" and first["provenance"]["sampler"]["place"] == "rows.jsonl line 1"


def test_conversations_are_trained_and_asked_in_the_models_template(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good?"}]
    rows = [
        {
            "prompt": [asked[0], {"role": "user", "content": f"Is {index} good?"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": f"no {index}"}],
        }
        for index in range(12)
    ]
    config = write_recipe(tmp_path, of_rows(tiny_texts["qwen2"], tmp_path, rows))
    assert polyalign("align", config, tmp_path / "run") == 0
    row = PairStore(tmp_path / "run" / "pairs").rows([3])[0]
    assert row["condition"] == {"prompt": "Is 3 good?", "messages": [asked[0], {"role": "user", "content": "Is 3 good?"}]}
    lines = (tmp_path / "run" / "samples" / "outputs.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["messages"][0] == asked[0]


def test_a_store_of_pictures_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    row = {"pair_id": "a", "condition": {"prompt": "x"}, "chosen": pictures[0], "rejected": pictures[1], "provenance": {}}
    PairStore(tmp_path / "pictures").write_shard(0, [{**row, "chosen_scores": {"user": 1.0}, "rejected_scores": {"user": 0.0}}])
    content = of_rows(base, tmp_path, preferences(3), pairs={"source": "store", "store": str(tmp_path / "pictures")})
    said = refused(capsys, "generate", write_recipe(tmp_path, content), tmp_path / "run")
    assert "holds pairs of pictures, and pairs of texts are needed here" in said


def test_a_store_is_taken_over_and_judged_anew(aligned: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    _, run = aligned
    short = {"name": "text_rules", "options": {"rules": [{"rule": "length", "most": 1, "unit": "characters"}]}}
    for source, pairs in (("store", {}), ("relabel", {"judges": [short]})):
        folder = tmp_path / source
        content = recipe(base, folder, pairs={"source": source, "store": str(run / "pairs"), **pairs})
        assert polyalign("generate", write_recipe(folder, content), folder / "run") == 0
        rows = PairStore(folder / "run" / "pairs").rows([0, 1])
        assert all(len(row["chosen"]) <= len(row["rejected"]) for row in rows) or source == "store"
    summary = read(tmp_path / "relabel" / "run" / "pairs" / "summary.json")
    assert summary["agreed"] + summary["disagreed"] + summary["ties_dropped"] == len(PairStore(run / "pairs"))


# --- pairs that are too long --------------------------------------------------------------------------------------------------


def with_a_long_one(count: int) -> list[dict[str, Any]]:
    rows = preferences(count)
    rows[7] = {**rows[7], "chosen": " yes" * 60}
    return rows


def test_a_pair_that_is_too_long_stops_the_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = of_rows(base, tmp_path, with_a_long_one(20), prepare={"max_completion_tokens": 30}, seed=1)
    said = refused(capsys, "align", write_recipe(tmp_path, content), tmp_path / "run")
    assert " pairs are too long:" in said
    assert "pair 00000007 (prompt" in said and "on_long: drop" in said and "Nothing is cut" in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_pairs_that_are_too_long_are_left_out_and_counted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = {"max_completion_tokens": 30, "on_long": "drop"}
    content = of_rows(base, tmp_path, with_a_long_one(20), prepare=prepare, seed=1)
    run = tmp_path / "run"
    assert polyalign("align", write_recipe(tmp_path, content), run) == 0
    assert "pairs are too long and are left out" in capsys.readouterr().err
    items = len(read(run / "evaluation.json")["items"])
    card = (run / "adapter" / "README.md").read_text()
    assert "| too_long | 1 |" in card and f"| pairs | {20 - items - 1} |" in card
    assert read(run / "left_out.json") == {"too_long": 1}
    assert "pairs too long" in (run / "report.html").read_text()


# --- what recipes may say -----------------------------------------------------------------------------------------------------


def test_greedy_evaluation(aligned: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = aligned
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert polyalign("evaluate", config, copy, "evaluate.temperature=0") == 0
    settings = stages.SCHEMA.model_validate(read_config(copy))
    greedy = settings.model_copy(update={"sampler": settings.sampler.model_copy(update={"temperature": 0.0})})
    adapter, model = open_model(greedy)
    item = read(copy / "evaluation.json")["items"][0]
    assert adapter.sample(model, [{"prompt": item["prompt"]}], [99]) == [item["base_text"]], "no seed matters"


def test_full_training_exports_a_model_that_is_evaluated(base: Path, tmp_path: Path) -> None:
    model = {"base": str(base), "train": "full"}
    train = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "reference": {"seat": "frozen"}, "threads": 1}
    content = of_rows(base, tmp_path, preferences(12), model=model, train=train)
    assert polyalign("align", write_recipe(tmp_path, content), tmp_path / "run") == 0
    assert (tmp_path / "run" / "adapter" / "model.safetensors").is_file()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rewards/margins"] == 0.0 and abs(line["loss"] - 0.693147) < 1e-5


def test_a_cached_reference_gives_the_same_training(base: Path, tmp_path: Path) -> None:
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(12)))
    for name, overrides in (("live", ()), ("cached", ("train.reference.seat=cached",))):
        assert polyalign("generate", config, tmp_path / name, *overrides) == 0
        assert polyalign("train", config, tmp_path / name, *overrides) == 0
    live, cached = (load_file(tmp_path / name / LORA) for name in ("live", "cached"))
    assert all(torch.allclose(live[key], cached[key], atol=1e-6) for key in live)


def test_prompts_as_users_turns(tmp_path: Path, base: Path) -> None:
    content = recipe(base, tmp_path)
    content["pairs"]["prompts"] |= {"chat": True, "system": "Be brief.", "count": 2}
    made = stages.SCHEMA.model_validate(content)
    assert made.pairs.prompts is not None
    found = conditions_of(made.pairs.prompts, 0)
    assert len(found) == 2 and [turn["role"] for turn in found[0]["messages"]] == ["system", "user"]
    assert found[1]["messages"][1]["content"] == found[1]["prompt"] == "train 1: what is it?"
    path = write_lines(tmp_path / "chats.jsonl", [{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UserError, match="has 'messages' already"):
        conditions_of(made.pairs.prompts.model_copy(update={"file": str(path)}), 0)


def test_the_clinical_world_gives_prompts_of_its_two_splits(base: Path, tmp_path: Path) -> None:
    content = recipe(base, tmp_path)
    world = {"world": "clinical", "count": 5}
    made = stages.SCHEMA.model_validate(
        {
            **content,
            "pairs": {**content["pairs"], "prompts": world},
            "evaluate": {"judges": [JUDGE], "prompts": {**world, "split": "heldout"}},
        }
    )
    assert made.pairs.prompts is not None and made.evaluate.prompts is not None
    train, heldout = conditions_of(made.pairs.prompts, 3), conditions_of(made.evaluate.prompts, 3)
    assert len(train) == len(heldout) == 5
    assert {one["prompt"] for one in train}.isdisjoint(one["prompt"] for one in heldout)


def test_an_objectives_needs_become_settings(base: Path, tmp_path: Path) -> None:
    content = recipe(base, tmp_path, likelihood={"prefix_sharing": "off", "head_chunk": 7}, prepare={"max_length": 90})
    for objective, dense in (("dpo", set()), ("tdpo2", {"kl"}), ("wpo", {"confidence"})):
        made = stages.SCHEMA.model_validate({**content, "objective": {"name": objective}})
        settings = settings_of(made)
        assert settings.dense == dense
    watched = stages.SCHEMA.model_validate({**content, "train": {**content["train"], "stop": {"every": 5}}})
    assert settings_of(watched).dense == {"top_k"}
    assert (settings.prefix_sharing, settings.head_chunk, settings.max_length, settings.rank) == ("off", 7, 90, 2)


REFUSED = {
    "a reference without a LoRA": (("model.train=full",), "adapter_off needs a LoRA"),
    "a second LoRA": (("train.reference.seat=adapter",), "a text recipe cannot load one"),
    "a beta for errors": (("objective.beta.convention=mean_half",), "objective: beta.convention 'mean_half'"),
    "an objective for pictures": (("objective={name: dspo}",), "a text recipe"),
    "an arm that needs another model": (("arms={guided: {name: tgdpo}}",), "arms.guided: tgdpo needs a guide"),
    "no such judge": (("evaluate.judges=[{name: clinicl}]",), "did you mean 'clinical'"),
    "a judge of pictures": (("evaluate.judges=[{name: http}]",), "'http' judges pictures, and these outputs are texts"),
    "no template": (("model.chat_template=nowhere.jinja",), "nowhere.jinja: no such file"),
    "greedy and several seeds": (("evaluate.temperature=0", "evaluate.seeds_per_prompt=2"), "seeds_per_prompt: 1"),
    "two places of prompts": (("pairs.prompts.world=clinical",), "give either 'file' or 'world'"),
    "an option that is none": (("pairs={source: jsonl, path: x, options: {wole: true}}",), "no such option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = REFUSED[case]
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    assert words in refused(capsys, "align", config, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "pairs").exists()


def test_prompts_of_both_sides_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = str(prompts_file(tmp_path, "train", 6))
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    said = refused(capsys, "align", config, tmp_path / "run", f"evaluate.prompts.file={same}")
    assert "are also prompts of the pairs that are trained on" in said


def test_generation_in_several_processes_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, "generate", write_recipe(tmp_path, recipe(base, tmp_path)), tmp_path / "run")
    assert "polyalign.modalities.text.train CONFIG" in said


def test_samples_that_are_empty_are_in_no_pair(tmp_path: Path) -> None:
    from polyalign.core.adapter import Model
    from polyalign.modalities.generation import GenerationSettings, generate_pairs

    class Sampler:
        def sample(self, model: Any, conditions: Any, seeds: Any) -> list[str]:
            return [["", " \n", "short", "a longer answer"][index % 4] for index in range(len(seeds))]

    class Shorter:
        name, version = "shorter", "1"

        def score(self, conditions: Any, outputs: Any) -> list[float]:
            return [-float(len(output)) for output in outputs]

    model = Model(network=torch.nn.Identity(), parts={}, identity="x@1")
    settings = GenerationSettings(samples_per_prompt=4, mode="all_pairs")
    conditions = [{"prompt": "a"}, {"prompt": "b"}]
    summary = generate_pairs(
        Sampler(), model, conditions, Shorter(), settings=settings, folder=tmp_path, seed=0, outputs="text"
    )
    assert (summary["pairs"], summary["empty_dropped"]) == (2, 4)
    rows = PairStore(tmp_path, "text").rows([0, 1])
    assert [(row["pair_id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("000000-2-3", "short", "a longer answer"),
        ("000001-2-3", "short", "a longer answer"),
    ]
    assert PairStore(tmp_path).validate() == 2


def test_a_run_folder_only_planned_writes_nothing(base: Path, tmp_path: Path) -> None:
    made = stages.SCHEMA.model_validate(recipe(base, tmp_path))
    plan = RunFolder(tmp_path / "none", planning=True)
    for stage in ("generate", "train", "evaluate"):
        getattr(stages, stage)(made, plan)
    assert [plan.planned[name].status for name in ("generate", "train", "evaluate")] == ["todo"] * 3
    assert not (tmp_path / "none").exists()


def test_a_base_that_is_none_is_refused_before_pairs_are_imported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    for given, words in {pickled: "a pickle", tmp_path / "absent": "there is no such folder", config: "a file"}.items():
        told = refused(capsys, "align", config, tmp_path / "run", f"model.base={given}")
        assert words in told and not (tmp_path / "run" / "pairs").exists()


def test_longer_answers_than_the_model_has_positions_are_refused_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    told = refused(capsys, "align", config, tmp_path / "run", "sampler.max_new_tokens=5000")
    assert "sampler.max_new_tokens is 5000" in told and "positions" in told and not (tmp_path / "run" / "pairs").exists()
