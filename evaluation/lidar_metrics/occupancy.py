"""Metrics on voxels: Jensen-Shannon distance of histograms and intersection over union, on sets of occupied voxels only.

The original code makes dense histograms, at 0.1 m two of 1000^3 in float64; sets give the same numbers from megabytes.

Letters: N points, R half the side of the cube around the sensor, v the voxel size, both in metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial.distance import jensenshannon

from polyalign.core.errors import UserError
from polyalign.evaluation.lidar_metrics.distances import checked_cloud

Compat = Literal["none", "lidiff", "lidiff_old"]
MAX_RANGE = 50.0
_REACH = 1 << 20
"""Voxels either way of the origin that fit a key of three times 21 bits."""


@dataclass(frozen=True)
class Confusion:
    """Voxels: occupied in both, in the ground truth only, in the prediction only. Adding over scans gives the micro-average."""

    true_positive: int
    false_negative: int
    false_positive: int

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(
            self.true_positive + other.true_positive,
            self.false_negative + other.false_negative,
            self.false_positive + other.false_positive,
        )

    @property
    def union(self) -> int:
        return self.true_positive + self.false_negative + self.false_positive

    @property
    def iou(self) -> float:
        """Intersection over union; 0 where nothing is occupied, as the original's 0 / 1e-15."""
        return self.true_positive / self.union if self.union else 0.0


def histogram_bins(points: np.ndarray, voxel: float, max_range: float) -> tuple[np.ndarray, int]:
    """Bins (n, 3) of the points inside the cube, and the number of bins per axis, as numpy's ``histogramdd`` has them:
    int(2 R / v) equal bins on [-R, R], each half open, the last one closed. Points outside are left out."""
    count = int(2 * max_range / voxel)
    edges = np.linspace(-max_range, max_range, count + 1)
    bins = np.searchsorted(edges, points, side="right") - 1
    bins[points == max_range] = count - 1
    return bins[((bins >= 0) & (bins < count)).all(axis=1)], count


def _keys(bins: np.ndarray, count: int) -> np.ndarray:
    return (bins[:, 0] * count + bins[:, 1]) * count + bins[:, 2]


def jensen_shannon(
    pred: np.ndarray,
    gt: np.ndarray,
    *,
    bev: bool = False,
    voxel: float = 0.5,
    max_range: float = MAX_RANGE,
    base: float | None = None,
) -> float:
    """Jensen-Shannon distance of where the points of two clouds lie: the square root of the divergence.

    With p, q the shares of points per voxel and m = (p + q) / 2: sqrt((KL(p || m) + KL(q || m)) / 2), natural logarithm (at
    most 0.8326) unless ``base`` is given (base 2: at most 1).

    Args:
        bev: instead of points per voxel, occupied voxels per column: counts are clipped to 1 and summed over z. The papers'
            "JSD" is this one.

    Raises:
        UserError: a cloud without a point inside the cube, where the original divides by zero.
    """
    sides = []
    for points, name in ((gt, "ground truth"), (pred, "prediction")):
        bins, count = histogram_bins(checked_cloud(points, name), voxel, max_range)
        if not len(bins):
            raise UserError(f"no point of the {name} lies within {max_range} m of the sensor on each axis: no histogram")
        keys, counts = np.unique(_keys(bins, count), return_counts=True)
        sides.append(np.unique(keys // count, return_counts=True) if bev else (keys, counts))
    every = np.union1d(sides[0][0], sides[1][0])
    shares = np.zeros((2, len(every)))
    for side, (keys, counts) in enumerate(sides):
        shares[side, np.searchsorted(every, keys)] = counts / counts.sum()
    return float(np.nan_to_num(jensenshannon(shares[0], shares[1], base=base)))


def occupied(points: np.ndarray, voxel: float, *, compat: Compat = "none", max_range: float = MAX_RANGE) -> np.ndarray:
    """Keys of the occupied voxels, ascending and unique. ``compat`` as in :func:`confusion`."""
    if compat == "none":
        bins, count = np.floor(points / voxel).astype(np.int64) + _REACH, 2 * _REACH
        if ((bins < 0) | (bins >= count)).any():
            raise UserError(
                f"points lie more than {_REACH} voxels of {voxel} m from the sensor; crop the cloud or coarsen the grid"
            )
    elif compat == "lidiff":
        bins, count = histogram_bins(points, voxel, max_range)
    else:
        bins, count = histogram_bins(np.round(points / voxel).astype(np.int64).astype(np.float64), voxel, max_range)
    return np.unique(_keys(bins, count))


def confusion(
    pred: np.ndarray, gt: np.ndarray, voxel: float, *, compat: Compat = "none", max_range: float = MAX_RANGE
) -> Confusion:
    """Occupied voxels of both clouds compared.

    Args:
        compat: ``none``: voxel floor(p / v), wherever the points are. ``lidiff``: LiDiff's code since July 2025, int(2 R / v)
            bins on [-R, R]; the same voxels when v divides R, cropped to the cube. ``lidiff_old``: before that, and still in
            ScoreLiDAR and Distillation-DPO: round(p / v) is binned as if it were metres, so that only |p| < R v is seen (at
            0.1 m: 5 m), and for v < 1 neighbouring bins stay empty. Numbers of the papers are of this kind.

    Raises:
        UserError: see :func:`checked_cloud`; points too far for the grid.
    """
    pred_keys = occupied(checked_cloud(pred, "prediction"), voxel, compat=compat, max_range=max_range)
    gt_keys = occupied(checked_cloud(gt, "ground truth"), voxel, compat=compat, max_range=max_range)
    both = len(np.intersect1d(pred_keys, gt_keys, assume_unique=True))
    return Confusion(both, len(gt_keys) - both, len(pred_keys) - both)
