"""Prompts of the evaluation that leave no room for an answer: found before the training, by the name of their pair or line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import load_prompts, places
from polyalign.modalities.held_out import split_pairs
from polyalign.modalities.text.config import TextRecipe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import of_rows, polyalign, preferences, read, write_recipe  # noqa: E402

torch.set_num_threads(1)

LONG = "is it good? " * 400


@pytest.fixture(scope="module")
def base(tiny_texts: dict[str, Path]) -> Path:
    return tiny_texts["llama"]


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twenty rows, the last of which is long and is kept aside."""
    folder = tmp_path_factory.mktemp("asked")
    found = [*preferences(19), *({**row, "prompt": f"{row['prompt']} {LONG}"} for row in preferences(12))]
    config = write_recipe(folder, of_rows(base, folder, found))
    assert polyalign("generate", config, folder / "run") == 0
    recipe = TextRecipe.model_validate(yaml.safe_load(config.read_text()))
    _, aside = split_pairs(recipe.evaluate, recipe.seed, PairStore(folder / "run" / "pairs"))
    long = next(index for index in aside if index >= 19)
    return [*found[:19], found[long]]


def test_a_long_prompt_kept_aside_stops_the_run_before_the_training(
    base: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert polyalign("align", write_recipe(tmp_path, of_rows(base, tmp_path, rows)), tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "1 of" in said and "prompts kept aside for the evaluation" in said and "prepare.on_long: drop" in said
    assert re.search(r"pair 00000019 \(rows\.jsonl line 20\): its prompt has \d+ tokens, which", said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_long_prompt_kept_aside_is_left_out_of_the_evaluation(
    base: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_recipe(tmp_path, of_rows(base, tmp_path, rows, prepare={"on_long": "drop"}))
    assert polyalign("align", config, tmp_path / "run") == 0
    assert "are left out of the evaluation" in capsys.readouterr().err
    found = read(tmp_path / "run" / "evaluation.json")
    assert found["left_out"] == {"too_long": 1} and found["items"]
    assert all(len(item["prompt"]) < 100 for item in found["items"])


def test_a_long_prompt_of_a_file_is_named_by_its_line(
    base: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asked.txt"
    file.write_text(f"Is it bad?\n\n{LONG}\n")
    content = of_rows(base, tmp_path, rows[:19], evaluate={"prompts": {"file": str(file)}})
    assert polyalign("align", write_recipe(tmp_path, content), tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "1 of 2 prompts of evaluate.prompts leave no room" in said and "asked.txt line 3: its prompt has" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_places_are_those_of_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["x", "y"]')
    (tmp_path / "b.json").write_text('["z"]')
    assert [one["prompt"] for one in load_prompts(tmp_path)] == ["x", "z", "y"]
    assert places(tmp_path, limit=2) == ["a.json a, entry 0", "b.json b, entry 0"]
