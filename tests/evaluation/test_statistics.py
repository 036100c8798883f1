"""Checked against numbers worked out by hand; no other statistics package is asked."""

import math

import pytest

from polyalign.evaluation.statistics import bootstrap_mean, paired_win_rate, sign_test, wilson_interval


def test_wilson_interval_by_hand():
    # n = 10, p = 0.8, z = 1.959964: shrink 1.3841459, centre (0.8 + 0.1920729) / 1.3841459 = 0.7167399,
    # half 1.959964 / 1.3841459 * sqrt(0.016 + 0.0096036) = 0.2265770
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)


def test_wilson_interval_at_the_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(4, 4)  # no failure: low = n / (n + z^2) = 4 / 7.841459, high = 1
    assert (low, high) == (pytest.approx(4 / 7.841459, abs=1e-6), 1.0)
    assert wilson_interval(0, 4) == (0.0, pytest.approx(1 - 4 / 7.841459, abs=1e-6))
    with pytest.raises(ValueError, match="0..trials"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=1.0)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (4, 0, 2 / 16),
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (0, 0, 1.0),
        (44, 1, 2 * (1 + 45) / 2**45),
    ],
)
def test_sign_test_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-12)
    assert sign_test(losses, wins) == pytest.approx(p, rel=1e-12)


def test_win_rate_counts_and_rates():
    result = paired_win_rate([0, 0, 0, 1, 1], [1, 1, 0, 1, 0], seed=0)
    assert (result.wins, result.losses, result.ties, result.decided) == (2, 1, 2, 3)
    assert result.rate == 2 / 3
    assert result.rate_with_ties == (2 + 1) / 5
    assert result.bootstrap[0] <= result.rate_with_ties <= result.bootstrap[1]


def test_the_tie_margin_is_inclusive():
    assert paired_win_rate([0.0, 0.0], [0.25, 0.5], seed=0, tie_margin=0.25).ties == 1


def test_swapping_the_sides_mirrors_everything():
    base, aligned = [0, 1, 0, 0, 1, 0.5], [1, 0, 1, 0, 1, 1]
    one, other = paired_win_rate(base, aligned, seed=3), paired_win_rate(aligned, base, seed=3)
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.wilson == pytest.approx([1 - v for v in reversed(other.wilson)])
    assert one.bootstrap == pytest.approx([1 - v for v in reversed(other.bootstrap)])
    assert one.sign_test_p == other.sign_test_p


def test_nothing_decided_claims_nothing():
    for scores in ([], [1.0, 1.0, 1.0]):
        result = paired_win_rate(scores, scores, seed=0)
        assert (result.rate, result.rate_with_ties, result.wilson, result.sign_test_p) == (0.5, 0.5, (0.0, 1.0), 1.0)
    assert paired_win_rate([], [], seed=0).bootstrap == (0.0, 1.0)
    assert paired_win_rate([1.0], [1.0], seed=0).bootstrap == (0.5, 0.5)
    with pytest.raises(ValueError, match="equally many"):
        paired_win_rate([1.0], [], seed=0)


def test_bootstrap_is_keyed_and_near_the_normal_interval():
    values = [1.0] * 60 + [0.0] * 40
    mean, interval = bootstrap_mean(values, seed=5)
    assert mean == 0.6
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)  # 0.096
    assert interval == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)
    assert bootstrap_mean(values, seed=5)[1] == interval
    assert bootstrap_mean(values, seed=6)[1] != interval or bootstrap_mean(values, seed=7)[1] != interval


def test_seeds_of_one_prompt_are_no_independent_evidence():
    values, prompts = [1.0] * 50 + [0.0] * 50, [f"prompt {i // 10}" for i in range(100)]
    alone = bootstrap_mean(values, seed=1)[1]
    together = bootstrap_mean(values, seed=1, clusters=prompts)[1]
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])  # sqrt(10) times as wide
    with pytest.raises(ValueError, match="every value needs its cluster"):
        bootstrap_mean([1.0], seed=0, clusters=[])
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], seed=0)
