"""Statistics of a paired comparison: the same prompts and seeds, drawn by two models, scored by one judge.

Letters: N pairs of outputs, P prompts (clusters of pairs), R bootstrap resamples.

Every function is defined for every N >= 0 where a neutral answer exists: without a decided pair the rate is 0.5, its interval
[0, 1] and the p-value 1, which claims nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from polyalign.core.randomness import seed_of

Interval = tuple[float, float]

_CHUNK = 4_000_000
"""Bootstrap indices held at once (32 MB of int64)."""


@dataclass(frozen=True)
class WinRate:
    """Wins of the second model over the first. ``rate`` leaves ties out, ``rate_with_ties`` counts each as half a win."""

    wins: int
    losses: int
    ties: int
    rate: float
    wilson: Interval
    rate_with_ties: float
    bootstrap: Interval
    sign_test_p: float
    prompts: int
    """Different prompts (clusters) among the pairs."""

    @property
    def decided(self) -> int:
        return self.wins + self.losses

    def as_json(self) -> dict[str, Any]:
        """The ``win_rate`` block of evaluation.json."""
        return {
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "rate": self.rate,
            "wilson": list(self.wilson),
            "rate_with_ties": self.rate_with_ties,
            "bootstrap": list(self.bootstrap),
            "sign_test_p": self.sign_test_p,
            "prompts": self.prompts,
        }


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n);  half width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2).
    Unlike p +- z sqrt(p (1 - p) / n) it stays inside [0, 1] and keeps its coverage for few trials and extreme rates.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in 0..trials, found {successes} of {trials}")
    if trials == 0:
        return (0.0, 1.0)
    z = _normal_quantile(confidence)
    p = successes / trials
    shrink = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return (low, high)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test: the binomial probability of a split at least as uneven if a win were a fair coin."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def bootstrap_mean(
    values: Sequence[float],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, Interval]:
    """Mean and its percentile bootstrap interval; whole clusters (all samples of one prompt) are drawn together.

    mean* = sum over drawn clusters of their sums / sum over drawn clusters of their sizes. Draws are keyed by ``seed``.

    Raises:
        ValueError: no values, or as many clusters as values are not given.
    """
    means = resampled_means(values, seed=seed, clusters=clusters, resamples=resamples)
    return float(np.mean(np.asarray(values, dtype=np.float64))), percentile_interval(means, confidence)


def resampled_means(
    values: Sequence[float], *, seed: int, clusters: Sequence[Hashable] | None = None, resamples: int = 2000
) -> np.ndarray:
    """The bootstrap's means (R,) of which :func:`bootstrap_mean` takes the quantiles, for statistics of several means.

    Raises:
        ValueError: no values, or as many clusters as values are not given.
    """
    if len(values) == 0:
        raise ValueError("the mean of no values is not defined")
    sums, sizes = resampled_sums([values, [1.0] * len(values)], seed=seed, clusters=clusters, resamples=resamples)
    return sums / sizes


def resampled_sums(
    columns: Sequence[Sequence[float]], *, seed: int, clusters: Sequence[Hashable] | None = None, resamples: int = 2000
) -> np.ndarray:
    """(K, R) sums of K columns over R draws of whole clusters, the same for all columns: for statistics that are functions of
    sums, such as F1.

    Raises:
        ValueError: no rows, columns of different lengths, or as many clusters as rows are not given.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({len(array) for array in arrays}) != 1 or arrays[0].size == 0:
        raise ValueError(f"columns of one length above 0 are needed, found lengths {[len(array) for array in arrays]}")
    sums = [_by_cluster(array, clusters) for array in arrays]
    generator = np.random.default_rng(seed_of(seed, "bootstrap"))
    found = np.empty((len(sums), resamples))
    rows = max(1, _CHUNK // len(sums[0]))
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(sums[0]), size=(min(rows, resamples - start), len(sums[0])))
        for place, column in enumerate(sums):
            found[place, start : start + len(drawn)] = column[drawn].sum(axis=1)
    return found


def percentile_interval(resampled: np.ndarray, confidence: float = 0.95) -> Interval:
    """The interval that leaves the same share of resampled statistics out on both sides."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return (float(low), float(high))


def paired_win_rate(
    base: Sequence[float],
    aligned: Sequence[float],
    *,
    seed: int,
    prompts: Sequence[Hashable] | None = None,
    tie_margin: float = 0.0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> WinRate:
    """How often ``aligned[i]`` scores above ``base[i]``.

    Scores that differ by no more than ``tie_margin`` are a tie. The Wilson interval and the sign test look at decided pairs
    only and take them as independent; the bootstrap keeps ties (as 0.5) and resamples whole prompts, so that several seeds
    of one prompt do not count as independent evidence.

    Raises:
        ValueError: lengths differ.
    """
    if len(base) != len(aligned):
        raise ValueError(f"a paired comparison needs equally many scores, found {len(base)} and {len(aligned)}")
    gains = np.asarray(aligned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    wins, losses = int((gains > tie_margin).sum()), int((gains < -tie_margin).sum())
    ties = len(gains) - wins - losses
    mean, interval = 0.5, (0.0, 1.0)
    if len(gains):
        points = np.where(gains > tie_margin, 1.0, np.where(gains < -tie_margin, 0.0, 0.5))
        mean, interval = bootstrap_mean(
            points.tolist(), seed=seed, clusters=prompts, resamples=resamples, confidence=confidence
        )
    return WinRate(
        wins=wins,
        losses=losses,
        ties=ties,
        rate=wins / (wins + losses) if wins + losses else 0.5,
        wilson=wilson_interval(wins, wins + losses, confidence=confidence),
        rate_with_ties=mean,
        bootstrap=interval,
        sign_test_p=sign_test(wins, losses),
        prompts=len(gains) if prompts is None else len(set(prompts)),
    )


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _by_cluster(values: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """Sum of each cluster, in order of first appearance: (P,)."""
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise ValueError(f"every value needs its cluster, found {len(values)} values and {len(clusters)} clusters")
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(cluster, len(number)) for cluster in clusters])
    return np.bincount(index, weights=values)
