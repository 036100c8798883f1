"""Training of LiDiff's refinement network (Nunes et al., CVPR 2024), which ScoreLiDAR and Distillation-DPO use unchanged, as an
:class:`~polyalign.core.algorithm.Algorithm`.

Letters: G clouds of a batch, N points of an input, K = 6 copies of each, M points of the ground truth.

The input is ground truth whose points are jittered, more coarsely sampled than the target. The network moves K copies of every
point by at most a metre, and is trained on the Chamfer distance of what comes out to the ground truth.

Differences between what is published: the loss is the mean of *squared* distances, summed over the two directions (pytorch3d's
default), while the papers report plain distances, averaged over the two; and the network, which is trained on jittered
ground truth alone, is used on completions, whose errors are neither independent nor within 0.3 m.

Differences from the published code (PRBonn/LiDiff@570e73c, ``config_refine``): its inputs and targets are 40 scans put
together, ours the map of the whole sequence around a scan, already thinned to voxels of 0.1 m, as the target there; it draws
the input's N points by farthest-point sampling, we at random, as the M of the target, which for 180,000 points is minutes less
a sample. Points at the edge are jittered before the range is cut there, and after it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor, nn

from polyalign.core.adapter import Row
from polyalign.core.algorithm import Layout, Rows
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives import Outcome
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.samples import augmentation, resampled
from polyalign.modalities.lidar.completion import VOXEL, refine
from polyalign.modalities.lidar.minkunet import MinkUNet

NETWORK = "refinement"
_CHUNK = 1 << 27


@dataclass(frozen=True)
class RefinementSettings:
    """Defaults are LiDiff's.

    Args:
        points, full_points: N and M.
        jitter, clip: of the input, standard deviation and largest change of each coordinate in metres.
        voxel: of the network, in metres.
        augment: turn, scale and mirror as for the training of the denoiser.
    """

    points: int = 180_000
    full_points: int = 360_000
    jitter: float = 0.2
    clip: float = 0.3
    voxel: float = VOXEL
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("points", "full_points", "jitter", "clip", "voxel"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be above 0")


def jittered(points: np.ndarray, settings: RefinementSettings, generator: np.random.Generator) -> np.ndarray:
    """(N, 3) of the points (n, 3), drawn and moved."""
    drawn = resampled(points, settings.points, generator)
    return drawn + np.clip(settings.jitter * generator.standard_normal(drawn.shape), -settings.clip, settings.clip)


def nearest_points(points: Tensor, others: Tensor) -> Tensor:
    """(N,) index of the nearest of ``others`` (M, 3) to each of ``points`` (N, 3): a kd-tree on the CPU, all pairs in parts
    elsewhere."""
    points, others = points.detach(), others.detach()
    if points.device.type == "cpu":
        return torch.from_numpy(np.asarray(KDTree(others.numpy()).query(points.numpy())[1], dtype=np.int64))
    mode = "donot_use_mm_for_euclid_dist"  # in single precision, 50 m out, the other one is off by centimetres
    rows = max(1, _CHUNK // len(others))
    return torch.cat([torch.cdist(part, others, compute_mode=mode).argmin(dim=1) for part in points.split(rows)])


def chamfer_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """(B,) of clouds (B, N, 3) and (B, M, 3): mean squared distance from each predicted point to the nearest true one, plus the
    same the other way round, in square metres. Which points are nearest has no gradient; the distances to them have."""
    found = []
    for cloud, goal in zip(predicted, truth, strict=True):
        to_truth = cloud - goal[nearest_points(cloud, goal)]
        from_truth = goal - cloud[nearest_points(goal, cloud)]
        found.append(to_truth.pow(2).sum(dim=1).mean() + from_truth.pow(2).sum(dim=1).mean())
    return torch.stack(found)


class ChamferRefinement:
    """The algorithm; its one network is ``refinement``. Rows are {"pair_id", "points" (n, 3)}: ground truth around a scan, in
    metres.

    Batch statistics are those of all clouds of a batch, so a batch is not cut; they are part of a checkpoint.

    Args:
        seed: keys every draw.
    """

    group_separable = False

    def __init__(self, network: MinkUNet, settings: RefinementSettings, *, seed: int = 0):
        self.settings, self.seed = settings, seed
        self.networks: dict[str, nn.Module] = {NETWORK: network.requires_grad_(True)}

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        self.networks[NETWORK].to(layout.device)

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        """Inputs (G, N, 3) and targets (G, M, 3), drawn by row and step.

        Raises:
            UserError: a row whose points are none.
        """
        inputs, targets = [], []
        for row in rows:
            points = np.asarray(row["points"], dtype=np.float64)
            if points.ndim != 2 or points.shape[1:] != (3,) or not len(points) or not np.isfinite(points).all():
                raise UserError(f"{row['pair_id']!r}: ground truth has to be finite points (n, 3), found {points.shape}")
            generator = np.random.default_rng(seed_of(self.seed, "refinement", row["pair_id"], step))
            if self.settings.augment:
                points = points @ augmentation(generator).T
            inputs.append(jittered(points, self.settings, generator))
            targets.append(resampled(points, self.settings.full_points, generator))
        tensors = {
            name: torch.tensor(np.stack(clouds), dtype=torch.float32)
            for name, clouds in (("points", inputs), ("full", targets))
        }
        return Batch(tuple(str(row["pair_id"]) for row in rows), torch.tensor([[1.0, 0.0]] * len(rows)), tensors)

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        points, full = batch.tensors["points"], batch.tensors["full"]
        refined = refine(self.networks[NETWORK], points, voxel=self.settings.voxel)  # type: ignore[arg-type]
        moved = (refined.detach().unflatten(1, (points.shape[1], -1)) - points.unsqueeze(2)).norm(dim=3)
        loss = chamfer_loss(refined, full)
        return {NETWORK: Outcome(loss, {"chamfer": loss.detach(), "moved": moved.flatten(1).mean(dim=1)})}

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing is kept from step to step but the weights and the batch statistics."""

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": {name: value.detach().cpu().clone() for name, value in self.networks[NETWORK].named_buffers()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.networks[NETWORK].named_buffers():
                value.copy_(state["statistics"][name])
