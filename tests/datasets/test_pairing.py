"""Scores to pairs: margins, ties, duplicates, order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyalign.datasets.pairing import Pair, histogram, pair_up


def test_best_against_worst():
    result = pair_up([0.2, 0.9, -0.5, 0.9])
    assert result.pairs == (Pair(1, 2, pytest.approx(1.4)),)  # of two equal best ones the first
    assert (result.ties_dropped, result.below_margin, result.duplicates_dropped) == (0, 0, 0)


def test_all_pairs_by_difference_then_position():
    result = pair_up([1.0, 0.0, 0.0, 3.0], mode="all_pairs")
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [(3, 1), (3, 2), (3, 0), (0, 1), (0, 2)]
    assert result.ties_dropped == 1
    limited = pair_up([1.0, 0.0, 0.0, 3.0], mode="all_pairs", max_pairs=2)
    assert limited.pairs == result.pairs[:2]
    assert limited.over_limit == 3


def test_a_difference_equal_to_the_margin_is_not_enough():
    assert pair_up([1.0, 0.5], margin=0.5).pairs == ()
    assert pair_up([1.0, 0.5], margin=0.5).below_margin == 1
    assert len(pair_up([1.0, 0.5], margin=0.49).pairs) == 1


def test_ties_are_counted_as_ties_whatever_the_margin():
    for margin in (0.0, 0.5):
        result = pair_up([0.5, 0.5], margin=margin)
        assert (result.pairs, result.ties_dropped, result.below_margin) == ((), 1, 0)


def test_identical_outputs_take_part_once():
    result = pair_up([1.0, 1.0, 0.0], mode="all_pairs", identities=["a", "a", "b"])
    assert result.pairs == (Pair(0, 2, 1.0),)
    assert (result.duplicates_dropped, result.ties_dropped) == (1, 0)
    alone = pair_up([1.0, 1.0], identities=["a", "a"])
    assert (alone.pairs, alone.duplicates_dropped, alone.ties_dropped) == ((), 1, 0)


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_fewer_than_two_samples_make_no_pair(scores):
    assert pair_up(scores).pairs == ()
    assert pair_up(scores, mode="all_pairs").pairs == ()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="finite"):
        pair_up([1.0, float("nan")])
    with pytest.raises(ValueError, match="margin"):
        pair_up([1.0, 0.0], margin=-0.1)
    with pytest.raises(ValueError, match="mode"):
        pair_up([1.0, 0.0], mode="worst_best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="identities"):
        pair_up([1.0, 0.0], identities=["a"])


@given(
    st.lists(st.integers(-3, 3).map(float), max_size=7),
    st.sampled_from(["best_worst", "all_pairs"]),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_every_comparison_is_accounted_for(scores, mode, margin):
    result = pair_up(scores, mode=mode, margin=margin)
    comparisons = len(scores) * (len(scores) - 1) // 2 if mode == "all_pairs" else int(len(scores) > 1)
    assert len(result.pairs) + result.ties_dropped + result.below_margin == comparisons
    for pair in result.pairs:
        assert pair.difference == scores[pair.chosen] - scores[pair.rejected] > margin
    assert result == pair_up(scores, mode=mode, margin=margin)


def test_the_first_two_as_they_were_drawn():
    assert pair_up([0.1, 0.7, 0.9], mode="first_second").pairs == (Pair(1, 0, 0.7 - 0.1),)
    assert pair_up([0.1, 0.7, 0.9], mode="first_second", identities=["a", "a", "b"]).pairs == (Pair(2, 0, 0.9 - 0.1),)
    assert pair_up([0.1], mode="first_second").pairs == ()


def test_the_best_with_each_of_the_others():
    paired = pair_up([1.0, 3.0, 2.0, 3.0], mode="best_rest")
    assert paired.pairs == (Pair(1, 0, 2.0), Pair(1, 2, 1.0)) and paired.ties_dropped == 1
    kept = pair_up([1.0, 3.0, 2.0, 3.0], mode="best_rest", ties="keep")
    assert kept.pairs == (*paired.pairs, Pair(1, 3, 0.0)) and kept.ties_dropped == 0


def test_ties_that_are_kept_pass_the_margin():
    paired = pair_up([1.0, 1.0, 1.5], mode="all_pairs", margin=1.0, ties="keep")
    assert paired.pairs == (Pair(0, 1, 0.0),) and paired.below_margin == 2 and paired.ties_dropped == 0


def test_histogram_counts_every_score_once():
    bars = histogram([0.0, 0.1, 0.5, 1.0, 1.0], bins=10)
    assert bars["edges"][0] == 0.0 and bars["edges"][-1] == 1.0 and len(bars["edges"]) == 11
    assert bars["counts"] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert histogram([2.0, 2.0]) == {"edges": [1.5, 2.5], "counts": [2]}
    assert histogram([]) == {"edges": [], "counts": []}
