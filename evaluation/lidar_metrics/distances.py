"""Distances from each point to the nearest of the other cloud, and what is made of them: Chamfer distance, precision, recall,
F1.

Letters: N predicted points, M points of the ground truth, T thresholds. Coordinates and distances are in metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.integrate import simpson
from scipy.spatial import KDTree

from polyalign.core.errors import UserError

Direction = Literal["both", "pred_to_gt", "gt_to_pred"]
THRESHOLDS = tuple(np.linspace(0.05, 0.1, 100).tolist())
"""Of LiDiff's area under the curve: from its voxel size to twice that."""


@dataclass(frozen=True)
class NearestDistances:
    """``pred_to_gt`` (N,): from each predicted point to the nearest true one; ``gt_to_pred`` (M,): the other way round."""

    pred_to_gt: np.ndarray
    gt_to_pred: np.ndarray


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]; the papers print per cent."""

    precision: float
    recall: float
    f1: float


def checked_cloud(points: np.ndarray, name: str) -> np.ndarray:
    """(N, 3) float64.

    Raises:
        UserError: another shape, no points, or coordinates that are not finite.
    """
    cloud = np.asarray(points, dtype=np.float64)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise UserError(f"the {name} has to be points of three coordinates (N, 3), found {cloud.shape}")
    if not len(cloud):
        raise UserError(f"the {name} is empty; metrics of no points are not defined")
    finite = np.isfinite(cloud).all(axis=1)
    if not finite.all():
        raise UserError(f"{int((~finite).sum())} of the {len(cloud)} points of the {name} are NaN or infinite; drop them first")
    return cloud


def nearest_distances(pred: np.ndarray, gt: np.ndarray) -> NearestDistances:
    """Euclidean distances, not squared, in both directions, from a kd-tree of each cloud.

    Raises:
        UserError: see :func:`checked_cloud`.
    """
    pred, gt = checked_cloud(pred, "prediction"), checked_cloud(gt, "ground truth")
    return NearestDistances(np.asarray(KDTree(gt).query(pred)[0]), np.asarray(KDTree(pred).query(gt)[0]))


def chamfer(distances: NearestDistances, *, squared: bool = False, direction: Direction = "both") -> float:
    """Chamfer distance in metres, or square metres.

    d(A -> B) = mean over a in A of |a - nearest b|, or of its square; both: (d(pred -> gt) + d(gt -> pred)) / 2.
    LiDiff, ScoreLiDAR and Distillation-DPO report the plain one in both directions. What their code calls RMSE is the plain one
    from the prediction to the ground truth, without square or root.
    """
    halves = [distances.pred_to_gt, distances.gt_to_pred]
    chosen = {"both": halves, "pred_to_gt": halves[:1], "gt_to_pred": halves[1:]}[direction]
    means = [float(np.mean(half**2 if squared else half)) for half in chosen]
    return sum(means) / len(means)


def precision_recall(distances: NearestDistances, threshold: float) -> PrecisionRecall:
    """Precision: share of predicted points nearer than ``threshold`` to a true one; recall: the other way round; F1: their
    harmonic mean, 0 where one is 0."""
    precision = float(np.mean(distances.pred_to_gt < threshold))
    recall = float(np.mean(distances.gt_to_pred < threshold))
    return PrecisionRecall(precision, recall, _f1(precision, recall))


def precision_recall_area(distances: NearestDistances, thresholds: Sequence[float] = THRESHOLDS) -> PrecisionRecall:
    """Area under each curve over equally spaced thresholds (Simpson's rule), divided by that of a perfect prediction.

    F1 is the area under the curve of F1, not the harmonic mean of the two areas, as in LiDiff's ``PrecisionRecall``.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    precision = _share_below(distances.pred_to_gt, levels)
    recall = _share_below(distances.gt_to_pred, levels)
    f1 = np.array([_f1(p, r) for p, r in zip(precision, recall, strict=True)])
    perfect = simpson(np.ones_like(levels), x=levels)
    return PrecisionRecall(*(float(simpson(curve, x=levels) / perfect) for curve in (precision, recall, f1)))


def _share_below(distances: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(distances), levels, side="left") / len(distances)


def _f1(precision: float, recall: float) -> float:
    return 0.0 if precision == 0 or recall == 0 else 2 * precision * recall / (precision + recall)
