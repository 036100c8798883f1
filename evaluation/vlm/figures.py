"""Figures of a benchmark with their 95 % intervals: functions of sums, resampled by whole images (or whatever is one draw).

Letters: N rows (questions, captions), R bootstrap resamples.

Accuracy, precision, F1 or corpus BLEU are all functions of a few sums over the rows, so one bootstrap of these sums serves them
together. Where nothing varies (every answer right), a bootstrap has no width; a share then takes Wilson's interval over the
clusters. With fewer than two clusters there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyalign.core.randomness import seed_of
from polyalign.evaluation.statistics import Interval, percentile_interval, resampled_sums, wilson_interval

Sums = Mapping[str, np.ndarray]
Formula = Callable[[Sums], np.ndarray]
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A part over its whole, both names of columns; it lies in [0, 1]."""

    part: str
    whole: str

    def __call__(self, sums: Sums) -> np.ndarray:
        return ratio(sums[self.part], sums[self.whole])


@dataclass(frozen=True)
class Figure:
    """``value`` is None where it is not defined (precision without a single yes). ``rows`` made it, in ``clusters`` draws; for
    a share these are the ones that its whole has something of (for precision, the answers that say yes)."""

    value: float | None
    interval: Interval | None
    rows: int
    clusters: int

    def as_json(self) -> dict[str, Any]:
        interval = None if self.interval is None else list(self.interval)
        return {"value": self.value, "interval": interval, "rows": self.rows, "clusters": self.clusters}


@dataclass(frozen=True)
class Estimate:
    """A figure with the resampled values it has its interval from, so that it can be added to others."""

    value: float
    draws: np.ndarray = field(repr=False)
    rows: int
    clusters: int
    share: bool = False

    def figure(self) -> Figure:
        """The undefined resamples (a draw of images without a single yes) are left out of the interval."""
        if np.isnan(self.value):
            return Figure(None, None, self.rows, self.clusters)
        defined = self.draws[~np.isnan(self.draws)]
        if self.clusters < 2 or not len(defined):
            return Figure(self.value, None, self.rows, self.clusters)
        if self.share and self.value in (0.0, 1.0):
            interval = wilson_interval(int(self.value) * self.clusters, self.clusters)
        else:
            interval = percentile_interval(defined)
        return Figure(self.value, interval, self.rows, self.clusters)


@dataclass(frozen=True)
class Scores:
    """What a benchmark says of a model.

    ``groups``: figures by name, by group ("all" and the benchmark's own parts); ``counts``: what was counted, by group;
    ``unread``: ids of answers in which no answer was found, which count as wrong; ``notes``: what to know when comparing.
    """

    groups: Mapping[str, Mapping[str, Figure]]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unread: Sequence[str] = ()
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        groups = {group: {name: one.as_json() for name, one in found.items()} for group, found in self.groups.items()}
        return {
            "figures": groups,
            "counts": {group: dict(counted) for group, counted in self.counts.items()},
            "unread": {"count": len(self.unread), "such_as": list(self.unread[:5])},
            "notes": list(self.notes),
        }


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def estimates(
    columns: Mapping[str, Sequence[float]],
    formulas: Mapping[str, Formula],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """Every formula's value on the columns' sums, and on those of R draws of whole clusters.

    Args:
        columns: numbers by row, each (N,), N > 0.
        clusters: what each row belongs to and is drawn with, such as its image; without it every row stands alone.
    """
    drawn = resampled_sums(list(columns.values()), seed=seed, clusters=clusters, resamples=resamples)
    resampled = dict(zip(columns, drawn, strict=True))
    whole = {name: np.asarray(float(np.sum(values))) for name, values in columns.items()}
    rows = len(next(iter(columns.values())))
    found = {}
    for name, formula in formulas.items():
        share = isinstance(formula, Share)
        counted = [place for place in range(rows) if not share or columns[formula.whole][place]]
        draws = len(counted) if clusters is None else len({clusters[place] for place in counted})
        found[name] = Estimate(float(formula(whole)), formula(resampled), len(counted), draws, share)
    return found


def figures(
    columns: Mapping[str, Sequence[float]],
    formulas: Mapping[str, Formula],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Figure]:
    """The figures of :func:`estimates`."""
    found = estimates(columns, formulas, seed=seed, clusters=clusters)
    return {name: one.figure() for name, one in found.items()}


def combined(parts: Sequence[Estimate], weight: float = 1.0, *, share: bool = False) -> Estimate:
    """``weight`` times the sum of estimates whose resamples were drawn apart from one another, such as those of subtasks with
    different images (with seeds from :func:`seed_for`). ``share``: the result is a mean of shares."""
    return Estimate(
        weight * sum(part.value for part in parts),
        weight * np.sum([part.draws for part in parts], axis=0),
        sum(part.rows for part in parts),
        sum(part.clusters for part in parts),
        share,
    )


def seed_for(seed: int, group: str) -> int:
    """A group's own seed, so that groups are drawn apart from one another."""
    return seed_of(seed, "benchmark", group)
