"""The text recipes run from data to report, in small: on a base with random weights, for a few steps, with rules in the place
of judges that are models. Data, objective, optimiser, reference, sections and precision stay their own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyalign.core.cli import main
from polyalign.core.config import load
from polyalign.modalities.text.config import TextRecipe

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "text")]

from recipe_data import provide  # noqa: E402  # pyright: ignore[reportMissingImports]
from tiny_texts import save_model  # noqa: E402  # pyright: ignore[reportMissingImports]

LORA, WHOLE = "adapter_model.safetensors", "model.safetensors"
RULES = "{name: text_rules, options: {rules: [{rule: length, most: 6, unit: characters}, {rule: present, pattern: '[aeiou]'}]}}"
SMALLER = (
    "model.device=cpu",
    "model.dtype=float32",
    "prepare={max_prompt_tokens: null, max_completion_tokens: null, max_length: null}",
    "sampler={max_new_tokens: 6, batch_size: 8}",
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "train.schedule.warmup_steps=0",
    "train.threads=1",
    f"evaluate.judges=[{RULES}]",
)
ROUNDS = ("online.rounds=2", "online.prompts_per_round=6", f"pairs.judges=[{RULES}]")
HELD_OUT = "evaluate.held_out=0.4"
STEMS = (
    "dpo",
    "dpo_full",
    "simpo",
    "kto",
    "tdpo2",
    "tgdpo",
    "ofs_dpo",
    "modpo",
    "online_dpo",
    "ipo_md",
    "iterated_dpo",
    "adpo",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model("qwen2", tmp_path_factory.mktemp("base") / "base")


def run_recipe(stem: str, base: Path, *overrides: str) -> tuple[TextRecipe, Path]:
    """The recipe and the folder of its run."""
    recipe, _ = load(f"text/{stem}", [], TextRecipe)
    provide(recipe)
    smaller = [*SMALLER, f"model.base={base}", *(ROUNDS if recipe.online is not None else ()), *overrides]
    assert main(["align", f"text/{stem}", *smaller]) == 0
    return recipe, Path(recipe.run.replace("{seed}", str(recipe.seed)))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stem", STEMS)
def test_a_text_recipe_runs(stem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if stem == "tgdpo":
        run_recipe("dpo", base, HELD_OUT)
    recipe, run = run_recipe(stem, base, HELD_OUT)
    found = lines_of(run)
    assert [line["step"] for line in found] == [1, 2] and all(math.isfinite(line["loss"]) for line in found)
    weights = load_file(run / "adapter" / (WHOLE if recipe.model.train == "full" else LORA))
    before = load_file(base / WHOLE) if recipe.model.train == "full" else {}
    moved = [
        name for name, weight in weights.items() if (not torch.equal(weight, before[name]) if before else "lora_B" in name)
    ]
    assert moved and all(bool(weights[name].abs().max() > 0) for name in moved)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["items"] and (run / "report.html").is_file()
    pairs = recipe.online is None and not recipe.pairs.labelled
    assert ("implicit_reward" in evaluation) == pairs, "measured where pairs were kept aside"
    if stem in ("dpo", "dpo_full"):
        assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_two_halves_of_note_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    count = "evaluate.prompts.count=null"
    _, first = run_recipe("note_sft", base, count)
    assert lines_of(first)[1]["loss"] != lines_of(first)[0]["loss"]
    _, second = run_recipe("note", base, count)
    assert lines_of(second)[0]["rewards/margins"] == 0.0, "the reference is the adapter that it began with"
    items = [json.loads((run / "evaluation.json").read_text())["items"] for run in (first, second)]
    assert [item["aligned_text"] for item in items[0]] == [item["base_text"] for item in items[1]]
