"""Questions of the evaluation that are too long for the model: found before the training, by the name of their pair or line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlm_runs import recipe, run

from polyalign.datasets import visual_prompts
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.held_out import split_pairs
from polyalign.modalities.vlm.config import VlmRecipe

LONG = "What colour is the square? " * 200
RULE = {"rule": "length", "most": 6, "unit": "words"}
EVALUATE = {"held_out": 0.4, "judges": [{"name": "text_rules", "options": {"rules": [RULE]}}], "attention": 0}


def of_rows(folder: Path, questions: dict[int, str], prepare: dict[str, Any]) -> dict[str, Any]:
    """A recipe of ten pairs about a picture each; ``questions`` are those that are other ones."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(10):
        Image.new("RGB", (32, 32), (20 * index, 60, 90)).save(folder / f"{index}.png")
        question = questions.get(index, "What colour is the square?")
        lines.append({"image": f"{index}.png", "prompt": question, "chosen": "The square is red.", "rejected": "There is one."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = {"source": "rows", "path": str(folder / "rows.jsonl")}
    return recipe(pairs=pairs, evaluate={**EVALUATE, "seeds_per_prompt": 2}, prepare=prepare)


@pytest.fixture(scope="module")
def aside(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The rows that are kept aside: their pictures decide, not their questions."""
    folder = tmp_path_factory.mktemp("short")
    asked = of_rows(folder / "data", {}, {})
    assert run(folder, "generate", asked) == 0
    found = split_pairs(VlmRecipe.model_validate(asked).evaluate, 3, PairStore(folder / "run" / "pairs"))[1]
    assert 2 <= len(found) <= 8
    return found


def test_a_long_question_kept_aside_stops_the_run_before_the_training(
    aside: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "align", of_rows(tmp_path / "data", {aside[1]: LONG}, {})) == 2
    said = capsys.readouterr().err
    assert f"1 of {len(aside)} prompts kept aside for the evaluation" in said and "prepare.on_long: drop" in said
    named = rf"pair 0*{aside[1]} \(rows\.jsonl line {aside[1] + 1}\): its prompt has \d+ tokens.*more than the model's \d+ pos"
    assert re.search(named, said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_long_question_kept_aside_is_left_out_of_the_evaluation_and_counted(
    aside: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = of_rows(tmp_path / "data", {aside[1]: LONG}, {"on_long": "drop"})
    assert run(tmp_path, "align", asked) == 0
    assert "and are left out of the evaluation" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["left_out"] == {"too_long": 1}
    assert len(found["items"]) == 2 * (len(aside) - 1)
    assert all(len(item["prompt"]) < 100 for item in found["items"])
    assert not (tmp_path / "run" / "left_out.json").exists(), "all pairs of the training fit"


def test_where_no_question_is_left_the_run_stops(aside: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = of_rows(tmp_path / "data", dict.fromkeys(aside, LONG), {"on_long": "drop"})
    assert run(tmp_path, "align", asked) == 2
    assert "give evaluate.prompts, since none is left" in capsys.readouterr().err


def test_a_long_question_of_a_file_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = of_rows(tmp_path / "data", {}, {"on_long": "drop"})
    lines = [{"image": "0.png", "prompt": "Is there a circle?"}, {"image": "1.png", "prompt": LONG}]
    file = tmp_path / "data" / "asked.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    asked["evaluate"] = {**EVALUATE, "prompts": {"file": str(file)}}
    assert run(tmp_path, "align", asked) == 2
    said = capsys.readouterr().err
    assert "1 of 2 prompts of evaluate.prompts leave no room" in said and "asked.jsonl line 3: its prompt has" in said
    assert "on_long" not in said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_places_are_those_of_the_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    assert visual_prompts.places(file, limit=2) == ["q.jsonl line 2", "q.jsonl line 4"]
    assert [one["prompt"] for one in visual_prompts.load_visual_prompts(file, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("section", "bad", "words"),
    [
        ({}, {"prompt": "What is it?"}, r"q\.jsonl line 3: there is no image.*take it out"),
        (
            {"chosen": "given"},
            {"image": "1.png", "prompt": "What is it?"},
            r"q\.jsonl line 3: chosen is None, and pairs\.re_al",
        ),
        (
            {},
            {"image": "99.png", "prompt": "What is it?"},
            r"line 3: .*there is no file '99\.png'.*Mend them, or take them out",
        ),
    ],
)
def test_re_align_names_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, Any], bad: dict[str, Any], words: str
) -> None:
    asked = of_rows(tmp_path / "data", {}, {})
    good = {"image": "0.png", "prompt": "What colour is it?", "chosen": "It is red."}
    file = tmp_path / "data" / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, (good, {**good, "image": "2.png"}, bad))) + "\n")
    pairs = {"source": "re_align", "prompts": {"file": str(file)}, "re_align": {"completion": "constrained", **section}}
    assert run(tmp_path, "generate", {**asked, "pairs": pairs}) == 2
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"source": "multi_image", "multi_image": {"world": "scenes", "count": 4}}, r"pairs\.multi_image\.on_bad_row: drop"),
        (
            {"source": "re_align", "prompts": {"world": "scenes", "count": 4}},
            "every question of pairs.prompts has to be usable",
        ),
        (
            {"source": "generate", "prompts": {"world": "scenes", "count": 4}, "judges": [{"name": "scenes"}]},
            "every question of pairs.prompts has to be usable",
        ),
    ],
)
def test_on_bad_row_is_refused_where_it_does_nothing(pairs: dict[str, Any], words: str) -> None:
    VlmRecipe.model_validate(recipe(pairs=pairs))
    with pytest.raises(ValueError, match=words):
        VlmRecipe.model_validate(recipe(pairs={**pairs, "on_bad_row": "drop"}))
