"""Which of two completions is preferred: a mix of distances to the ground truth, smaller is better.

Distillation-DPO takes the Chamfer distance, and its paper's table of preferences the JSD beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances, precision_recall
from polyalign.evaluation.lidar_metrics.occupancy import MAX_RANGE, confusion, jensen_shannon

METRICS = ("cd", "jsd", "jsd_3d", "f1", "iou")


@dataclass(frozen=True)
class DistanceMix:
    """sum of weight * distance over metrics: ``cd`` in metres, ``jsd`` (from above) and ``jsd_3d``, 1 - ``f1``, 1 - ``iou``.

    Args:
        weights: by name of the metric, all positive.
        f1_threshold, iou_voxel, jsd_voxel, max_range: in metres.

    Raises:
        UserError: no metric, one that is not known, or a weight that is not positive.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"cd": 1.0})
    f1_threshold: float = 0.1
    iou_voxel: float = 0.5
    jsd_voxel: float = 0.5
    max_range: float = MAX_RANGE

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(METRICS))
        if unknown or not self.weights:
            raise UserError(f"a preference is made of the metrics {', '.join(METRICS)}, found {unknown or 'none'}")
        if any(not weight > 0 for weight in self.weights.values()):
            raise UserError(f"weights of metrics are positive, found {dict(self.weights)}")

    def distance(self, pred: np.ndarray, gt: np.ndarray) -> float:
        """Of two clouds (N, 3), (M, 3).

        Raises:
            UserError: an empty cloud, or coordinates that are not finite.
        """
        found: dict[str, float] = {}
        if {"cd", "f1"} & set(self.weights):
            distances = nearest_distances(pred, gt)
            found["cd"] = chamfer(distances)
            found["f1"] = 1 - precision_recall(distances, self.f1_threshold).f1
        for name, bev in (("jsd", True), ("jsd_3d", False)):
            if name in self.weights:
                found[name] = jensen_shannon(pred, gt, bev=bev, voxel=self.jsd_voxel, max_range=self.max_range)
        if "iou" in self.weights:
            found["iou"] = 1 - confusion(pred, gt, self.iou_voxel, max_range=self.max_range).iou
        return sum(weight * found[name] for name, weight in self.weights.items())

    def distances(self, pred: Tensor, gt: Tensor) -> Tensor:
        """(B,) of clouds (B, N, 3), (B, M, 3), on the device of ``pred``."""
        pairs = zip(pred.detach().double().cpu().numpy(), gt.double().cpu().numpy(), strict=True)
        return torch.tensor([self.distance(one, truth) for one, truth in pairs], device=pred.device)
