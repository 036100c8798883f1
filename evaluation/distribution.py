"""How far a set of generated outputs is from a reference set, in a named feature space: Frechet distance (FID in that space),
kernel distance (KID), precision and recall.

    python -m polyalign.evaluation.distribution REFERENCE GENERATED --features efficientnet_lite0 --out distances.json

Features come from :mod:`polyalign.evaluation.feature_spaces`. A distance means something only beside distances in the same
space, with the same preprocessing and the same numbers of pictures, so all three are written with it.

Letters: N reference features, M generated ones, D their width, R half-samples. Everything is computed in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import norm

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.evaluation.measuring_command import tell
from polyalign.evaluation.statistics import wilson_interval

HALVES = 50
"""Half-samples of which an interval's width is taken."""
NEIGHBOURS = 3
"""The k of precision and recall in their publication."""
_ROWS = 1024
"""Rows of a kernel or distance matrix held at once."""


def frechet_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of (N, D) and (M, D), N, M >= 2 (Heusel et al., arXiv 1706.08500).

    Covariances are the unbiased ones. With A and B the centred features over the root of N - 1 and M - 1, S_1 = A^T A and S_2 =
    B^T B, and the trace of the root is the sum of singular values of A B^T. So no product of covariances is formed and no
    matrix root is taken: the published code's root of a singular product (fewer samples than features) is complex or fails,
    and this one keeps full precision. The estimate is biased upwards, the more so the fewer samples there are.

    Raises:
        ValueError: fewer than two rows, or widths that differ.
    """
    first, second = _checked(reference, generated)
    shift = first.mean(0) - second.mean(0)
    a, b = (_factor(side) for side in (first, second))
    spread = float((a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())
    return max(0.0, float(shift @ shift) + spread)


def _factor(features: np.ndarray) -> np.ndarray:
    """(min(N, D), D) matrix A with A^T A the covariance: a triangle in the place of more rows than columns."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(features) > features.shape[1] else centred


def kernel_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (Binkowski et al., arXiv 1801.01401).

    Of all samples at once, where the published code averages over random subsets of 1,000: the same expectation, less
    variance. It may be below 0.

    Raises:
        ValueError: fewer than two rows, or widths that differ.
    """
    first, second = _checked(reference, generated)
    return float(_kernel_distances(first, second, np.ones((len(first), 1)), np.ones((len(second), 1)))[0])


def _kernel_distances(first: np.ndarray, second: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(R,) distances of the subsets that the columns of ``one`` (N, R) and ``other`` (M, R), of 0 and 1, pick out."""
    n, m = one.sum(0), other.sum(0)
    own_first = _sums(first, first, one, one) - (_kernel_of_itself(first)[:, None] * one).sum(0)
    own_second = _sums(second, second, other, other) - (_kernel_of_itself(second)[:, None] * other).sum(0)
    return own_first / (n * (n - 1)) + own_second / (m * (m - 1)) - 2 * _sums(first, second, one, other) / (n * m)


def _sums(x: np.ndarray, y: np.ndarray, picked_x: np.ndarray, picked_y: np.ndarray) -> np.ndarray:
    """(R,) sums of the kernel over both subsets, some rows at a time."""
    total = np.zeros(picked_x.shape[1])
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        total += (picked_x[rows] * (kernel @ picked_y)).sum(0)
    return total


def _kernel_of_itself(x: np.ndarray) -> np.ndarray:
    return ((x**2).sum(1) / x.shape[1] + 1) ** 3


