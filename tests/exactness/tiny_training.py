"""A real training in miniature: a small convolutional denoiser with a peft LoRA, pairs, DPO, the trainer.

Tests import it; tests of several processes and of kills run it as a script: ``python tiny_training.py FOLDER [options]``.
"""

# ruff: isort: off
from __future__ import annotations

import polyalign  # noqa: F401  (first, as in conftest.py: arms the repair of CPU wheels)

# ruff: isort: on
import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from polyalign.core.adapter import Model, Row
from polyalign.core.algorithm import DirectPreference
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.likelihood.denoising import Draws, denoising_scores, draw, rows_of
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.objectives import AutoBeta, Beta, Objective, Term
from polyalign.core.randomness import rng, seed_of
from polyalign.core.recipe import AutoBetaConfig, BetaConfig, OptimizerConfig, ReferenceConfig, ScheduleConfig, TrainSettings
from polyalign.core.references import Seat, build_seat
from polyalign.core.scores import Scores
from polyalign.core.trainer import Trainer

SHAPE = (3, 6, 6)
STEPS = 100


class Denoiser(nn.Module):
    """(N, 3, 6, 6), timesteps (N,) and a condition (N, 4) -> (N, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(2, 8)
        self.condition = nn.Linear(4, 8)
        self.middle = nn.Linear(8, 8)
        self.outwards = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        level = timesteps.float().unsqueeze(1) / STEPS
        signal = self.time(torch.cat([level, 1 - level], 1)) + self.condition(condition)
        hidden = torch.nn.functional.silu(self.inwards(noisy) + signal[:, :, None, None])
        hidden = hidden + torch.nn.functional.silu(self.middle(hidden.movedim(1, -1))).movedim(-1, 1)
        return self.outwards(hidden)


class TinyAdapter:
    """The adapter contract for the denoiser; noise is keyed by pair and step, like a real one's."""

    def __init__(self, *, lora: bool = True, dropout: float = 0.0, seed: int = 0):
        self.lora, self.dropout, self.seed, self.scored = lora, dropout, seed, 0

    def load(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, "base"))
            return Model(
                Denoiser(),
                {"schedule": NoiseSchedule.from_alphas_cumprod((1 - torch.linspace(1e-3, 0.08, STEPS)).cumprod(0))},
                "tiny",
            )

    def trainable(self, model: Model) -> Model:
        if not self.lora:
            return model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, "lora"))
            config = LoraConfig(r=4, lora_alpha=4, target_modules=["inwards", "middle", "outwards"], lora_dropout=self.dropout)
            return model.with_network(get_peft_model(model.network, config))

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        groups = [Group(row["pair_id"], (Candidate(None, None), Candidate(None, None))) for row in rows]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in ("latents", "condition")}
        return Batch.of_groups(groups, tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> Draws:
        return draw(batch.group_ids, SHAPE, steps=STEPS, seed=self.seed, index=step)

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        self.scored += 1
        condition = rows_of(batch.tensors["condition"], 2, draws.timesteps.shape[1], per_candidate=False)
        return denoising_scores(
            lambda noisy, timesteps: model.network(noisy, timesteps, condition),
            batch.tensors["latents"],
            draws,
            model.parts["schedule"],
        )

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Tensor]:
        return [torch.randn(SHAPE, generator=rng(seed, "sample")) for seed in seeds]

    def export(self, model: Model, folder: Path) -> None:
        torch.save(model.network.state_dict(), folder / "network.pt")


class TinyPairs:
    """Pairs whose chosen member is smooth and whose rejected member is noise. ``broken`` has a NaN."""

    def __init__(self, count: int = 12, *, broken: int | None = None):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> dict[str, Any]:
        generator = rng(0, "pair", index)
        level = torch.randn(3, 1, 1, generator=generator)
        latents = torch.stack([level.expand(SHAPE), torch.randn(SHAPE, generator=generator)])
        if index == self.broken:
            latents[1, 0, 0, 0] = float("nan")
        return {"pair_id": f"pair-{index:03d}", "latents": latents, "condition": torch.randn(4, generator=generator)}


def settings(**changes: Any) -> TrainSettings:
    """Eight pairs a step, a learning rate that moves things visibly, and a schedule that would show a wrong step."""
    base: dict[str, Any] = {
        "steps": 6,
        "batch_size": 8,
        "micro_batch_size": 8,
        "optimizer": OptimizerConfig(learning_rate=2e-2),
        "schedule": ScheduleConfig(name="cosine", warmup_steps=2),
        "save_every": 2,
    }
    return TrainSettings(**{**base, **changes})


def reference(seat: str) -> ReferenceConfig:
    """A seat with numbers that show in six steps."""
    return ReferenceConfig(seat=seat, ema_decay=0.7, draws_per_pair=3)


def algorithm(
    folder: Path,
    *,
    seat: str | Seat = "adapter_off",
    bank: int | None = None,
    auto_beta: bool = False,
    **adapter: Any,
) -> DirectPreference:
    """DPO of the tiny denoiser."""
    kind = TinyAdapter(**adapter)
    model = kind.trainable(kind.load())
    if isinstance(seat, str):
        chosen = reference(seat)
        bank = bank or (chosen.draws_per_pair if seat == "cached" else None)
        seat = build_seat(chosen, model.network, folder=folder / "reference", identity="tiny")
    beta = BetaConfig(value=20.0, auto=AutoBetaConfig(warmup_steps=2, decay=0.5) if auto_beta else None)
    return DirectPreference(
        kind,
        model,
        Objective("dpo", (Term(),)),
        AutoBeta(beta) if auto_beta else Beta.of(beta),
        {"reference": seat},
        draw_bank=bank,
    )


def digest(folder: Path) -> str:
    """SHA-256 of the policy's weights in a checkpoint."""
    return hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--micro", type=int, default=8)
    options.add_argument("--seat", default="adapter_off")
    options.add_argument("--full", action="store_true", help="train all weights")
    options.add_argument("--shard", action="store_true", help="shard all weights with fully_shard")
    options.add_argument("--auto-beta", action="store_true")
    options.add_argument("--dropout", type=float, default=0.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    method = algorithm(
        given.folder,
        seat=given.seat,
        auto_beta=given.auto_beta,
        lora=not given.full,
        dropout=given.dropout,
    )
    chosen = settings(steps=given.steps, micro_batch_size=given.micro)
    if given.shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from polyalign.core.launch import start_accelerator

        accelerator = start_accelerator(chosen)
        network = method.networks["policy"]
        fully_shard(network, mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
    print(Trainer(method, TinyPairs(), chosen, given.folder).run())


if __name__ == "__main__":
    main()
