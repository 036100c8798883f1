"""The published order of work of scene completion, on our layers: what ours is measured against.

As in the pipelines of LiDiff and Distillation-DPO, every step and every guidance branch voxelises anew, builds its kernel maps
anew, encodes the scan anew (copied as often as the completion has points of it, and as many zeros where there is no scan),
searches the nearest encoded voxel of every voxel anew before each of the eight stages, over all pairs, and computes the
condition's weights for every voxel of every stage. Convolutions and solver are ours, so that only the order of work differs;
ties of the search go as ours do, so that the outputs are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyalign.modalities.lidar.completion import VOXEL, CompletionSettings, course
from polyalign.modalities.lidar.diffusion import noise_schedule, solve
from polyalign.modalities.lidar.layers import concatenate, timestep_embedding
from polyalign.modalities.lidar.minkunet import STAGES, MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.sparse import TIE_BREAK, SparseTensor, voxelise

ROWS = 1 << 22
"""Distances that are held at once."""


def nearest_of_all(voxels: Tensor, others: Tensor) -> Tensor:
    """(V,) nearest of ``others`` (W, 4) to each of ``voxels`` (V, 4) of the same single cloud, over all pairs: by
    |b|^2 - 2 a b, which is least where |a - b|^2 is."""
    asking = voxels[:, 1:].double() + torch.tensor(TIE_BREAK, dtype=torch.float64, device=voxels.device)
    goals = others[:, 1:].double()
    lengths = goals.pow(2).sum(dim=1)
    rows = max(1, ROWS // len(goals))
    return torch.cat([torch.addmm(lengths, part, goals.T, alpha=-2.0).argmin(dim=1) for part in asking.split(rows)])


def forward(network: MinkUNetDiff, x: SparseTensor, encoded: SparseTensor, timesteps: Tensor) -> Tensor:
    """Noise (V, 3): every stage searches, and weights every voxel for itself."""
    embedding = timestep_embedding(timesteps, network.embedding_size).to(x.features.dtype)

    def weighted(x: SparseTensor, stage: str) -> SparseTensor:
        matched = encoded.features[nearest_of_all(x.coordinates, encoded.coordinates)]
        latent = getattr(network, f"latent_{stage}")(matched)
        time = getattr(network, f"{stage}_temp")(embedding)[x.coordinates[:, 0]]
        both = (time, latent) if stage == "up1" else (latent, time)
        return x.of(x.features * getattr(network, f"latemp_{stage}")(torch.cat(both, dim=1)))

    x = network.stem(x)  # type: ignore[operator]
    skips = [x]
    for stage in STAGES[:4]:
        x = getattr(network, stage)(weighted(x, stage))
        skips.append(x)
    for stage, skip in zip(STAGES[4:], skips[-2::-1], strict=True):
        transposed, blocks = getattr(network, stage)
        x = blocks(concatenate(transposed(weighted(x, stage)), skip))
    return network.last(x.features)


def complete(
    denoiser: MinkUNetDiff, encoder: MinkGlobalEnc, scans: Tensor, seeds: Sequence[int], settings: CompletionSettings
) -> Tensor:
    """Completion (1, N, 3) of a scan (1, P, 3), as ``completion.complete`` gives it."""
    copied = scans.repeat(1, settings.copies, 1)

    def noise(points: Tensor, level: int) -> Tensor:
        found = []
        for condition in (copied, torch.zeros_like(copied)):
            voxels, inverse = voxelise(points, VOXEL)
            encoded = encoder(voxelise(condition, VOXEL)[0])
            levels = torch.full((1,), level, device=points.device)
            found.append(forward(denoiser, voxels, encoded, levels)[inverse].reshape(points.shape))
        given, absent = found
        return absent + settings.guidance * (given - absent)

    schedule = noise_schedule()
    begun = course(scans, seeds, settings, schedule)
    found = solve(begun.x, lambda x, level: noise(begun.base + x, level), begun.noises, schedule, settings.solver)
    return begun.base + found
