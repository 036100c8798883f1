"""Single answers with labels, pairs that are ranked before training, an adapter to go on from, rewards on held-out pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from polyalign.core.errors import UserError
from polyalign.datasets.formats.table import TEXT_SOURCES, import_format
from polyalign.datasets.labels import LabelStore
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.text import stages
from polyalign.modalities.text.rewards import policy_and_reference

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import (  # noqa: E402
    LORA,
    digest,
    of_rows,
    polyalign,
    preferences,
    read,
    recipe,
    write_lines,
    write_recipe,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tiny_texts: dict[str, Path]) -> Path:
    return tiny_texts["llama"]


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Two answers to every prompt, a good and a bad one."""
    pairs = preferences(count)
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    return good + [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in pairs]


def of_labels(base: Path, folder: Path, rows: list[Any], **changes: Any) -> dict[str, Any]:
    """A recipe that reads single answers."""
    objective = {"objective": {"name": "kto"}, **changes}
    return of_rows(base, folder, rows, pairs={"source": "labels"}, **objective)


# --- labels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [{"name": "kto"}, {"name": "bco"}, {"name": "kto", "baseline": "mismatched"}])
def test_single_answers_are_trained_on(objective: dict[str, Any], base: Path, tmp_path: Path) -> None:
    config, run = write_recipe(tmp_path, of_labels(base, tmp_path, labelled_rows(12), objective=objective)), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    summary, evaluation = read(run / "pairs" / "summary.json"), read(run / "evaluation.json")
    assert (summary["desirable"], summary["undesirable"], summary["prompts"]) == (12, 12, 12)
    trained = 24 - 2 * len(evaluation["items"])
    assert f"| pairs | {trained} |" in (run / "adapter" / "README.md").read_text()
    assert any(bool(tensor.abs().max() > 0) for name, tensor in load_file(run / LORA).items() if "lora_B" in name)
    assert "implicit_reward" not in evaluation and (run / "report.html").is_file()


def test_fine_tuning_takes_the_good_ones(base: Path, tmp_path: Path) -> None:
    objective = {"name": "sft"}
    both = write_recipe(tmp_path / "both", of_labels(base, tmp_path / "both", labelled_rows(12), objective=objective))
    unlabelled = [{"prompt": row["prompt"], "completion": row["completion"]} for row in labelled_rows(12)[:12]]
    good = write_recipe(tmp_path / "good", of_labels(base, tmp_path / "good", unlabelled, objective=objective))
    for config in (both, good):
        for verb in ("generate", "train"):
            assert polyalign(verb, config, config.parent / "run") == 0
    assert digest(tmp_path / "both" / "run" / LORA) == digest(tmp_path / "good" / "run" / LORA)
    assert read(tmp_path / "both" / "run" / "left_out.json")["undesirable"] > 0
    assert not (tmp_path / "good" / "run" / "left_out.json").exists()


def test_labels_of_every_file_and_in_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Good?"}]
    rows = [
        {"prompt": turns, "completion": [{"role": "assistant", "content": "yes"}], "label": 1, "source": "a"},
        {"prompt": turns, "completion": [{"role": "assistant", "content": "no"}], "label": 0, "source": "b"},
    ]
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = []
    for path in (lines, tmp_path / "rows.parquet"):
        store = LabelStore(tmp_path / path.suffix[1:])
        import_format("labels", path, store, formats=TEXT_SOURCES)  # pyright: ignore[reportArgumentType]
        found.append(store.rows([0, 1]))
    assert found[0] == found[1] and LabelStore(tmp_path / "jsonl").labels() == [True, False]
    assert found[0][0]["condition"] == {"prompt": "Good?", "messages": turns, "source": "a"}
    assert found[0][1]["completion"] == "no"


BAD = {
    "no completion": ({"prompt": "a"}, "no column 'completion'"),
    "an empty answer": ({"prompt": "a", "completion": "  "}, "column 'completion' is empty"),
    "a label of three": ({"prompt": "a", "completion": "b", "label": 3}, "column 'label' must be true or false"),
    "turns and text": ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "is a list of turns"),
    "half a letter": ({"prompt": "a", "completion": "\ud800"}, "not Unicode"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_left_out(case: str, tmp_path: Path) -> None:
    row, words = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [{"prompt": "a", "completion": "b", "label": True}, row]))
    with pytest.raises(UserError, match=f"(?s)1 bad row.*rows.jsonl line 2: .*{words}"):
        import_format("labels", path, LabelStore(tmp_path / "out"), formats=TEXT_SOURCES)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()
    store = LabelStore(tmp_path / "out")
    summary = import_format("labels", path, store, on_bad_row="drop", formats=TEXT_SOURCES)  # pyright: ignore[reportArgumentType]
    assert (len(store), summary["rows_dropped"], summary["rows"]) == (1, 1, 2)


