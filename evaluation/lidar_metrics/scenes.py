"""All metrics of one completed scene as a row of numbers, and rows of many scenes as means with intervals.

A row is plain JSON, so a run can write rows as it goes and be taken up again. Names in a row: ``cd``, ``cd_pred_to_gt``,
``cd_gt_to_pred`` (metres), ``cd_squared`` (square metres), ``precision``, ``recall``, ``f1`` at one threshold and the same with
``_area``, ``jsd_3d``, ``jsd_bev``, ``iou_V`` for each voxel size V and its counts ``voxels_V`` (true positive, false negative,
false positive), ``emd`` and ``emd_lower``; the same with ``refined_`` before them for a refined cloud.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyalign.core.randomness import seed_of
from polyalign.evaluation.lidar_metrics.distances import (
    chamfer,
    checked_cloud,
    nearest_distances,
    precision_recall,
    precision_recall_area,
)
from polyalign.evaluation.lidar_metrics.occupancy import MAX_RANGE, Compat, Confusion, confusion, jensen_shannon
from polyalign.evaluation.lidar_metrics.transport import earth_movers, repo_emd
from polyalign.evaluation.statistics import Interval, bootstrap_mean

Row = Mapping[str, Any]
COUNTS = "voxels_"


@dataclass(frozen=True)
class SceneMetrics:
    """Which metrics, and by whose definition.

    ``compat``: ``none``, ours; ``lidiff``, LiDiff's code as it is since July 2025; ``lidiff_old``, as it was before and still
    is in ScoreLiDAR and Distillation-DPO, which includes the "EMD" of the latter (see ``transport.repo_emd``). CD, F1 and JSD
    are the same in all three. ``emd`` is off by default: it takes from seconds to minutes a scene.
    """

    f1_threshold: float = 0.1
    jsd_voxel: float = 0.5
    iou_voxels: tuple[float, ...] = (0.5, 0.2, 0.1)
    max_range: float = MAX_RANGE
    emd: bool = False
    emd_voxel: float = 1.0
    compat: Compat = "none"


DEFAULT_METRICS = SceneMetrics()


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over scenes (of n, as numpy's), a bootstrap interval of the mean, and how many scenes had
    it."""

    mean: float
    deviation: float
    interval: Interval
    scenes: int


def measure(
    pred: np.ndarray, gt: np.ndarray, *, refined: np.ndarray | None = None, metrics: SceneMetrics = DEFAULT_METRICS
) -> dict[str, Any]:
    """The row of one scene.

    Args:
        pred, gt: (N, 3), (M, 3) in metres, in the sensor's frame.
        refined: the same prediction after the refinement network, six times as many points. A denser cloud has shorter
            distances from the ground truth by itself, so compare refined with refined only.

    Raises:
        UserError: an empty cloud, coordinates that are not finite, no point near the sensor.
    """
    row = _measure(checked_cloud(pred, "prediction"), checked_cloud(gt, "ground truth"), metrics)
    if refined is not None:
        again = _measure(checked_cloud(refined, "refined prediction"), checked_cloud(gt, "ground truth"), metrics)
        row |= {f"refined_{name}": value for name, value in again.items()}
    return row


def _measure(pred: np.ndarray, gt: np.ndarray, metrics: SceneMetrics) -> dict[str, Any]:
    distances = nearest_distances(pred, gt)
    row: dict[str, Any] = {
        "cd": chamfer(distances),
        "cd_pred_to_gt": chamfer(distances, direction="pred_to_gt"),
        "cd_gt_to_pred": chamfer(distances, direction="gt_to_pred"),
        "cd_squared": chamfer(distances, squared=True),
    }
    for suffix, found in (
        ("", precision_recall(distances, metrics.f1_threshold)),
        ("_area", precision_recall_area(distances)),
    ):
        row |= {f"precision{suffix}": found.precision, f"recall{suffix}": found.recall, f"f1{suffix}": found.f1}
    for name, bev in (("jsd_3d", False), ("jsd_bev", True)):
        row[name] = jensen_shannon(pred, gt, bev=bev, voxel=metrics.jsd_voxel, max_range=metrics.max_range)
    for voxel in metrics.iou_voxels:
        found = confusion(pred, gt, voxel, compat=metrics.compat, max_range=metrics.max_range)
        row[f"iou_{voxel:g}"] = found.iou
        row[f"{COUNTS}{voxel:g}"] = [found.true_positive, found.false_negative, found.false_positive]
    return row | (_earth_movers(pred, gt, metrics) if metrics.emd else {})


def _earth_movers(pred: np.ndarray, gt: np.ndarray, metrics: SceneMetrics) -> dict[str, float]:
    if metrics.compat == "lidiff_old":
        value = repo_emd(pred, gt)
        return {"emd": value} if value else {}  # the original leaves out clouds that are too large, and an EMD of 0 with them
    found = earth_movers(pred, gt, voxel=metrics.emd_voxel)
    return {"emd": found.cost, "emd_lower": found.lower}


def summarise(rows: Sequence[Row], *, seed: int, resamples: int = 2000) -> dict[str, Summary]:
    """Every metric over scenes. An ``iou_V`` is micro-averaged as in the papers, voxels of all scenes together, and its
    interval draws whole scenes; the others are means of scenes."""
    names = dict.fromkeys(name for row in rows for name in row if COUNTS not in name)
    found = {}
    for name in names:
        having = [row for row in rows if name in row]
        values = [float(row[name]) for row in having]
        counts = name.replace("iou_", COUNTS)
        if counts != name:
            mean, interval = _micro([Confusion(*row[counts]) for row in having], seed=seed, resamples=resamples)
        else:
            mean, interval = bootstrap_mean(values, seed=seed, resamples=resamples)
        found[name] = Summary(mean, float(np.std(values)), interval, len(values))
    return found


def _micro(scenes: Sequence[Confusion], *, seed: int, resamples: int) -> tuple[float, Interval]:
    shared = np.array([scene.true_positive for scene in scenes], dtype=np.float64)
    unions = np.array([scene.union for scene in scenes], dtype=np.float64)
    drawn = np.random.default_rng(seed_of(seed, "bootstrap")).integers(len(scenes), size=(resamples, len(scenes)))
    low, high = np.quantile(shared[drawn].sum(axis=1) / np.maximum(unions[drawn].sum(axis=1), 1.0), [0.025, 0.975])
    return sum(scenes, Confusion(0, 0, 0)).iou, (float(low), float(high))


def compare(base: Sequence[Row], other: Sequence[Row], *, seed: int, resamples: int = 2000) -> dict[str, Summary]:
    """Other less base, scene by scene, for every metric both have: a paired interval, which is far narrower than two separate
    ones when scenes differ more than models.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(base) != len(other):
        raise ValueError(f"a paired comparison needs the same scenes, found {len(base)} and {len(other)}")
    found = {}
    for name in dict.fromkeys(name for row in base for name in row if COUNTS not in name):
        gains = [float(b[name]) - float(a[name]) for a, b in zip(base, other, strict=True) if name in a and name in b]
        if gains:
            mean, interval = bootstrap_mean(gains, seed=seed, resamples=resamples)
            found[name] = Summary(mean, float(np.std(gains)), interval, len(gains))
    return found
