"""LiDiff's training (CVPR 2024) as an :class:`~polyalign.core.algorithm.Algorithm`: denoiser and encoder learn from scans and
ground truth.

Letters: G scans of a batch, P points of a scan, F points of its ground truth, T noise levels.

For each scan a level t ~ U{0..T-1} and noise; the denoiser predicts the noise of the noised ground truth, given the encoded
scan. For guidance, a share of the scans is replaced by points at the origin. Every draw is keyed by scan and step.

Differences from the published code (PRBonn/LiDiff@570e73c): there no scan is replaced in a batch of one, and the learning rate
is halved every five epochs (the recipe's schedule here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Row
from polyalign.core.algorithm import Layout, Rows
from polyalign.core.candidates import Batch
from polyalign.core.objectives import Outcome
from polyalign.core.randomness import rng
from polyalign.modalities.lidar.algorithm import scans_and_truths
from polyalign.modalities.lidar.completion import CompletionSettings
from polyalign.modalities.lidar.diffusion import add_noise, noise_schedule
from polyalign.modalities.lidar.layers import freeze_statistics
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.sparse import voxelise

TEACHER = "teacher"


class CompletionPair(nn.Module):
    """Denoiser and encoder, which are trained together."""

    def __init__(self, denoiser: MinkUNetDiff, encoder: MinkGlobalEnc):
        super().__init__()
        self.denoiser, self.encoder = denoiser, encoder

    def forward(self, noisy: Tensor, scans: Tensor, levels: Tensor, voxel: float) -> Tensor:
        """Noise (G, F, 3)."""
        condition = self.denoiser.condition(self.encoder(voxelise(scans, voxel)[0]))
        voxels, inverse = voxelise(noisy, voxel)
        return self.denoiser(voxels, condition, levels)[inverse].reshape(noisy.shape)


class TeacherTraining:
    """The algorithm. Its one network is ``teacher``; rows are {"pair_id", "scan" (P, 3), "full" (F, 3)} in metres.

    Args:
        completion: voxel size and formulation.
        regularisation: r of r (mean(predicted)^2 + (std(predicted) - 1)^2), over the whole batch, as published.
        unconditional: share of scans replaced by none.
        frozen_statistics: keep the base's batch statistics.
        seed: keys every draw.
    """

    def __init__(
        self,
        denoiser: MinkUNetDiff,
        encoder: MinkGlobalEnc,
        completion: CompletionSettings,
        *,
        regularisation: float = 5.0,
        unconditional: float = 0.1,
        frozen_statistics: bool = False,
        seed: int = 0,
    ):
        self.pair = CompletionPair(denoiser.requires_grad_(True), encoder.requires_grad_(True))
        if frozen_statistics:
            freeze_statistics(self.pair)
        self.networks: dict[str, nn.Module] = {TEACHER: self.pair}
        self.group_separable = frozen_statistics and regularisation == 0
        self.completion, self.schedule, self.seed = completion, noise_schedule(), seed
        self.regularisation, self.unconditional = regularisation, unconditional

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        """Nothing: the trainer knows the network, and there is no other."""

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        """See :func:`~polyalign.modalities.lidar.algorithm.scans_and_truths`."""
        return scans_and_truths(rows)

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        full, scans = batch.tensors["full"], batch.tensors["scan"]
        generators = [rng(self.seed, "lidiff", step, group) for group in batch.group_ids]
        absent = torch.tensor([float(torch.rand((), generator=one)) < self.unconditional for one in generators])
        levels = torch.cat([torch.randint(self.schedule.steps, (1,), generator=one) for one in generators]).to(full.device)
        noise = torch.stack([torch.randn(full.shape[1:], generator=one) for one in generators]).to(full)
        scans = scans.masked_fill(absent.to(scans.device).reshape(-1, 1, 1), 0.0)
        noisy = add_noise(self.schedule, full, noise, levels, self.completion.formulation)
        predicted = self.networks[TEACHER](noisy, scans, levels, self.completion.voxel)
        error = (predicted - noise).pow(2).flatten(1).mean(dim=1)
        loss = error
        if self.regularisation:
            loss = error + self.regularisation * (predicted.mean().pow(2) + (predicted.std() - 1).pow(2))
        return {TEACHER: Outcome(loss, {"error": error.detach()})}

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing follows from a step."""

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Batch statistics, which are no weights and yet change."""
        return {"buffers": {name: value.detach().cpu().clone() for name, value in self.pair.named_buffers()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.pair.named_buffers():
            value.copy_(state["buffers"][name])
