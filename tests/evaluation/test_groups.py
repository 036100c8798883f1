"""Shares of right answers by group, with paired intervals of the difference to the base."""

import pytest

from polyalign.evaluation.groups import as_text, grouped
from polyalign.evaluation.statistics import wilson_interval

GROUPS = ["2 pictures"] * 4 + ["10 pictures"] * 4
BASE = [1, 0, -1, 0, 1, 1, -1, -1]
BETTER = [1, 1, 1, 0, 1, 1, 0, -1]


def test_counts_shares_and_differences_by_hand() -> None:
    found = grouped(BASE, {"aligned": BETTER, "dpo": BASE}, GROUPS, seed=3, broken_below=0.0)
    assert list(found) == ["2 pictures", "10 pictures", "all"] and list(found["all"]) == ["base", "aligned", "dpo"]
    two = found["2 pictures"]
    assert (two["base"]["right"], two["base"]["of"], two["base"]["share"]) == (1, 4, 0.25)
    assert (two["aligned"]["right"], two["aligned"]["against_base"]["difference"]) == (3, 0.5)
    assert two["base"]["interval"] == list(wilson_interval(1, 4)) and "against_base" not in two["base"]
    assert two["aligned"]["broken"]["count"] == 0 and two["base"]["broken"]["share"] == 0.25
    assert two["aligned"]["broken"]["against_base"]["difference"] == -0.25
    assert found["all"]["aligned"]["right"] == 5 and found["all"]["aligned"]["of"] == 8
    assert found["all"]["dpo"]["against_base"] == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_intervals_are_paired_and_draw_whole_clusters() -> None:
    base = [1.0, 0.0] * 200
    always_better = [1.0, 1.0] * 200  # every second question is gained, none is lost
    found = grouped(base, {"aligned": always_better}, ["a"] * 400, seed=1)
    assert list(found) == ["a"]
    against = found["a"]["aligned"]["against_base"]
    assert against["difference"] == 0.5 and 0.44 < against["low"] < 0.5 < against["high"] < 0.56
    together = grouped(base, {"aligned": always_better}, ["a"] * 400, seed=1, clusters=[n // 2 for n in range(400)])
    assert together["a"]["aligned"]["against_base"] == {"difference": 0.5, "low": 0.5, "high": 0.5}
    assert found == grouped(base, {"aligned": always_better}, ["a"] * 400, seed=1)


def test_the_text_says_every_figure() -> None:
    text = as_text(grouped(BASE, {"aligned": BETTER}, GROUPS, seed=3, broken_below=0.0), broken="hallucinated")
    line = next(line for line in text.splitlines() if line.startswith("2 pictures") and "aligned" in line)
    assert "75.0 % of 4 (+50.0 [" in line and "hallucinated 0.0 % of 4 (-25.0 [" in line
    assert len(text.splitlines()) == 1 + 3 * 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths"):
        grouped(BASE, {"aligned": BETTER[1:]}, GROUPS, seed=0)
    with pytest.raises(ValueError, match="lengths"):
        grouped([], {}, [], seed=0)
    with pytest.raises(ValueError, match="call it otherwise"):
        grouped(BASE, {"base": BETTER}, GROUPS, seed=0)
    with pytest.raises(ValueError, match="call it otherwise"):
        grouped(BASE, {}, ["all", *GROUPS[1:]], seed=0)