def precision_recall(reference: np.ndarray, generated: np.ndarray, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991): the share of generated features inside the union
    of balls around the reference ones, and the other way round. A ball reaches to its centre's ``neighbours``-th nearest of its
    own set, itself not counted; the surface belongs to it.

    Raises:
        ValueError: no more rows than neighbours, or widths that differ.
    """
    first, second = _checked(reference, generated, least=neighbours + 1)
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; a manifold needs at least 1")
    return _inside(second, first, neighbours), _inside(first, second, neighbours)


def _inside(points: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    """Share of ``points`` in at least one ball of ``centres``."""
    radii = np.concatenate(
        [
            np.partition(cdist(centres[start : start + _ROWS], centres), neighbours, axis=1)[:, neighbours]
            for start in range(0, len(centres), _ROWS)
        ]
    )  # place 0 is the centre itself
    held = [(cdist(points[start : start + _ROWS], centres) <= radii).any(1).sum() for start in range(0, len(points), _ROWS)]
    return float(sum(held)) / len(points)


def _checked(reference: np.ndarray, generated: np.ndarray, *, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    sides = tuple(np.asarray(side, dtype=np.float64) for side in (reference, generated))
    for side in sides:
        if side.ndim != 2 or side.shape[1] != sides[0].shape[1] or len(side) < least:
            shapes = " and ".join(str(one.shape) for one in sides)
            raise ValueError(f"features are (N, D) and (M, D) with at least {least} rows each, found {shapes}")
        if not np.isfinite(side).all():
            raise ValueError("features must be finite numbers")
    return sides[0], sides[1]


# --- with intervals ----------------------------------------------------------------------------------------------------------


def compare_distributions(
    reference: np.ndarray, generated: np.ndarray, *, seed: int, neighbours: int = NEIGHBOURS, halves: int = HALVES
) -> dict[str, Any]:
    """All distances of (N, D) and (M, D), each with a 95 % ``interval``, and what they depend on.

    The intervals of FID and KID are value +- 1.96 times the deviation of ``halves`` random halves of both sets (the delete-half
    jackknife, Shao and Wu 1989): a bootstrap would draw samples twice, which FID takes for a narrower distribution. They tell
    of the samples drawn and not of FID's bias, which is the same for models compared at equal counts. Those of precision and
    recall are Wilson's, with the other set's manifold as it is.

    Raises:
        ValueError: fewer than four rows of each, no more rows than neighbours, or widths that differ.
    """
    first, second = _checked(reference, generated, least=max(4, neighbours + 1))
    generator = np.random.default_rng(seed_of(seed, "distribution halves"))
    one, other = (halves_of(len(side), halves, generator) for side in (first, second))
    pairs = zip(one.T.astype(bool), other.T.astype(bool), strict=True)
    fids = np.array([frechet_distance(first[a], second[b]) for a, b in pairs])
    kids = _kernel_distances(first, second, one, other)
    precision, recall = precision_recall(first, second, neighbours=neighbours)
    return {
        "fid": {"value": (fid := frechet_distance(first, second)), "interval": around(fid, fids, least=0.0)},
        "kid": {"value": (kid := kernel_distance(first, second)), "interval": around(kid, kids)},
        "precision": {"value": precision, "interval": _wilson(precision, len(second))},
        "recall": {"value": recall, "interval": _wilson(recall, len(first))},
        "samples": {"reference": len(first), "generated": len(second)},
        "dimensions": first.shape[1],
        "neighbours": neighbours,
        "kernel": "(x . y / D + 1)^3",
        "halves": halves,
        "notes": _notes(len(first), len(second), first.shape[1]),
    }


def halves_of(count: int, halves: int, generator: np.random.Generator) -> np.ndarray:
    """(count, halves) of 0 and 1: each column picks half of the samples, for a delete-half jackknife."""
    picked = np.zeros((count, halves))
    for column in picked.T:
        column[generator.permutation(count)[: count // 2]] = 1.0
    return picked


def around(value: float, of_halves: np.ndarray, *, least: float = -np.inf) -> list[float]:
    """The 95 % interval of a value from its values on random halves: value +- 1.96 times their deviation."""
    half = float(norm.ppf(0.975) * of_halves.std(ddof=1))
    return [max(least, value - half), value + half]


def _wilson(share: float, count: int) -> list[float]:
    return list(wilson_interval(round(share * count), count))


def _notes(first: int, second: int, width: int) -> list[str]:
    if min(first, second) > width:
        return []
    return [
        f"{min(first, second)} samples have no full covariance of {width} features: FID is far above its value for many "
        "samples. Compare it only at equal counts, or take KID, whose expectation does not depend on them"
    ]


# --- the command line --------------------------------------------------------------------------------------------------------


def compare_folders(
    reference: Path, generated: Path, embed: Callable[[Sequence[Path]], np.ndarray], *, seed: int, neighbours: int
) -> dict[str, Any]:
    """:func:`compare_distributions` of two folders of pictures; ``embed`` makes (N, D) of N files.

    Raises:
        UserError: a folder is absent or has too few pictures.
    """
    from polyalign.evaluation.feature_spaces import picture_files

    if neighbours < 1:
        raise UserError(f"neighbours is {neighbours}; precision and recall need at least 1")
    files = [picture_files(folder) for folder in (reference, generated)]
    least = max(4, neighbours + 1)
    for folder, found in zip((reference, generated), files, strict=True):
        if len(found) < least:
            raise UserError(f"{folder}: has {len(found)} pictures, and these distances need at least {least} in each folder")
    first, second = (embed(found) for found in files)
    return compare_distributions(first, second, seed=seed, neighbours=neighbours)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    from polyalign.evaluation.feature_spaces import FEATURES, open_space

    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.distribution",
        description="FID, KID, precision and recall of two folders of pictures, in a feature space that is named.",
    )
    parser.add_argument("reference", type=Path, help="folder of the pictures to compare with, such as real ones")
    parser.add_argument("generated", type=Path, help="folder of the generated pictures")
    parser.add_argument("--features", required=True, choices=list(FEATURES), help="the kind of network that sees the pictures")
    parser.add_argument("--model", help="its weights: a local file or folder, or a hub id where the kind allows one")
    parser.add_argument("--architecture", help="its architecture by name (open_clip, timm)")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS, help=f"k of precision and recall (default {NEIGHBOURS})")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures embedded together (default 16)")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda")
    parser.add_argument("--seed", type=int, default=0, help="keys the half-samples of the intervals")
    parser.add_argument("--out", type=Path, help="JSON file to write; without it the JSON is printed")
    asked = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        space = open_space(asked.features, model=asked.model, architecture=asked.architecture, device=asked.device)
        found = compare_folders(
            asked.reference,
            asked.generated,
            lambda files: space.of_files(files, batch_size=asked.batch_size),
            seed=asked.seed,
            neighbours=asked.neighbours,
        )
        folders = {"reference": str(asked.reference), "generated": str(asked.generated)}
        return {**found, "features": space.as_json(), "folders": folders, "seed": asked.seed}

    return tell(measure, asked.out)


if __name__ == "__main__":
    sys.exit(main())
