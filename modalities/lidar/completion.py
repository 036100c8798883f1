"""Completing scans with a denoiser and its encoder, and refining what comes out.

Letters: B scans, P points of a scan, N = copies * P points of a completion.

Against the published order of work, at equal output: the scan is encoded once and not in every step and guidance branch,
without scan once per network width of voxels; both branches share voxels, kernel maps and look-ups of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng
from polyalign.datasets.lidar.filters import COMPLETION_SCAN, PointFilter, farthest_points
from polyalign.modalities.lidar.diffusion import Formulation, SolverSettings, add_noise, noise_schedule, solve
from polyalign.modalities.lidar.minkunet import Condition, MinkGlobalEnc, MinkUNet, MinkUNetDiff
from polyalign.modalities.lidar.sparse import voxelise

VOXEL = 0.05


@dataclass(frozen=True)
class CompletionSettings:
    """Defaults are Distillation-DPO's evaluation; LiDiff: guidance 6 and 50 steps.

    Args:
        guidance: s in noise = without + s (with - without); at 1 the branch without scan is left out.
        copies: how many points of the completion start from each point of the scan.
        noise_scale: standard deviation of the starting noise in metres. Pairs of Distillation-DPO are made with 1 and 1.1.
        voxel: in metres, as the networks were trained.
        coarser: (level, voxel) pairs: at that noise level and above, voxels of this size instead. With noise of a metre hardly
            any voxel of 5 cm has a neighbour, so coarse ones cost little in quality; off by default.
    """

    solver: SolverSettings = field(default_factory=SolverSettings)
    formulation: Formulation = "local"
    guidance: float = 3.5
    copies: int = 10
    noise_scale: float = 1.0
    voxel: float = VOXEL
    coarser: tuple[tuple[int, float], ...] = ()

    def voxel_at(self, level: int) -> float:
        return max([self.voxel, *(voxel for above, voxel in self.coarser if level >= above)])


DEFAULT_COMPLETION = CompletionSettings()


def prepare_scan(points: np.ndarray, count: int, *, keep: PointFilter = COMPLETION_SCAN) -> np.ndarray:
    """The (count, 3) float32 points of a raw scan (N, 3 or 4) that a completion starts from: filtered, then farthest points.

    Raises:
        UserError: fewer points than ``count`` are left.
    """
    if points.ndim != 2 or points.shape[1] not in (3, 4):
        raise UserError(f"a scan is points (N, 3) or (N, 4), found {points.shape}")
    if not np.isfinite(points).all():
        raise UserError("the scan has points that are NaN or infinite; drop them")
    left = points[keep.keep(points), :3]
    if len(left) < count:
        raise UserError(f"{len(left)} of {len(points)} points are within range, and {count} are needed; ask for fewer points")
    return left[farthest_points(left, count)].astype(np.float32)


class GuidedDenoiser:
    """A denoiser with guidance for a fixed batch of scans. What the scans and the absence of one give is computed once for each
    voxel size in use."""

    def __init__(self, denoiser: MinkUNetDiff, encoder: MinkGlobalEnc, scans: Tensor, settings: CompletionSettings):
        self._denoiser, self._encoder, self._scans, self._settings = denoiser, encoder, scans, settings
        self._conditions: dict[float, tuple[Condition, Condition | None]] = {}

    def __call__(self, points: Tensor, level: int) -> Tensor:
        """Noise (B, N, 3) of points (B, N, 3)."""
        size = self._settings.voxel_at(level)
        given, absent = self._of(size)
        voxels, inverse = voxelise(points, size)
        timesteps = torch.full((len(points),), level, device=points.device)
        noise = self._denoiser(voxels, given, timesteps)
        if absent is not None:
            without = self._denoiser(voxels, absent, timesteps)
            noise = without + self._settings.guidance * (noise - without)
        return noise[inverse].reshape(points.shape)

    def _of(self, size: float) -> tuple[Condition, Condition | None]:
        if size not in self._conditions:
            absent = None
            if self._settings.guidance != 1:  # a scan of points at the origin, all in one voxel: one point is as good
                absent = self._encode(torch.zeros_like(self._scans[:, :1]), size)
            self._conditions[size] = (self._encode(self._scans, size), absent)
        return self._conditions[size]

    def _encode(self, scans: Tensor, size: float) -> Condition:
        return self._denoiser.condition(self._encoder(voxelise(scans, size)[0]))


def complete(
    denoiser: MinkUNetDiff,
    encoder: MinkGlobalEnc,
    scans: Tensor,
    seeds: Sequence[int],
    settings: CompletionSettings = DEFAULT_COMPLETION,
) -> Tensor:
    """Completions (B, copies * P, 3) of scans (B, P, 3), in metres. Each depends on its own scan and seed alone, up to the
    order of adding. Networks are used in the mode they are in; wrap in ``torch.no_grad`` unless gradients are wanted.

    Raises:
        UserError: another number of seeds than scans; empty scans or points that are not finite.
    """
    if len(seeds) != len(scans):
        raise UserError(f"every scan needs its seed, found {len(seeds)} seeds for {len(scans)} scans")
    guided = GuidedDenoiser(denoiser, encoder, scans, settings)
    schedule = noise_schedule()
    start = scans.repeat(1, settings.copies, 1)

    def drawn(purpose: str, step: int) -> Tensor:
        draws = [torch.randn(start.shape[1:], generator=rng(seed, "completion", purpose, step)) for seed in seeds]
        return torch.stack(draws).to(start)

    first = settings.noise_scale * drawn("start", 0)
    noises: Callable[[int], Tensor] = lambda step: drawn("step", step)  # noqa: E731
    if settings.formulation == "vanilla":
        levels = torch.full((len(scans),), settings.solver.start - 1)
        noisy = add_noise(schedule, start, first, levels, "vanilla")
        return solve(noisy, guided, noises, schedule, settings.solver)
    return start + solve(first, lambda offsets, level: guided(start + offsets, level), noises, schedule, settings.solver)


def postprocess(completion: np.ndarray, scan: np.ndarray, *, max_range: float = 50.0) -> np.ndarray:
    """The points of a completion (N, 3) that count: nearer than ``max_range``, below the scan's highest point, and above the
    mean of its heights less two standard deviations (of P - 1). All the projects do so."""
    height = scan[:, 2]
    low, high = height.mean() - 2 * height.std(ddof=1), height.max()
    inside = np.linalg.norm(completion, axis=1) < max_range
    return completion[inside & (completion[:, 2] > low) & (completion[:, 2] < high)]


def refine(network: MinkUNet, points: Tensor, *, voxel: float = VOXEL) -> Tensor:
    """Points (B, N, 3) to (B, K N, 3): K = 6 copies of each, moved by the refinement network's offsets of up to a metre; the
    copies of a point lie beside each other."""
    voxels, inverse = voxelise(points, voxel)
    offsets = network(voxels)[inverse].reshape(*points.shape[:2], -1, 3)
    return (points.unsqueeze(2) + offsets).reshape(len(points), -1, 3)
