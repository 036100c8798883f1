"""Scores of one prompt's samples to preference pairs. Pure: no files, no models, no randomness.

Letters: N samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

Mode = Literal["best_worst", "all_pairs", "first_second", "best_rest"]
Ties = Literal["drop", "keep"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Positions of two samples among the N; ``difference`` is the chosen one's score minus the rejected one's: > 0, or 0
    in a tie that is kept."""

    chosen: int
    rejected: int
    difference: float


@dataclass(frozen=True, slots=True)
class Paired:
    """The pairs of one prompt and what did not become one.

    ``ties_dropped`` and ``below_margin`` count comparisons (one a prompt for ``best_worst`` and ``first_second``);
    ``duplicates_dropped`` counts samples identical to an earlier one; ``over_limit`` counts pairs past ``max_pairs``.
    """

    pairs: tuple[Pair, ...]
    ties_dropped: int = 0
    below_margin: int = 0
    duplicates_dropped: int = 0
    over_limit: int = 0


def pair_up(
    scores: Sequence[float],
    *,
    mode: Mode = "best_worst",
    margin: float = 0.0,
    max_pairs: int | None = None,
    identities: Sequence[Hashable] | None = None,
    ties: Ties = "drop",
) -> Paired:
    """Pairs of one prompt, those with the largest difference first, then by position.

    ``best_rest`` is the best sample with each of the others, ``first_second`` the first two as they were drawn. A pair is kept
    when its difference is greater than ``margin``; a difference of exactly zero is a tie, whatever the margin.
    Of samples with equal ``identities`` (hashes of the outputs) only the first takes part.

    Raises:
        ValueError: a score that is not finite, lengths that differ, a negative margin or an unknown mode.
    """
    if margin < 0 or not math.isfinite(margin):
        raise ValueError(f"margin must be a finite number >= 0, found {margin}")
    if identities is not None and len(identities) != len(scores):
        raise ValueError(f"{len(scores)} scores but {len(identities)} identities")
    bad = [position for position, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ValueError(f"scores must be finite numbers, found {scores[bad[0]]} at position {bad[0]}")

    distinct = _first_of_each(range(len(scores)) if identities is None else identities)
    compared = [_compare(scores, a, b) for a, b in _comparisons(scores, distinct, mode)]
    kept = sorted(
        (pair for pair in compared if pair.difference > margin or (ties == "keep" and pair.difference == 0)),
        key=lambda pair: (-pair.difference, pair.chosen, pair.rejected),
    )
    dropped = 0 if ties == "keep" else sum(pair.difference == 0 for pair in compared)
    limited = kept if max_pairs is None else kept[:max_pairs]
    return Paired(
        pairs=tuple(limited),
        ties_dropped=dropped,
        below_margin=len(compared) - dropped - len(kept),
        duplicates_dropped=len(scores) - len(distinct),
        over_limit=len(kept) - len(limited),
    )


def _first_of_each(identities: Iterable[Hashable]) -> list[int]:
    first: dict[Hashable, int] = {}
    for position, identity in enumerate(identities):
        first.setdefault(identity, position)
    return list(first.values())


def _comparisons(scores: Sequence[float], distinct: list[int], mode: Mode) -> list[tuple[int, int]]:
    """Which samples are held against each other; equal scores are decided by position, so the order is always the same."""
    if mode == "all_pairs":
        return list(combinations(distinct, 2))
    if mode not in ("best_worst", "best_rest", "first_second"):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, found {mode!r}")
    if len(distinct) < 2:
        return []
    if mode == "first_second":
        return [(distinct[0], distinct[1])]
    ranked = sorted(distinct, key=lambda position: (-scores[position], position))
    return [(ranked[0], other) for other in (ranked[1:] if mode == "best_rest" else ranked[-1:])]


def _compare(scores: Sequence[float], a: int, b: int) -> Pair:
    chosen, rejected = (a, b) if scores[a] >= scores[b] else (b, a)
    return Pair(chosen, rejected, float(scores[chosen]) - float(scores[rejected]))


def histogram(scores: Sequence[float], *, bins: int = 20) -> dict[str, list[Any]]:
    """``{"edges": bins + 1 numbers, "counts": bins whole numbers}``; the last bin includes its right edge. Empty lists for no
    scores; one bin of width 1 around the value when all scores are equal."""
    if not scores:
        return {"edges": [], "counts": []}
    low, high = min(scores), max(scores)
    if low == high:
        return {"edges": [low - 0.5, high + 0.5], "counts": [len(scores)]}
    counts = [0] * bins
    for score in scores:
        counts[min(int((score - low) / (high - low) * bins), bins - 1)] += 1
    return {"edges": [low + (high - low) * edge / bins for edge in range(bins + 1)], "counts": counts}
