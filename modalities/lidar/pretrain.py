"""Train the embedded base: ``python -m polyalign.modalities.lidar.pretrain FOLDER``.

A narrow MinkUNetDiff with its encoder learns LiDiff's objective on small scenes of the world `streets`. At the end it is gated,
on streets that are held out: completing in 8 steps must bring it clearly nearer to the ground truth than its input is, and a
single step must be clearly worse than 8, or there would be nothing to distil.

Adam with a warm-up and a cosine, and an exponential moving average of weights and batch statistics, which is what is kept. For
the last part of the training the batch statistics stand still, as they do when scans are completed. Levels are stratified over
a batch, and a tenth of the scans is replaced by points at the origin, for guidance. Every draw is keyed by its step, so that a
killed run continues to the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyalign.core.randomness import rng, seed_of
from polyalign.datasets.lidar.samples import augmentation
from polyalign.modalities.lidar.checkpoints import CompletionNetworks, open_completion, save_completion
from polyalign.modalities.lidar.completion import CompletionSettings
from polyalign.modalities.lidar.diffusion import SolverSettings, add_noise, denoising_loss, noise_schedule
from polyalign.modalities.lidar.layers import freeze_statistics
from polyalign.modalities.lidar.measuring import completions, means, qualities
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff, scaled
from polyalign.modalities.lidar.scenes import Scene, SceneSettings, scenes
from polyalign.modalities.lidar.sparse import voxelise
from polyalign.modalities.pretraining import Pace, Stage, Work, command_line, digest, unfit_in_words, write_record

MODULE = "polyalign.modalities.lidar.pretrain"
WEIGHTS = "completion.safetensors"
VOXEL = 0.2
"""Of the small scenes, in metres: their points lie a metre apart, so a neighbour within a few voxels is rare in smaller
ones."""
GUIDANCE = 3.5
"""Distillation-DPO's. In many steps it makes little difference to the embedded base, in few it makes it worse."""
NOISE_SCALE = 0.6
"""Of the starting noise, in metres. Of 8 steps of a half-trained base without guidance, the Chamfer distance was 0.55 m with
1.0 and 0.37 m with 0.6 (input: 0.52 m)."""
SIZE_LIMIT = 6_000_000


@dataclass(frozen=True)
class Settings:
    """What the shipped weights are trained with; the command line changes ``steps`` only, for trials."""

    seed: int = 20261121
    steps: int = 4_000
    batch: int = 8
    rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.998
    frozen_from: float = 0.7
    width: float = 0.25
    unconditional: float = 0.1
    regularisation: float = 5.0
    streets: int = 120
    measured_streets: int = 12
    save_every: int = 500
    scenes: SceneSettings = field(default_factory=SceneSettings)


def completion_settings(steps: int, scenes_of: SceneSettings, *, guidance: float = GUIDANCE) -> CompletionSettings:
    """How the embedded base completes a small scene: without fresh noise in the steps. Points of small scenes lie so far apart
    that the noise is never all taken away again; in a trial the Chamfer distance of 8 steps was 0.67 m without and 0.85 m with
    it."""
    solver = SolverSettings(steps, stochastic=False)
    return CompletionSettings(solver, guidance=guidance, copies=scenes_of.copies, noise_scale=NOISE_SCALE, voxel=VOXEL)


class Networks(nn.Module):
    """The two that are trained together."""

    def __init__(self, width: float):
        super().__init__()
        self.denoiser = MinkUNetDiff(scaled(width))
        self.encoder = MinkGlobalEnc(scaled(width))

    def forward(self, noisy: Tensor, scans: Tensor, levels: Tensor) -> Tensor:
        condition = self.denoiser.condition(self.encoder(voxelise(scans, VOXEL)[0]))
        voxels, inverse = voxelise(noisy, VOXEL)
        return self.denoiser(voxels, condition, levels)[inverse].reshape(noisy.shape)


@dataclass(frozen=True)
class Drawn:
    """One step's batch: scans (B, P, 3), some of them without a scan; ground truth and noise (B, F, 3); levels (B,)."""

    scans: Tensor
    full: Tensor
    noise: Tensor
    levels: Tensor


def draw(given: Sequence[Scene], settings: Settings, step: int) -> Drawn:
    """The batch of a step, from its number alone."""
    generator = np.random.default_rng(seed_of(settings.seed, "lidar base", step))
    scans, full = [], []
    for place in generator.integers(len(given), size=settings.batch):
        scene, matrix = given[int(place)], augmentation(generator)
        absent = generator.random() < settings.unconditional
        scans.append(np.zeros_like(scene.scan) if absent else scene.scan @ matrix.T)
        full.append(scene.full(settings.scenes.full_points, generator) @ matrix.T)
    schedule = noise_schedule()
    spread = (np.arange(settings.batch) + generator.random(settings.batch)) / settings.batch
    levels = torch.tensor((spread * schedule.steps).astype(np.int64))
    truth = torch.tensor(np.stack(full), dtype=torch.float32)
    noise = torch.randn(truth.shape, generator=rng(settings.seed, "lidar noise", step))
    return Drawn(torch.tensor(np.stack(scans), dtype=torch.float32), truth, noise, levels)


