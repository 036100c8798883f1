"""A benchmark answered with a base and a LoRA: from its own files to figures, by the two commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.datasets.worlds.scenes_rows import write_benchmarks
from polyalign.evaluation.vlm import score
from polyalign.modalities.vlm import answer
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.answer import CAPTION, CHOICE, read_questions
from polyalign.modalities.vlm.settings import VlmModelSettings

PICTURES = 4


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE's and CHAIR's folders of the world, and their questions."""
    folder = write_benchmarks(tmp_path_factory.mktemp("benchmarks"), "heldout", PICTURES, seed=1)
    for name in ("pope", "chair"):
        files = ["--files", str(folder / name), "--questions", str(folder / f"{name}.jsonl")]
        assert score.main([name, *files]) == 0
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded base that changes answers."""
    adapter = VlmAdapter(VlmModelSettings("tiny", device="cpu", rank=4))
    model = adapter.trainable(adapter.load())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapter.export(model, folder)
    return folder


def answered(folder: Path, name: str, out: Path, *more: str) -> int:
    command = [str(folder / f"{name}.jsonl"), "--pictures", str(folder / name), "--out", str(out), "--device", "cpu"]
    return answer.main([*command, "--max-new-tokens", "24", "--batch-size", "2", *more])


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_from_a_benchmark_to_figures(benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count, figure, least in (("pope", 4 * PICTURES, "accuracy", 0.5), ("chair", PICTURES, "recall", 0.5)):
        out = tmp_path / f"{name}.jsonl"
        assert answered(benchmarks, name, out) == 0
        assert f"{count} answers, {count} of them new" in capsys.readouterr().out
        files = ["--files", str(benchmarks / name), "--answers", str(out), "--out", str(tmp_path / f"{name}.json")]
        assert score.main([name, *files]) == 0
        figures = json.loads((tmp_path / f"{name}.json").read_text())["figures"]
        assert figures["all"][figure]["value"] > least, "the embedded base knows its world"


def test_an_interrupted_command_goes_on_to_the_same_answers(benchmarks: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sampled = ("--temperature", "1.0", "--seed", "3")
    assert answered(benchmarks, "pope", whole, *sampled) == answered(benchmarks, "pope", cut, *sampled) == 0
    kept = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(kept[:5]) + kept[5][:9])
    assert answered(benchmarks, "pope", cut, *sampled) == 0
    assert cut.read_text() == whole.read_text() and [one["id"] for one in lines(whole)][0] == "random/1"


def test_the_lora_answers_and_answers_are_not_mixed(
    benchmarks: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tmp_path / "base.jsonl", tmp_path / "tuned.jsonl"
    assert answered(benchmarks, "chair", base) == answered(benchmarks, "chair", tuned, "--adapter", str(lora)) == 0
    assert [one["id"] for one in lines(base)] == [one["id"] for one in lines(tuned)] and lines(base) != lines(tuned)
    before = base.read_text()
    assert answered(benchmarks, "chair", base, "--adapter", str(lora)) == 2
    assert "made with something else" in capsys.readouterr().err and base.read_text() == before
    made = json.loads((tmp_path / "tuned.jsonl.made.json").read_text())
    assert made["adapter"] and made["model"].startswith("polyalign-tiny-vlm@") and made["words"]["prompt"] == CAPTION
    assert answered(benchmarks, "chair", tmp_path / "new.jsonl", "--adapter", str(tmp_path)) == 2
    assert answered(benchmarks, "chair", tmp_path / "new.jsonl", "--adapter", str(tmp_path / "none")) == 2
    assert "there is no LoRA folder" in capsys.readouterr().err


# --- questions ---------------------------------------------------------------------------------------------------------------


def questions(folder: Path, *rows: Any, **more: Any) -> list[answer.Asked]:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(folder / "questions.jsonl", **more)


def test_words_of_questions(benchmarks: Path, tmp_path: Path) -> None:
    options = {"id": 3, "question": "Which?", "options": {"A": "red", "B": "blue"}, "images": []}
    found = questions(tmp_path, {"id": "a"}, {"id": "b", "question": " What? "}, options, suffix="Be brief.")
    assert [one.words for one in found] == [
        f"{CAPTION}\nBe brief.",
        "What?\nBe brief.",
        f"Which?\nA. red\nB. blue\n{CHOICE}\nBe brief.",
    ]
    assert [one.name for one in found] == ["a", "b", "3"] and found[0].pictures == ()
    (of_coco,) = questions(tmp_path, {"id": 0, "images": [0]}, pictures=benchmarks / "pope", file_name="{:0>5}.png")
    assert of_coco.pictures[0].name == "00000.png"


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([{"question": "?"}], {}, "has no 'id'"),
        ([{"id": "a"}, {"id": "a"}], {}, "a second time"),
        ([{"id": "a", "images": ["none.png"]}], {}, "no file 'none.png'.*--pictures"),
        ([{"id": "a", "images": ["../../etc/passwd"]}], {}, "outside of the data's folder"),
        ([{"id": "a", "images": ["/etc/passwd"]}], {}, "outside of the data's folder"),
        ([{"id": "a", "images": "x.png"}], {}, "a list of names"),
        ([{"id": "a", "images": ["x"]}], {"file_name": "{} {}"}, "needs one place for the name"),
        ([{"id": "a", "options": ["red"]}], {}, "texts by letter"),
    ],
)
def test_wrong_questions(tmp_path: Path, rows: list[Any], more: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        questions(tmp_path, *rows, **more)


def test_a_picture_that_does_not_decode_names_its_question(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (one,) = questions(tmp_path, {"id": "a", "images": ["broken.png"]})
    with pytest.raises(UserError, match=r"question a: .*broken\.png"):
        answer._condition(one)