REFUSED = {
    "pairs needed": (("objective={name: dpo}",), "objective: dpo compares two answers to a prompt, and pairs.source: labels"),
    "an arm": (("arms={pairs: {name: ipo, reduction: mean}}",), "arms.pairs: ipo compares two answers"),
    "a filter": (("pairs.filter={ches: {keep: 0.5}}",), "'filter' ranks pairs, and source 'labels' has single answers"),
    "rounds": (("online={rounds: 3}",), "pairs.source is labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_pairs_is_refused(case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = REFUSED[case]
    config = write_recipe(tmp_path, of_labels(base, tmp_path, labelled_rows(4)))
    capsys.readouterr()
    assert polyalign("align", config, tmp_path / "run", *overrides) == 2
    assert words in capsys.readouterr().err


# --- a filter -----------------------------------------------------------------------------------------------------------------


def test_pairs_are_ranked_and_counted(base: Path, tmp_path: Path) -> None:
    content = of_rows(base, tmp_path, preferences(24), pairs={"filter": {"ches": {"keep": 0.5}}})
    config, run = write_recipe(tmp_path, content), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    trained = 24 - len(read(run / "evaluation.json")["items"])
    left = read(run / "left_out.json")["above_ches"]
    assert left == trained - max(1, round(0.5 * trained))
    assert f"| pairs | {trained - left} |" in (run / "adapter" / "README.md").read_text()
    before = digest(run / "pairs" / "pairs-00000.parquet")
    assert polyalign("align", config, run, "pairs.filter.ches.keep=0.25") == 0
    assert digest(run / "pairs" / "pairs-00000.parquet") == before, "the pairs themselves stay"
    assert read(run / "left_out.json")["above_ches"] > left


# --- an adapter to go on from -------------------------------------------------------------------------------------------------


def test_fine_tuning_and_then_preferences(base: Path, tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "sft", of_labels(base, tmp_path / "sft", labelled_rows(12), objective={"name": "sft"}))
    assert polyalign("align", first, tmp_path / "sft" / "run") == 0
    start = tmp_path / "sft" / "run" / "adapter"
    content = of_rows(base, tmp_path / "dpo", preferences(12), model={"base": str(base), "lora": {"start": str(start)}})
    content["train"] = {**content["train"], "reference": {"seat": "frozen"}}
    config, run = write_recipe(tmp_path / "dpo", content), tmp_path / "dpo" / "run"
    assert polyalign("align", config, run) == 0
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.693147, abs=1e-5) and line["rewards/margins"] == 0.0
    aligned = [item["aligned_text"] for item in read(tmp_path / "sft" / "run" / "evaluation.json")["items"]]
    begun = [item["base_text"] for item in read(run / "evaluation.json")["items"]]
    assert aligned == begun, "the same prompts, seeds and model"
    assert read(run / "evaluation.json")["implicit_reward"]["pairs"] == len(begun)


def test_a_reference_without_the_starting_adapter_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    assert polyalign("align", config, tmp_path / "run", f"model.lora.start={base}") == 2
    assert "adapter_off is the base without its LoRA, and this training begins with one" in capsys.readouterr().err


# --- rewards on pairs that were not trained on --------------------------------------------------------------------------------


def test_rewards_on_held_out_pairs_and_elsewhere(base: Path, tmp_path: Path) -> None:
    other = write_recipe(tmp_path / "other", of_rows(base, tmp_path / "other", preferences(9)))
    assert polyalign("generate", other, tmp_path / "other" / "run") == 0
    shorter = {"name": "text_rules", "options": {"rules": [{"rule": "length", "most": 15, "unit": "characters"}]}}
    rewards = {"judges": [shorter], "splits": {"prompt shift": str(tmp_path / "other" / "run" / "pairs")}}
    content = of_rows(base, tmp_path, preferences(20), evaluate={"rewards": rewards})
    config, run = write_recipe(tmp_path, content), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    evaluation = read(run / "evaluation.json")
    implicit, compared = evaluation["implicit_reward"], evaluation["rewards"]
    assert implicit["pairs"] == len(evaluation["items"]) and implicit["draws"] == 1
    low, high = implicit["interval"]
    assert 0.0 <= low <= implicit["accuracy"] <= high <= 1.0
    assert list(compared["splits"]) == ["in distribution", "prompt shift"]
    assert list(compared["scorers"]) == ["text_rules", "implicit"]
    found = compared["splits"]["in distribution"]["accuracy"]
    assert found["implicit"]["accuracy"] == implicit["accuracy"] and found["text_rules"]["pairs"] == implicit["pairs"]
    assert compared["splits"]["prompt shift"]["accuracy"]["implicit"]["pairs"] == 9


def test_the_reference_of_full_training_is_the_base(base: Path, tmp_path: Path) -> None:
    """Its implicit reward is measured against the base's own weights: of the base itself it is zero for every pair."""
    content = of_rows(base, tmp_path, preferences(6), model={"base": str(base), "train": "full"})
    content["train"] = {**content["train"], "reference": {"seat": "frozen"}}
    made = stages.SCHEMA.model_validate(content)
    adapter, model, reference = policy_and_reference(made, base)
    assert polyalign("generate", write_recipe(tmp_path, content), tmp_path / "run") == 0
    rows = PairStore(tmp_path / "run" / "pairs").rows([0, 1])
    batch = adapter.prepare(model, rows, step=0)
    own, other = adapter.score(model, batch, None), reference.scores(adapter, model, batch, None, index=0)
    assert other is not None and torch.equal(own.values, other.values) and other.values.abs().sum() > 0
