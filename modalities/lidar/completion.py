"""Completing scans with a denoiser and its encoder, and refining what comes out.

Letters: B scans, P points of a scan, N = copies * P points of a completion.

Against the published order of work, at equal output: the scan is encoded once and not in every step and guidance branch,
without scan once per network width of voxels; both branches share voxels, kernel maps and look-ups of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.randomness import rng
from polyalign.datasets.lidar.filters import COMPLETION_SCAN, PointFilter, farthest_points
from polyalign.modalities.lidar.diffusion import Formulation, SolverSettings, add_noise, noise_schedule, solve
from polyalign.modalities.lidar.minkunet import Condition, MinkGlobalEnc, MinkUNet, MinkUNetDiff
from polyalign.modalities.lidar.sparse import SparseTensor, voxelise

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


class ScanEncodings:
    """A fixed batch of scans as an encoder sees them, and the absence of a scan, computed once for each voxel size in use and
    shared by all denoisers that work with that encoder."""

    def __init__(self, encoder: MinkGlobalEnc, scans: Tensor):
        self._encoder, self._scans = encoder, scans
        self._encoded: dict[tuple[float, bool], SparseTensor] = {}

    def of(self, size: float, *, absent: bool = False) -> SparseTensor:
        if (size, absent) not in self._encoded:
            # A scan of points at the origin, all in one voxel, stands for no scan: one point is as good.
            points = torch.zeros_like(self._scans[:, :1]) if absent else self._scans
            self._encoded[size, absent] = self._encoder(voxelise(points, size)[0])
        return self._encoded[size, absent]


class GuidedDenoiser:
    """A denoiser with guidance for a fixed batch of scans. What the scans and the absence of one give is computed once for each
    voxel size in use."""

    def __init__(
        self,
        denoiser: MinkUNetDiff,
        encoder: MinkGlobalEnc,
        scans: Tensor,
        settings: CompletionSettings,
        *,
        encodings: ScanEncodings | None = None,
    ):
        self._denoiser, self._settings = denoiser, settings
        self._encodings = encodings or ScanEncodings(encoder, scans)
        self._conditions: dict[float, tuple[Condition, Condition | None]] = {}

    def __call__(self, points: Tensor, level: int) -> Tensor:
        """Noise (B, N, 3) of points (B, N, 3)."""
        size = self._settings.voxel_at(level)
        levels = torch.full((len(points),), level, device=points.device)
        return self.at(*voxelise(points, size), levels, size).reshape(points.shape)

    def begin(self) -> None:
        """Make what the scans give ready now, in the gradient mode of now: steps without gradient would otherwise leave it
        without for those that have one."""
        self._of(self._settings.voxel)

    def at(self, voxels: SparseTensor, inverse: Tensor, levels: Tensor, size: float) -> Tensor:
        """Noise (B * N, 3) of points that are voxels of ``size`` already, at levels (B,)."""
        given, absent = self._of(size)
        begun = self._denoiser.begin(voxels)
        noise = self._denoiser(voxels, given, levels, begun=begun)
        if absent is not None:
            without = self._denoiser(voxels, absent, levels, begun=begun)
            noise = without + self._settings.guidance * (noise - without)
        return noise[inverse]

    def _of(self, size: float) -> tuple[Condition, Condition | None]:
        if size not in self._conditions:
            absent = None
            if self._settings.guidance != 1:
                absent = self._denoiser.condition(self._encodings.of(size, absent=True))
            self._conditions[size] = (self._denoiser.condition(self._encodings.of(size)), absent)
        return self._conditions[size]


@dataclass(frozen=True)
class Course:
    """Where sampling begins: ``x`` (B, N, 3) is what the solver works on, ``base`` (B, N, 3) or 0 what has to be added for
    points, and ``noises`` what each step may add."""

    x: Tensor
    base: Tensor | float
    noises: Callable[[int], Tensor]


def course(scans: Tensor, seeds: Sequence[int], settings: CompletionSettings, schedule: NoiseSchedule) -> Course:
    """The beginning of sampling for scans (B, P, 3), by their seeds alone."""
    start = scans.repeat(1, settings.copies, 1)

    def drawn(purpose: str, step: int) -> Tensor:
        draws = [torch.randn(start.shape[1:], generator=rng(seed, "completion", purpose, step)) for seed in seeds]
        return torch.stack(draws).to(start)

    first = settings.noise_scale * drawn("start", 0)
    noises = partial(drawn, "step")
    if settings.formulation == "local":
        return Course(first, start, noises)
    levels = torch.full((len(scans),), settings.solver.start - 1)
    return Course(add_noise(schedule, start, first, levels, "vanilla"), 0.0, noises)


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
    guided, schedule = GuidedDenoiser(denoiser, encoder, scans, settings), noise_schedule()
    begun = course(scans, seeds, settings, schedule)
    found = solve(begun.x, lambda x, level: guided(begun.base + x, level), begun.noises, schedule, settings.solver)
    return begun.base + found


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