class Training:
    """The networks in a :class:`Stage`. From ``frozen_from`` of the steps on, batch normalisation takes averaged statistics.

    Raises:
        UserError: the state on disk is of another run.
    """

    def __init__(self, given: Sequence[Scene], settings: Settings, folder: Path):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.networks = Networks(settings.width)
        self.given, self.settings, self.schedule = given, settings, noise_schedule()
        optimizer = torch.optim.Adam(self.networks.parameters(), lr=settings.rate, betas=(0.9, 0.99))
        pace = Pace(settings.steps, settings.rate, settings.warmup, settings.ema, settings.save_every)
        self.stage = Stage("scenes", self.networks, optimizer, pace, Work(folder, asdict(settings)))

    def run(self, watch: Any) -> None:
        """``watch(networks)`` is called at every save with the averaged weights in them, in evaluation mode."""

        def watched() -> Any:
            self.networks.eval()
            found = watch(self.networks)
            self.networks.train()
            return found

        self.stage.run(self._loss, watched, before=self._freeze)

    def _freeze(self, step: int) -> None:
        """From ``frozen_from`` on the averaged batch statistics, and no others; a run that goes on has them in its state."""
        first = round(self.settings.frozen_from * self.settings.steps)
        if step == first:
            statistics = {key: value for key, value in self.stage.average.items() if ".running_" in key}
            self.networks.load_state_dict(statistics, strict=False)
        if step == first or step == self.stage.start > first:
            freeze_statistics(self.networks)

    def _loss(self, step: int) -> Tensor:
        drawn = draw(self.given, self.settings, step)
        noisy = add_noise(self.schedule, drawn.full, drawn.noise, drawn.levels, "local")
        predicted = self.networks(noisy, drawn.scans, drawn.levels)
        return denoising_loss(predicted, drawn.noise, regularisation=self.settings.regularisation)


def measure(
    networks: Networks | CompletionNetworks, given: Sequence[Scene], settings: Settings, steps: Sequence[int] = (1, 2, 8)
) -> dict[str, float]:
    """Mean Chamfer distance in metres and JSD (from above) over scenes: of the input, copied and not moved, and of completions
    in so many steps. The same scenes, seeds and ground truth for all."""
    clouds = {"input": [scene.scan.astype(np.float64) for scene in given]}
    for number in steps:
        how = completion_settings(number, settings.scenes)
        clouds[str(number)] = completions(networks.denoiser, networks.encoder, given, how, settings.seed)
    figures: dict[str, float] = {}
    for name, made in clouds.items():
        found = means(qualities(made, given, settings.seed))
        figures |= {f"{metric}_{name}": round(value, 4) for metric, value in found.items()}
    return figures


def unfit(figures: dict[str, float]) -> str | None:
    """Why a base with these figures is none to align, or None."""
    if figures["cd_8"] > 0.9 * figures["cd_input"]:
        return f"8 steps end {figures['cd_8']} m from the ground truth, its input {figures['cd_input']} m: it does not complete"
    if figures["cd_1"] < 1.3 * figures["cd_8"]:
        return f"one step ends {figures['cd_1']} m from the ground truth and 8 end {figures['cd_8']} m: nothing to distil"
    return None


def pretrain(folder: Path, settings: Settings, options: Sequence[str] = ("FOLDER",)) -> dict[str, Any]:
    """Train a base and write it to ``folder`` with ``base.json``, its record, which is returned. ``options`` are the words of
    the command line, for the record.

    Raises:
        UserError: the state in ``FOLDER.work`` is of a run with other settings.
    """
    started = time.time()
    work = folder.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    given = scenes("train", range(settings.streets), settings.scenes, seed=settings.seed)
    held_out = scenes("heldout", range(settings.measured_streets), settings.scenes, seed=settings.seed)
    training = Training(given, settings, work)
    training.run(lambda networks: measure(networks, held_out[::3], settings))
    kept = training.networks.eval().to(torch.float16)
    save_completion(folder / WEIGHTS, kept.denoiser, kept.encoder)
    opened = open_completion(folder / WEIGHTS)  # measured as it is shipped: rounded to float16
    found = {
        "world": "streets",
        "settings": asdict(settings),
        "voxel": VOXEL,
        "sha256": digest(folder),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "figures": measure(opened, held_out, settings),
    }
    return write_record(folder, found, started=started, module=MODULE, options=options)


def main(argv: Sequence[str] | None = None) -> None:
    def train(folder: Path, lengths: dict[str, int], words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        record = pretrain(folder, Settings(**lengths), words)
        if record["bytes"] > SIZE_LIMIT:
            return record, f"this base takes {record['bytes']} bytes; {SIZE_LIMIT} may be shipped"
        return record, unfit_in_words(unfit(record["figures"]))

    command_line(argv, __doc__, {"steps": Settings.steps}, train)


if __name__ == "__main__":
    main()
