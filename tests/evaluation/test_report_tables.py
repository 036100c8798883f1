"""Tables that the makers of pairs write into pairs/summary.json, on the report's data card."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.tables import tables

TABLE = {
    "title": "What <b>became</b> of them",
    "note": "Kept & dropped.",
    "columns": ["kind", "how many", "share", "words"],
    "rows": [["two", 1200, 0.93821, "a"], ["three", None, 1.0, None]],
}


def test_cells_and_words() -> None:
    tree = ElementTree.fromstring(f"<div>{tables([TABLE])}</div>")
    assert "".join(next(tree.iter("h3")).itertext()) == TABLE["title"]
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows == [TABLE["columns"], ["two", "1,200", "0.938", "a"], ["three", "\u2013", "1", "\u2013"]]
    numeric = [cell.get("class") for cell in next(tree.iter("tr"))]
    assert [kind == "num" for kind in numeric] == [False, True, True, False]
    assert "Kept & dropped." in "".join(tree.itertext())


def test_nothing_to_show() -> None:
    assert tables(None) == tables([]) == tables("x") == tables([{**TABLE, "rows": []}]) == ""


@pytest.mark.parametrize(
    "wrong",
    [3, {"title": "x"}, {**TABLE, "rows": [["too", "few"]]}, {**TABLE, "columns": [], "rows": []}, {**TABLE, "rows": [3]}],
)
def test_what_is_no_table_is_said_and_the_others_shown(wrong: Any) -> None:
    shown = tables([wrong, TABLE])
    assert shown.count("cannot be read") == 1 and "1,200" in shown


def card(run: Path, **summary: Any) -> str:
    file = run / "pairs" / "summary.json"
    file.write_text(json.dumps(summary))
    page = write_report(run).read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n")
    (found,) = [node for node in ElementTree.fromstring(page).iter("section") if node.get("id") == "data"]
    return "".join(found.itertext())


def test_the_data_card_has_the_tables_and_no_histogram_of_what_nobody_scored(make_run: Any) -> None:
    run, counts = make_run(count=24), {"prompts": 4, "pairs": 3}
    without = card(run, **counts, tables=[TABLE])
    assert "What <b>became</b> of them" in without and "istogram" not in without and "Scores of all samples" not in without
    judge = {"name": "user", "version": "1"}
    assert "istogram" not in card(run, **counts, judge=judge, score_histogram={"edges": [], "counts": []})
    assert "No histogram of scores was recorded" in card(run, **counts, judge=judge)
    drawn = card(run, **counts, judge=judge, score_histogram={"edges": [0.0, 0.5, 1.0], "counts": [2, 4]})
    assert "Scores of all samples" in drawn
