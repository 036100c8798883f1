"""What makers of pairs tell the report and the diagnosis: tables, and how pairs were drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polyalign.evaluation.diagnose import diagnose
from polyalign.evaluation.report.tables import tables
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.data_card import table_of_losers, tables_of_re_align
from polyalign.modalities.vlm.mia_dpo import MiaDpo
from polyalign.modalities.vlm.mia_dpo_config import MultiImageConfig
from polyalign.modalities.vlm.negative_config import NegativesConfig
from polyalign.modalities.vlm.pairs import make_pairs, with_losers
from polyalign.modalities.vlm.settings import VlmModelSettings

QUESTIONS = 140


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Run folders with the pairs of the same questions about four pictures, balanced and of mistakes only."""
    adapter = VlmAdapter(VlmModelSettings("tiny", device="cpu", max_new_tokens=16, sample_batch=64))
    model, found = adapter.load(), {}
    for balance in (True, False):
        filters = {"perplexity": None, "attention": None}
        given = {"world": "scenes", "count": QUESTIONS, "formats": {"sequence": {4: 1}}, "balance": balance, "filter": filters}
        maker = MiaDpo(adapter, model, None, MultiImageConfig.model_validate(given), seed=1)
        found[balance] = tmp_path_factory.mktemp("run")
        make_pairs(maker, model, folder=found[balance] / "pairs", seed=1, settings={}, questions_per_shard=QUESTIONS)
    return found


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "pairs" / "summary.json").read_text())


def test_the_tables_say_what_the_summary_says(runs: dict[bool, Path]) -> None:
    summary = summary_of(runs[True])
    audit, kinds, ratio = summary["tables"]
    assert audit["rows"][0] == ["before the filters", summary["audit"]["mistakes"]["pairs"], None, *audit["rows"][0][3:]]
    assert audit["rows"][-1][1::2] == [summary["audit"][part]["kept"] for part in ("mistakes", "balanced")]
    of_filters = {row[0]: row for row in audit["rows"][1:-1]}
    assert of_filters["edit distance"][1] == summary["audit"]["mistakes"]["dropped"]["edit_distance"]
    assert [sum(row[place] for row in audit["rows"][1:]) for place in (1, 3)] == audit["rows"][0][1::2]
    (row,) = [row for row in kinds["rows"] if row[0] == "sequence 4"]
    assert row[1:3] == [QUESTIONS, summary["kinds"]["sequence 4"]["accuracy"]]
    layer = str(summary["layer"])
    assert ratio["rows"][0][1:3] == [summary["auc"][layer], summary["auc_error"][layer]]
    shown = tables(summary["tables"])
    assert shown.count("<table") == 3 and "cannot be read" not in shown


def test_mistakes_only_are_diagnosed_and_balanced_pairs_are_not(runs: dict[bool, Path]) -> None:
    few, many = summary_of(runs[False])["selection"], summary_of(runs[True])["selection"]
    assert few["right"] == many["right"] and few["pairs_of_right"] == 0 < many["pairs_of_right"]
    assert few["words"]["distance"] > many["words"]["distance"] and few["pairs"] >= 20
    found = diagnose(runs[False])
    assert (found.state, found.cause) == ("pairs drawn only from failures", "pairs from failures only")
    assert f"of all {QUESTIONS} right" in found.evidence
    assert "There are no balanced pairs" in summary_of(runs[False])["tables"][0]["note"]
    causes = {one.cause: one.holds for one in diagnose(runs[True]).asked}
    assert causes["pairs from failures only"] is causes["selected answers"] is False


def test_losers_are_told_once(runs: dict[bool, Path], tmp_path: Path) -> None:
    for _ in range(2):
        with_losers(runs[False] / "pairs", tmp_path / "pairs", NegativesConfig(context=True), seed=0)
    before, after = summary_of(runs[False]), summary_of(tmp_path)
    (table,) = after["tables"][len(before["tables"]) :]
    assert table["rows"] == [["context", before["pairs"], "the whole question of another pair"]]


def test_re_align_by_hand() -> None:
    counts = {"asked": 10, "empty": 1, "nothing_to_mask": 2, "exhausted": 3, "kept": 4, "tried": 20, "unfilled": 5}
    means = {"mean_rank": 1.5, "mean_similarity": 0.7, "gaps_of_a_pair": 2.0, "similarity": "words", "encoder": "tower"}
    became, rejected, ranks = tables_of_re_align({**counts, **means, "ranks": {"1": 3, "3": 1}})
    assert [row[1:] for row in became["rows"]] == [[10, 1.0], [4, 0.4], [3, 0.3], [2, 0.2], [1, 0.1]]
    assert "20 completions" in became["note"] and "words" in rejected["note"] and "tower" in rejected["note"]
    assert ranks["rows"] == [["1", 3, 0.75], ["3", 1, 1.0]]
    none = tables_of_re_align({**dict.fromkeys(counts, 0), "similarity": None, "encoder": None})
    assert len(none) == 1 and none[0]["rows"][0] == ["asked", 0, None]
    assert tables([became, rejected, ranks, *none]).count("<table") == 4


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({}, "diffused, step 700 of 1000"),
        ({"kind": "cropped"}, "at most 320 x 240"),
        ({"kind": "cropped", "area": 0.2}, "cropped to 20%"),
        ({"kind": "rotated"}, "10 to 80 degrees"),
        ({"kind": "blanked"}, "one colour"),
        ({"kind": "swapped"}, "another pair's"),
    ],
)
def test_losing_pictures_in_words(image: dict[str, Any], says: str) -> None:
    rows = table_of_losers(NegativesConfig.model_validate({"image": image, "context": True}), 7)["rows"]
    assert [row[:2] for row in rows] == [["picture", 7], ["context", 7]] and says in rows[0][2]
    assert len(table_of_losers(NegativesConfig(context=True), 7)["rows"]) == 1
