"""Distances of sets of sounds as the audio papers report them: FD and FAD, KL, inception score, KID.

Formulas of audioldm_eval, in stable forms. Letters: N reference sounds, M generated ones, D features, C classes of a tagger.
All in float64. The Frechet distance is :func:`polyalign.evaluation.distribution.frechet_distance`: FAD takes it of VGGish's
patches of all files together, FD of one vector a file.

Differences to audioldm_eval, all of which change no sound result: no root of a product of covariances is taken (its root of a
singular product drops imaginary parts or returns -1); what cannot be paired is refused, where it returns -1; nothing is cached
beside the folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from scipy.special import log_expit, log_softmax, softmax

from polyalign.core.errors import UserError
from polyalign.evaluation.distribution import kernel_distance

KL_EPSILON = 1e-6
"""Added to the generated side's probabilities before the logarithm, as published; identical sides give about -1e-5."""
SPLITS, SEED = 10, 2020
SUBSETS, SUBSET_SIZE = 100, 1000
LEAST_SHARED = 0.99
"""Share of both folders' names that has to be in the other one."""


def kl_softmax(reference: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """(N,) of sum_c p_c (log p_c - log(q_c + 1e-6)) with p, q the softmax of reference and generated logits (N, C), row by row.

    Its mean is the KL that the papers report.
    """
    first, second = _checked(reference, generated)
    return (softmax(first, axis=1) * (log_softmax(first, axis=1) - np.log(softmax(second, axis=1) + KL_EPSILON))).sum(axis=1)


def kl_sigmoid(reference: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """As :func:`kl_softmax` with p, q the sigmoid of each logit. No divergence of the tags, whose (1 - p) parts are missing;
    published so, and kept for comparison."""
    first, second = _checked(reference, generated)
    p, q = np.exp(log_expit(first)), np.exp(log_expit(second))
    return (p * (log_expit(first) - np.log(q + KL_EPSILON))).sum(axis=1)


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, shuffle: bool = True, seed: int = SEED) -> tuple[float, float]:
    """Mean and population deviation over ``splits`` of exp(mean KL(p || mean p)), p the softmax of (N, C) logits.

    Split k holds rows k N // splits to (k + 1) N // splits of numpy's ``RandomState(seed)`` permutation, as published. It grows
    with N, so it compares only at equal N and splits.

    Raises:
        ValueError: fewer rows than splits.
    """
    rows = np.asarray(logits, dtype=np.float64)
    if rows.ndim != 2 or not 1 <= splits <= len(rows):
        raise ValueError(f"an inception score of {splits} splits needs at least as many rows (N, C), found {rows.shape}")
    if shuffle:
        rows = rows[np.random.RandomState(seed).permutation(len(rows))]
    logs, scores = log_softmax(rows, axis=1), []
    for split in range(splits):
        part = logs[split * len(rows) // splits : (split + 1) * len(rows) // splits]
        shares = np.exp(part)
        middle = np.log(np.maximum(shares.mean(axis=0, keepdims=True), np.finfo(np.float64).tiny))
        scores.append(np.exp((shares * (part - middle)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance_of_subsets(
    reference: np.ndarray, generated: np.ndarray, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """KID as published: mean and population deviation of :func:`~polyalign.evaluation.distribution.kernel_distance` (degree 3,
    gamma 1 / D) over random subsets of both sides, of ``size`` or of the smaller side's number. Draws are numpy's
    ``RandomState(seed)``, generated first.

    Raises:
        ValueError: fewer than two rows, widths that differ, or no subsets.
    """
    first, second = np.asarray(reference, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if subsets < 1 or size < 2:
        raise ValueError(f"{subsets} subsets of {size}; at least one of at least two are needed")
    count, draws = min(len(first), len(second), size), np.random.RandomState(seed)
    if count == len(first) == len(second):
        return kernel_distance(first, second), 0.0  # every subset is the whole
    found = []
    for _ in range(subsets):
        ours = second[draws.choice(len(second), count, replace=False)]
        theirs = first[draws.choice(len(first), count, replace=False)]
        found.append(kernel_distance(theirs, ours))
    return float(np.mean(found)), float(np.std(found))


def paired_names(
    reference: Sequence[str], generated: Sequence[str], *, least: float = LEAST_SHARED
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Places of the files that have the same base name on both sides, by name, and what a score records of it.

    Raises:
        UserError: a base name that stands twice, or no more than ``least`` of either side's names in the other (the published
            evaluator returns -1 there).
    """
    places = [_places(names, side) for names, side in ((reference, "reference"), (generated, "generated"))]
    shared = sorted(places[0].keys() & places[1].keys())
    shares = [len(shared) / max(1, len(side)) for side in places]
    if min(shares) <= least:
        lone = sorted(places[0].keys() ^ places[1].keys())
        raise UserError(
            f"KL compares files of the same name, and only {len(shared)} of {len(reference)} reference and {len(generated)} "
            f"generated files share one (more than {least:.0%} of both have to), such as not {lone[0]!r}. Name each "
            "generated file as its reference"
        )
    told = {
        "by": "base name without its suffix",
        "pairs": len(shared),
        "alone": len(reference) + len(generated) - 2 * len(shared),
    }
    return [(places[0][name], places[1][name]) for name in shared], told


def _places(names: Sequence[str], side: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, name in enumerate(names):
        stem = PurePath(name).stem
        if stem in found:
            raise UserError(f"the {side} side has two files named {stem!r}; KL pairs files by name, so names have to differ")
        found[stem] = place
    return found


def _checked(reference: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(reference, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(f"logits of paired sounds are (N, C) on both sides, found {first.shape} and {second.shape}")
    return first, second
