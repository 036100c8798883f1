"""A denoising model small enough to be trained in a test, and its pictures: one bright spot at one of eight places.

A picture is 12 by 12, its spot small or large. The prompt says at which place the spot belongs; any size is right.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from zoo_world import THINGS, Prompt, every_prompt, taught  # pyright: ignore[reportMissingImports]

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.likelihood.denoising import Draws, denoising_scores, draw, rows_of
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.randomness import rng
from polyalign.core.scores import Scores

SIDE = 12
LEVELS = 100
PLACES = [(3, 3), (3, 8), (8, 3), (8, 8), (1, 5), (10, 5), (5, 1), (5, 10)]
RADII = (1.0, 1.9)

BETA = {"value": 50.0, "convention": "mean_half"}
OBJECTIVE = {"anchor": 1.0}
TRAIN = {
    "steps": 60,
    "batch_size": 32,
    "micro_batch_size": 32,
    "optimizer": {"learning_rate": 3e-3},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "save_every": 1000,
}


class Denoiser(nn.Module):
    """(N, 144), level (N,), condition (N, 17) -> the clean picture (N, 144)."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(2 * THINGS + 1 + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.inwards = nn.Linear(SIDE * SIDE, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width)) for _ in range(3))
        self.outwards = nn.Linear(width, SIDE * SIDE)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        level = timesteps.float().unsqueeze(1) / LEVELS
        signal = self.condition(torch.cat([condition, level, level.square()], 1))
        hidden = self.inwards(noisy) + signal
        for block in self.blocks:
            hidden = hidden + block(hidden + signal)
        return self.outwards(hidden)


def encode(prompt: Prompt) -> Tensor:
    condition = torch.zeros(2 * THINGS + 1)
    condition[prompt.first] = condition[THINGS + prompt.second] = 1.0
    condition[-1] = 1.0 if prompt.asked else -1.0
    return condition


def drawn(place: int, radius: float, generator: torch.Generator) -> Tensor:
    """A picture (144,) in -1..1."""
    row, column = PLACES[place]
    shift = 0.4 * torch.randn(2, generator=generator)
    grid = torch.arange(SIDE, dtype=torch.float32)
    away = (grid[:, None] - row - shift[0]) ** 2 + (grid[None, :] - column - shift[1]) ** 2
    return (2.0 * torch.exp(-away / (2 * radius**2)) - 1.0).flatten()


def as_png(picture: Tensor) -> bytes:
    """The file of a picture (144,), in 32 grey levels: fewer would hide its spot, more would keep the sampler's noise."""
    levels = ((picture.clamp(-1, 1) + 1) / 2 * 31).round().to(torch.uint8) * 8
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(SIDE, SIDE).numpy(), "L").save(buffer, "PNG")
    return buffer.getvalue()


def from_png(content: bytes) -> Tensor:
    pixels = torch.frombuffer(bytearray(Image.open(io.BytesIO(content)).tobytes()), dtype=torch.uint8)
    return pixels.float() / 248 * 2 - 1


def drawn_plain(place: int, radius: float) -> Tensor:
    row, column = PLACES[place]
    grid = torch.arange(SIDE, dtype=torch.float32)
    return (2.0 * torch.exp(-((grid[:, None] - row) ** 2 + (grid[None, :] - column) ** 2) / (2 * radius**2)) - 1.0).flatten()


TEMPLATES = torch.stack([drawn_plain(place, radius) for place in range(THINGS) for radius in RADII])


def found_place(picture: Tensor) -> int | None:
    """The place of the spot; None for a picture that is no spot at one of the places."""
    errors = (TEMPLATES - picture).square().mean(1)
    best = int(errors.argmin())
    return best // len(RADII) if float(errors[best]) < 0.12 else None


def ink(content: bytes) -> float:
    return float((from_png(content) + 1).mean())


