"""The report of questions about pictures: pictures, answers of every model, attention, groups, pairs with losing pictures."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.pictured import attention_file, key_of, picture_file, verdict
from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.collect import collect, read_pair_examples
from polyalign.evaluation.report.questions import labels_of, looks, names_of, words_of
from polyalign.evaluation.report.tallies import tallies

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the helpers lie beside the tests, which are no package

from pictured_run import EVIL, LOOKED_AT, write_run  # noqa: E402  # pyright: ignore[reportMissingImports]

EACH = 8


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pictured") / "run", EACH)


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def test_items_say_where_the_pictures_lie_and_what_every_model_said(run: Path) -> None:
    report = evaluation(run)
    assert report["judge"]["broken_word"] == "hallucinated" and report["prompts"] == 4 * EACH, "pictures tell questions apart"
    item = report["items"][EACH + 1]
    assert item["images"] == [picture_file(EACH + 1, number) for number in range(3)] and (run / item["images"][2]).is_file()
    assert item["layout"]["format"] == "sequence" and item["attention"] == attention_file(EACH + 1)
    assert set(item["verdicts"]) == {"base", "aligned", "sft"} and set(item["arms"]) == {"sft"}
    for one in report["items"]:
        assert one["verdicts"]["base"] == verdict(one["base_score"], report["judge"])
        assert one["verdicts"]["sft"] == {1.0: "right", 0.0: "wrong", -1.0: "hallucinated"}[one["arms"]["sft"]["score"]]


def test_questions_without_pictures_have_no_more_than_before() -> None:
    class Length:
        name, version = "length", "1"

        def score(self, conditions: Any, outputs: Any) -> list[float]:
            return [float(len(output)) for output in outputs]

    made = evaluate_paired(["a"], ["bb"], [{"prompt": "p"}], [0], [Length()], seed=0, arms={"sft": ["c"]})
    assert set(made["items"][0]) == {"prompt", "seed", "task", "base_score", "aligned_score", "base_text", "aligned_text"}
    assert verdict(1.0, made["judge"]) is None


def test_a_condition_is_its_prompt_and_its_pictures() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    keys = [key_of({"prompt": "p", "images": images}) for images in ([red], [blue], [red, blue], [blue, red], [])]
    assert len(set(keys)) == 5 and keys[0] == key_of({"prompt": "p", "images": [red.copy()]})
    assert key_of({"prompt": "p", "images": [{"bytes": b"x", "path": None}]}) == key_of({"prompt": "p", "images": [b"x"]})


def test_the_page_shows_pictures_answers_verdicts_and_attention(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    grid = page[page.index('id="grid"') : page.index('id="worst"')]
    assert grid.count("<li class=") == 4 * EACH and grid.count('class="sides told"') == 4 * EACH
    assert grid.count('class="looks"') == LOOKED_AT + 1 and grid.count('class="shade"') == 2 * (2 * LOOKED_AT + 1)
    alone = grid.count(">the picture<")
    assert alone == EACH and grid.count(">a collage of 4 pictures<") == EACH + 2
    assert grid.count(">Image3<") == EACH and "Each with its pictures, the answers of every model" in grid
    counts = {word: grid.count(f'">{word}</span>') for word in ("right", "wrong", "hallucinated")}
    assert sum(counts.values()) == 3 * 4 * EACH and counts["right"] == grid.count('<div class="answer good"')
    assert "90 % on what is asked about (evenly 50 %)" in grid and "on what is asked about (evenly 25 %)" not in grid
    assert EVIL not in page and "alert(1)" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and " style=" not in page
    assert "Outputs that the judge calls hallucinated:" in page


def test_pairs_show_their_pictures_and_the_losing_ones(run: Path) -> None:
    examples = read_pair_examples(run / "pairs", [])
    assert [len(example.images) for example in examples] == [2, 2, 3, 3, 1, 1, 1, 1]
    assert [len(example.losing_images) for example in examples] == [2, 0, 0, 3, 0, 0, 1, 0]
    assert examples[4].layout["format"] == "grid" and isinstance(examples[0].chosen, str)
    assert collect(run).outputs == "text"
    page = write_report(run).read_text(encoding="utf-8")
    card = page[page.index('id="data"') : page.index('id="recipe"')]
    assert card.count("Losing pictures, under which the chosen answer is to be less likely") == 3
    assert (
        card.count('class="strip"') == 8 + 3 and card.count(">Image3, losing<") == 1 and 'class="cards texts pictured"' in card
    )


def test_attention_to_what_is_asked_about(run: Path) -> None:
    items = evaluation(run)["items"]
    row, collage = looks(run, items[0]), looks(run, items[2 * EACH])
    assert list(row) == ["base", "aligned"] and len(row["base"].shades) == 2 and len(collage["base"].shades) == 1
    assert row["base"].even == 0.5
    whole = json.loads((run / attention_file(0)).read_text())["models"]["base"]["images"]
    sums = [np.array(one["map"]).sum() for one in whole]
    target = items[0]["layout"]["targets"][0]
    assert row["base"].share == pytest.approx(sums[target] / sum(sums))
    aligned = row["aligned"].share
    assert aligned is not None and aligned == pytest.approx(0.9, abs=0.02)
    assert collage["aligned"].even == pytest.approx(0.23, abs=0.03), "a cell of four, without the strip of names"
    assert collage["aligned"].share is not None and collage["aligned"].share > 0.6
    assert looks(run, items[3 * EACH]) == {}, "nothing was kept"
    assert len(names_of(run, items[:1])) == 3 * 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"models": 3}',
        '{"models": {"base": {"images": [{"map": [[1, 2], [3]]}, {"map": [[1]]}]}}}',
        '{"models": {"base": {"images": [{"map": [[1, -1]]}, {"map": [[1, 1]]}]}}}',
        '{"models": {"base": {"images": [{"map": [[1, NaN]]}, {"map": [[1, 1]]}]}}}',
        '{"models": {"base": {"images": [{"map": [[1, 1]]}]}}}',
        '{"models": {"base": {"images": [{"nothing": 1}, 2]}}}',
    ],
)
def test_attention_that_is_not_whole_is_left_out(run: Path, content: str) -> None:
    (run / attention_file(0)).write_text(content)
    assert looks(run, evaluation(run)["items"][0]) == {}


def test_files_outside_the_run_are_not_opened_and_absent_ones_named(run: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(run.parent / "secret.png")
    (run.parent / "secret.json").write_text((run / attention_file(0)).read_text())
    report = evaluation(run)
    report["items"][0] |= {"images": ["../secret.png", "samples/absent.png"], "attention": "../secret.json"}
    (run / "evaluation.json").write_text(json.dumps(report))
    page = write_report(run).read_text(encoding="utf-8")
    assert "no picture" in page and "2 pictures are missing or unreadable" in page
    assert looks(run, report["items"][0]) == {}


def test_attention_has_a_section_with_the_questions_that_no_other_shows(run: Path) -> None:
    (run / "config.yaml").write_text("modality: vlm\nreport: {grid: 3}\n")
    page = write_report(run).read_text(encoding="utf-8")
    section = page[page.index('<section id="looks"') : page.index('<section id="worst"')]
    grid = page[page.index('<section id="grid"') : page.index('<section id="looks"')]
    assert grid.count("<li class=") == 3
    assert section.count("<li class=") + grid.count('class="looks"') == LOOKED_AT + 1
    assert f"the mean over {LOOKED_AT + 1} questions" in section and '<span class="badge good">+' in section
    shares = [[look.share for look in looks(run, item).values()] for item in evaluation(run)["items"] if looks(run, item)]
    base, aligned = (100 * float(np.mean(column)) for column in zip(*shares, strict=True))
    assert f"<b>{base:.1f} %</b>" in section and f"<b>{aligned:.1f} %</b>" in section
    shutil.rmtree(run / "samples" / "attention")
    assert 'id="looks"' not in write_report(run).read_text(encoding="utf-8")


def test_very_tall_pictures_and_only_these_have_a_height_of_their_own(run: Path) -> None:
    item = evaluation(run)["items"][0]
    Image.new("RGB", (20, 300), "white").save(run / item["images"][0])
    Image.new("RGB", (100, 200), "white").save(run / item["images"][1])
    page = write_report(run).read_text()
    tall = re.findall(r'<img class="([a-z ]*)"[^>]*width="(\d+)" height="(\d+)"', page)
    found = {(kinds, width, height) for kinds, width, height in tall if "tall" in kinds.split()}
    assert found == {("tall", "17", "256")}
    assert ".strip img.tall { height: 256px; width: auto;" in page and "outline: 1px solid" in page


def test_pictures_can_be_left_out_of_the_file(run: Path) -> None:
    (run / "config.yaml").write_text("modality: vlm\nreport: {embed_images: false}\n")
    page = write_report(run).read_text(encoding="utf-8")
    grid = page[page.index('id="grid"') : page.index('id="worst"')]
    assert "asks for no pictures in this file" in grid and "samples/conditions" not in grid and 'class="strip"' in grid


def test_groups_by_hand() -> None:
    def share(of: float, **more: Any) -> dict[str, Any]:
        return {"right": 1, "of": 4, "share": of, "interval": [0.1, 0.9], **more}

    up = {"against_base": {"difference": 0.25, "low": 0.05, "high": 0.45}}
    block = {
        "2 <b>": {
            "base": share(0.25, broken=share(0.5)),
            "aligned": share(0.5, broken=share(0.75, **up), **up),
        }
    }
    made = tallies({"groups": {"By number": block}, "judge": {"broken_word": "hallucinated"}})
    assert "<h3><bdi>By number</bdi></h3>" in made and "2 &lt;b&gt;" in made and "hallucinated answers" in made
    assert "<b>50.0 %</b>" in made and '<span class="badge good">+25.0 [+5.0, +45.0]</span>' in made
    assert made.count('<span class="badge bad">+25.0') == 1, "more hallucinations are worse"
    assert tallies({}) == ""


def test_groups_of_a_run_and_groups_that_are_none(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "Right answers by group" in page and "By number of pictures" in page and "hallucinated answers" in page
    report = evaluation(run)
    report["groups"] = {"By number": {"2": {"base": {"share": "half"}}}}
    (run / "evaluation.json").write_text(json.dumps(report))
    assert any("groups.By number" in line for line in collect(run).missing)


def test_lines_that_only_name_pictures_are_not_said_twice() -> None:
    prompt = "Image1:\nImage2: \nIn Image2, what? Image1: no"
    assert words_of({"prompt": prompt, "images": ["a", "b"]}) == "In Image2, what? Image1: no"
    assert words_of({"prompt": prompt, "images": ["a"]}) == prompt


def test_what_pictures_are_called() -> None:
    assert labels_of(2, None) == ["Image1", "Image2"] and labels_of(1, {}) == ["the picture"] and labels_of(0, None) == []
    assert labels_of(1, {"format": "picture_in_picture", "places": [1, 2]}) == ["a picture in a picture"]
    assert labels_of(1, {"format": "grid", "places": "broken"}) == ["a collage of several pictures"]
