"""Completing scans as a modality of the core: the denoiser is the policy, the encoder of the scan stands still.

With this, preferences between completions train LiDiff directly (Diffusion-DPO; it is how the teacher of Distillation-DPO's
starred rows was made), by any objective that takes denoising likelihoods and with any reference seat.

Letters: G pairs, K = 2 candidates, U noise levels drawn for a pair, P points of a scan, N points of a completion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import Draws, TimestepSampling, denoising_scores, draw
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.scores import Scores
from polyalign.modalities.lidar.assistants import LowRankChange, low_rank_copy, merged
from polyalign.modalities.lidar.checkpoints import open_completion, save_completion
from polyalign.modalities.lidar.completion import CompletionSettings, GuidedDenoiser, ScanEncodings, complete
from polyalign.modalities.lidar.diffusion import Formulation, noise_schedule
from polyalign.modalities.lidar.layers import freeze_statistics
from polyalign.modalities.lidar.sparse import voxelise

TINY_BASE = Path(__file__).parent / "tiny_base" / "completion.safetensors"
CHECKPOINT = "completion.safetensors"
CANDIDATES = ("chosen", "rejected")


@dataclass(frozen=True)
class LidarModelSettings:
    """Args:
    base: ``tiny``, or the path of a checkpoint of LiDiff, ScoreLiDAR, Distillation-DPO or ours.
    layout: of the checkpoint, see ``checkpoints.LAYOUTS``; by default what it has.
    train, rank: all weights of the denoiser, or low-rank changes to them.
    completion: how completions are sampled; also the voxel size and the formulation that the base was trained with.
    timesteps_per_pair, timesteps: noise levels of a pair in a step, and from which they are drawn.
    """

    base: str = "tiny"
    layout: str | None = None
    device: str = "cpu"
    train: Literal["full", "lora"] = "full"
    rank: int = 8
    completion: CompletionSettings = field(default_factory=CompletionSettings)
    timesteps_per_pair: int = 1
    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    sample_batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "timesteps_per_pair", "sample_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def training_schedule(formulation: Formulation) -> NoiseSchedule:
    """The schedule that the denoiser was trained on: in the local formulation points are not scaled, a_t = 1."""
    schedule = noise_schedule()
    return schedule if formulation == "vanilla" else replace(schedule, signal=torch.ones_like(schedule.signal))


class LidarAdapter:
    """The :class:`~polyalign.core.adapter.Adapter` of LiDAR scene completion.

    Rows are {"pair_id", "condition": {"scan" (P, 3)}, "chosen" (N, 3), "rejected" (N, 3)} in metres; both candidates of a pair
    have the same number of points, since they share their noise point by point.
    """

    def __init__(self, settings: LidarModelSettings):
        self.settings = settings

    def load(self) -> Model:
        """The denoiser as network; ``parts`` are its frozen ``encoder`` and the ``schedule`` of its training.

        Raises:
            UserError: no such checkpoint, or one that does not fit.
        """
        path = TINY_BASE if self.settings.base == "tiny" else Path(self.settings.base)
        found = open_completion(path, self.settings.layout)
        device = torch.device(self.settings.device)
        parts = {
            "encoder": found.encoder.requires_grad_(False).to(device),
            "schedule": training_schedule(self.settings.completion.formulation),
        }
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Model(found.denoiser.requires_grad_(False).to(device), parts, f"{self.settings.base} sha256:{digest[:16]}")

    def trainable(self, model: Model) -> Model:
        """The model with what is trained of it. Batch statistics stand still, so that pairs do not depend on each other and an
        untouched policy scores as its reference to the last bit."""
        parts = {**model.parts, "base": model.network}
        if self.settings.train == "lora":
            network = low_rank_copy(model.network, self.settings.rank, seed=self.settings.seed)  # type: ignore[type-var]
            return replace(model, network=network, parts=parts)
        freeze_statistics(model.network)
        return replace(model, network=model.network.requires_grad_(True), parts=parts)

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        """Pairs as tensors: ``scan`` (G, P, 3) and ``points`` (G, 2, N, 3).

        Raises:
            UserError: a pair without scan, clouds that are no finite points, or of other sizes than those beside them.
        """
        scans = [_cloud(row, row["condition"].get("scan"), "condition.scan") for row in rows]
        points = [[_cloud(row, row[name], name) for name in CANDIDATES] for row in rows]
        for what, clouds in (("scan", scans), ("completion", [cloud for pair in points for cloud in pair])):
            sizes = sorted({len(cloud) for cloud in clouds})
            if len(sizes) != 1:
                raise UserError(f"every {what} of a batch needs as many points, found {sizes}; resample them first")
        tensors = {
            "scan": torch.from_numpy(np.stack(scans)),
            "points": torch.from_numpy(np.stack([np.stack(pair) for pair in points])),
        }
        target = torch.tensor([row.get("target", (1.0, 0.0)) for row in rows], dtype=torch.float32)
        return Batch(tuple(str(row["pair_id"]) for row in rows), target, tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> Draws:
        """Noise levels (G, U) and noise (G, U, N, 3), keyed by pair and step."""
        return draw(
            batch.group_ids,
            batch.tensors["points"].shape[2:],
            steps=model.parts["schedule"].steps,
            seed=self.settings.seed,
            index=step,
            units=self.settings.timesteps_per_pair,
            sampling=self.settings.timesteps,
        )

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        """Minus the mean squared error of every candidate's noise. Scans are encoded once for all candidates and levels."""
        device = next(model.network.parameters()).device
        batch = batch.to(device)
        scans, how = batch.tensors["scan"], replace(self.settings.completion, guidance=1.0)
        groups, size = len(batch), how.voxel
        with torch.no_grad():
            encodings = ScanEncodings(model.parts["encoder"], scans)
            encodings.of(size)
        guided = GuidedDenoiser(model.network, model.parts["encoder"], scans, how, encodings=encodings)  # type: ignore[arg-type]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            """Rows run over groups first, and a call takes one row of every group: these share the scans' geometry."""
            apart, told = noisy.unflatten(0, (groups, -1)), timesteps.unflatten(0, (groups, -1))
            found = []
            for row in range(apart.shape[1]):
                voxels, inverse = voxelise(apart[:, row], size)
                found.append(guided.at(voxels, inverse, told[:, row], size).reshape(apart[:, row].shape))
            return torch.stack(found, dim=1).flatten(0, 1)

        return denoising_scores(predict, batch.tensors["points"], draws, model.parts["schedule"])

    @torch.no_grad()
    def sample(self, model: Model, conditions: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[np.ndarray]:
        """Completions (N, 3) float32, each of its own scan and seed.

        Raises:
            UserError: a condition without scan, or scans of other sizes than those beside them.
        """
        device = next(model.network.parameters()).device
        scans = [_cloud({"pair_id": place}, one.get("scan"), "scan") for place, one in enumerate(conditions)]
        if len({len(scan) for scan in scans}) > 1:
            raise UserError("scans that are completed together need as many points; resample them first")
        training, made = model.network.training, []
        model.network.eval()
        for start in range(0, len(scans), self.settings.sample_batch):
            part = slice(start, start + self.settings.sample_batch)
            batch = torch.from_numpy(np.stack(scans[part])).to(device)
            found = complete(model.network, model.parts["encoder"], batch, seeds[part], self.settings.completion)  # type: ignore[arg-type]
            made += list(found.float().cpu().numpy())
        model.network.train(training)
        return made

    def export(self, model: Model, folder: Path) -> None:
        """Denoiser and encoder in LiDiff's names, low-rank changes made part of the weights: ``base`` opens it again."""
        network = model.network
        if any(isinstance(module, LowRankChange) for module in network.modules()):
            network = merged(network, model.parts["base"])
        folder.mkdir(parents=True, exist_ok=True)
        save_completion(folder / CHECKPOINT, network, model.parts["encoder"])


def _cloud(row: Row, points: Any, name: str) -> np.ndarray:
    """(n, 3) float32."""
    try:
        cloud = np.atleast_1d(np.asarray(() if points is None else points, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise UserError(f"pair {row['pair_id']!r}: {name} is no table of numbers ({error})") from error
    if cloud.ndim != 2 or cloud.shape[1:] != (3,) or not len(cloud):
        found = "none" if points is None else cloud.shape
        raise UserError(f"pair {row['pair_id']!r}: {name} has to be points (n, 3), found {found}")
    if not np.isfinite(cloud).all():
        raise UserError(f"pair {row['pair_id']!r}: {name} has points that are NaN or infinite; drop them")
    return cloud