class SpotsJudge:
    """1 where the spot is at the place asked for, 0 where it is at another, -1 where there is none."""

    name, version, broken_below, right_from = "spots", "1", 0.0, 1.0

    def score(self, prompts: Sequence[Prompt], outputs: Sequence[bytes]) -> list[float]:
        places = [found_place(from_png(output)) for output in outputs]
        return [-1.0 if place is None else float(place == prompt.answer) for prompt, place in zip(prompts, places, strict=True)]


class SpotsAdapter:
    """The adapter contract for the denoiser."""

    modality = "image"

    def __init__(self, base: dict[str, Tensor]):
        self.base = base

    def load(self) -> Model:
        network = Denoiser()
        network.load_state_dict(self.base)
        return Model(network, {"schedule": schedule()}, "spots")

    def trainable(self, model: Model) -> Model:
        return model

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        groups = [Group(row["pair_id"], (Candidate(None, None), Candidate(None, None))) for row in rows]
        tensors = {
            "latents": torch.stack([torch.stack([from_png(row["chosen"]), from_png(row["rejected"])]) for row in rows]),
            "condition": torch.stack([encode(row["asked"]) for row in rows]),
        }
        return Batch.of_groups(groups, tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> Draws:
        return draw(batch.group_ids, (SIDE * SIDE,), steps=LEVELS, seed=0, index=step)

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        condition = rows_of(batch.tensors["condition"], 2, draws.timesteps.shape[1], per_candidate=False)
        return denoising_scores(
            lambda noisy, timesteps: model.network(noisy, timesteps, condition),
            batch.tensors["latents"],
            draws,
            model.parts["schedule"],
            prediction_type="sample",
        )

    @torch.no_grad()
    def sample(self, model: Model, conditions: Sequence[Prompt], seeds: Sequence[int]) -> list[bytes]:
        """DDIM in ten steps."""
        table = model.parts["schedule"]
        condition = torch.stack([encode(prompt) for prompt in conditions])
        noisy = torch.stack([torch.randn(SIDE * SIDE, generator=rng(seed, "sample")) for seed in seeds])
        levels = torch.linspace(LEVELS - 1, 0, 10).round().long().tolist()
        clean = noisy
        for level, following in zip(levels, [*levels[1:], None], strict=True):
            clean = model.network(noisy, torch.full((len(noisy),), level), condition).clamp(-1, 1)
            noise = (noisy - table.signal[level] * clean) / table.noise[level]
            if following is not None:
                noisy = table.signal[following] * clean + table.noise[following] * noise
        return [as_png(picture) for picture in clean]

    def export(self, model: Model, folder: Path) -> None: ...


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_alphas_cumprod((1 - torch.linspace(1e-3, 0.1, LEVELS)).cumprod(0))


def right_answer(prompt: Prompt, seed: int) -> bytes:
    generator = rng(seed, "truth")
    return as_png(drawn(prompt.answer, RADII[seed % 2], generator))


def garbage(prompt: Prompt, seed: int) -> bytes:
    """A picture that the base would never draw: stripes."""
    generator = rng(seed, "garbage")
    return as_png(torch.randint(0, 2, (SIDE * SIDE,), generator=generator).float() * 2 - 1)


def trained_base(steps: int = 1500) -> dict[str, Tensor]:
    """The weights of a base that has learnt the data with their mistakes."""
    generator, chooser = rng(0, "spots"), random.Random(0)
    torch.manual_seed(0)
    network, table, known = Denoiser(), schedule(), every_prompt()
    rows: list[tuple[Tensor, Tensor]] = []
    for _ in range(6000):
        prompt = chooser.choice(known)
        rows.append((encode(prompt), drawn(taught(prompt, chooser), chooser.choice(RADII), generator)))
    conditions, pictures = (torch.stack(column) for column in zip(*rows, strict=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (128,), generator=generator)
        levels = torch.randint(LEVELS, (128,), generator=generator)
        noise = torch.randn(128, SIDE * SIDE, generator=generator)
        noisy = table.add_noise(pictures[chosen], noise, levels)
        loss = (network(noisy, levels, conditions[chosen]) - pictures[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
