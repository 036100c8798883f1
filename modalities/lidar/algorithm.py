"""Distillation-DPO (arXiv 2504.11447) as an :class:`~polyalign.core.algorithm.Algorithm`: a few-step student learns from a
teacher and from preferences among its own samples.

Letters: G scans of a batch, P points of a scan, N points of a sample, M points of the ground truth.

Two phases alternate. *Assistants*: the student completes each scan twice, from different noise; a metric against the ground
truth says which is preferred; one assistant learns to denoise the preferred samples, the other the rejected ones. *Student*: it
completes twice again, and moves the preferred sample along (noise of its assistant - noise of the teacher), towards the
teacher's data, and the rejected one the other way. The teacher and the encoder of the scan stand still; all share that encoder.

Differences from the published code (happyw1nd/DistillationDPO@7a11213):

- Its student loss has no gradient at all; here it is the stop-gradient surrogate that was meant, see ``distillation``. The
  published number is logged as ``official_value``.
- The rejected term can be weighted (``loser_weight``), pairs may be drawn independently, ties are left out instead of given to
  the second sample, and training is over the timesteps of sampling (``courses``) instead of one step.
- Batch statistics stand still in all networks. There they moved, from single scans, in the student, the assistants and even the
  frozen encoder.
- The optimiser is the recipe's; there it is SGD at 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyalign.core.adapter import Row
from polyalign.core.algorithm import Layout, Rows
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives import Outcome
from polyalign.core.randomness import rng, seed_of
from polyalign.core.recipe import OptimizerConfig
from polyalign.modalities.lidar.assistants import low_rank_copy, whole_copy
from polyalign.modalities.lidar.completion import CompletionSettings, GuidedDenoiser, ScanEncodings
from polyalign.modalities.lidar.diffusion import SolverSettings, add_noise, noise_schedule
from polyalign.modalities.lidar.distillation import Sides, choose, first_wins, official_value, student_loss
from polyalign.modalities.lidar.layers import freeze_statistics
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.preference import DistanceMix
from polyalign.modalities.lidar.sparse import voxelise
from polyalign.modalities.lidar.student import Prefix, drawn_prefix, student_samples

STUDENT = "student"
ASSISTANTS = ("assistant_chosen", "assistant_rejected")
WATCHED = 5
"""Samples of a prefix whose mean distance is what the later ones are compared with."""


@dataclass(frozen=True)
class DistillationSettings:
    """Args:
    preference: without it there is one sample, one assistant and no rejected term: plain score distillation.
    completion: how samples begin; its solver's steps say nothing here, see ``courses``.
    courses: numbers of steps that the student is used with; the published training knows (1,) only.
    pairs: ``scaled``, the second sample from the first one's noise times ``noise_ratio``, as published; ``independent``,
        from noise of its own.
    mix, margin: what decides a pair, and by how much at least. A pair below the margin trains nothing.
    loser_weight: of the rejected term. At 1, as published, sampling in several steps has been seen to diverge.
    teacher_guidance: of the teacher's noise; above 1 the student learns what guidance does, and needs none itself.
    assistant_steps: steps of the assistants for each of the student.
    assistant_lead: steps at the beginning that are the assistants' alone. They start as copies of the teacher, so the first
        differences of scores are rounding and chance, of which Adam would make full steps of the student.
    assistant_rank: of low-rank assistants; None for whole copies.
    diverged: a run whose samples are so many times as far from the ground truth as its first ones is refused.
    """

    preference: bool = True
    completion: CompletionSettings = field(default_factory=lambda: CompletionSettings(SolverSettings(1), guidance=1.0))
    courses: tuple[int, ...] = (1, 2)
    pairs: Literal["scaled", "independent"] = "scaled"
    noise_ratio: float = 1.1
    mix: DistanceMix = field(default_factory=DistanceMix)
    margin: float = 0.0
    loser_weight: float = 0.3
    teacher_guidance: float = 1.0
    assistant_steps: int = 1
    assistant_lead: int = 0
    assistant_rank: int | None = None
    diverged: float = 2.0

    def __post_init__(self) -> None:
        if not self.courses or any(not 1 <= steps <= self.completion.solver.start for steps in self.courses):
            raise UserError(f"the student is trained for numbers of steps from 1 on, found {self.courses}")
        if self.assistant_steps < 1:
            raise UserError(f"assistants need at least one step for each of the student's, found {self.assistant_steps}")
        if self.assistant_lead < 0:
            raise UserError(f"assistant_lead counts steps, found {self.assistant_lead}")
        if self.completion.coarser:
            raise UserError("distillation works with one voxel size; leave out completion.coarser")


class DistillationPreference:
    """The algorithm. Its networks are ``student``, ``assistant_chosen`` and, with preferences, ``assistant_rejected``.

    Rows are {"pair_id", "scan" (P, 3), "full" (M, 3)}: a scan and its ground truth, in metres.

    Args:
        teacher, encoder: in evaluation mode; they are frozen here.
        student: a copy of the teacher unless given.
        seed: keys every draw.
    """

    group_separable = True

    def __init__(
        self,
        teacher: MinkUNetDiff,
        encoder: MinkGlobalEnc,
        settings: DistillationSettings,
        *,
        student: MinkUNetDiff | None = None,
        seed: int = 0,
    ):
        self.teacher, self.encoder = teacher.requires_grad_(False).eval(), encoder.requires_grad_(False).eval()
        self.settings, self.seed, self.schedule = settings, seed, noise_schedule()
        self.networks: dict[str, nn.Module] = {STUDENT: student or whole_copy(teacher)}
        freeze_statistics(self.networks[STUDENT])
        rank = settings.assistant_rank
        for name in ASSISTANTS if settings.preference else ASSISTANTS[:1]:
            own = seed_of(seed, "assistant", name)
            self.networks[name] = whole_copy(teacher) if rank is None else low_rank_copy(teacher, rank, seed=own)
        self.first: dict[str, list[float]] = {}
        self.recent: dict[str, float] = {}

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        self.teacher.to(layout.device)
        self.encoder.to(layout.device)

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        """See :func:`scans_and_truths`."""
        return scans_and_truths(rows)

    def student_turn(self, step: int) -> bool:
        """Whether ``step``, from 1, is one of the student's; the others are the assistants'."""
        return step > self.settings.assistant_lead and step % (self.settings.assistant_steps + 1) == 0

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        work = _Work(self, batch, step)
        return work.student() if self.student_turn(step) else work.assistants()

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        prefix = str(drawn_prefix(self.settings.courses, self.seed, step))
        distance = next(iter(statistics.values()))["distance"].double().mean().item()
        known = self.first.setdefault(prefix, [])
        if len(known) < WATCHED:
            known.append(distance)
        self.recent[prefix] = 0.8 * self.recent.get(prefix, distance) + 0.2 * distance
        start = sum(known) / len(known)
        if self.recent[prefix] > self.settings.diverged * start:
            raise UserError(
                f"distillation has diverged at step {step}: samples of step {prefix} are {self.recent[prefix]:.4g} from the "
                f"ground truth, and were {start:.4g} at first. The rejected term has no lower bound: lower loser_weight "
                f"({self.settings.loser_weight:g}) or the learning rate, or give the assistants more steps, and start anew; "
                "the last checkpoint from before is kept"
            )

    def figures(self) -> dict[str, float]:
        return {f"distance/{prefix}": value for prefix, value in sorted(self.recent.items())}

    def state_dict(self) -> dict[str, Any]:
        return {"first": {key: list(values) for key, values in self.first.items()}, "recent": dict(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = {key: [float(value) for value in values] for key, values in state["first"].items()}
        self.recent = {key: float(value) for key, value in state["recent"].items()}


@dataclass(frozen=True)
class _Pair:
    """Samples (G, N, 3) in order of preference, what decided (G,), and whether the pair counts (G,)."""

    chosen: Tensor
    rejected: Tensor | None
    statistics: dict[str, Tensor]
    counts: Tensor


class _Work:
    """One step on one batch. What the encoder makes of the scans, and geometries, are shared by all networks."""

    def __init__(self, algorithm: DistillationPreference, batch: Batch, step: int):
        self.algorithm, self.batch, self.step, self.settings = algorithm, batch, step, algorithm.settings
        self.scans = batch.tensors["scan"]
        with torch.no_grad():
            self.encodings = ScanEncodings(algorithm.encoder, self.scans)
            self.encodings.of(self.settings.completion.voxel)

    def guided(self, network: nn.Module, guidance: float) -> GuidedDenoiser:
        how = replace(self.settings.completion, guidance=guidance)
        return GuidedDenoiser(network, self.algorithm.encoder, self.scans, how, encodings=self.encodings)  # type: ignore[arg-type]

    def _seeds(self, purpose: str) -> list[int]:
        return [seed_of(self.algorithm.seed, purpose, self.step, group) for group in self.batch.group_ids]

    def _noise(self, purpose: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (G,) and noise (G, N, 3), each from its group alone."""
        generators = [rng(seed, purpose) for seed in self._seeds("noise")]
        levels = torch.cat([torch.randint(self.algorithm.schedule.steps, (1,), generator=each) for each in generators])
        noise = torch.stack([torch.randn(like.shape[1:], generator=each) for each in generators])
        return levels.to(like.device), noise.to(like)

    def sampled(self) -> _Pair:
        """Samples of the student. Gradient, where enabled, reaches it through both."""
        prefix = drawn_prefix(self.settings.courses, self.algorithm.seed, self.step)
        guided = self.guided(self.algorithm.networks[STUDENT], self.settings.completion.guidance)
        first = self._sample(guided, prefix, "sample", 1.0)
        truth = self.batch.tensors["full"]
        one = self.settings.mix.distances(first, truth)
        if not self.settings.preference:
            return _Pair(first, None, {"distance": one}, torch.ones_like(one))
        scaled = self.settings.pairs == "scaled"
        second = self._sample(
            guided, prefix, "sample" if scaled else "other sample", self.settings.noise_ratio if scaled else 1.0
        )
        two = self.settings.mix.distances(second, truth)
        wins, counts = first_wins(one, two, margin=self.settings.margin)
        chosen, rejected = choose(first, second, wins)
        statistics = {
            "distance": (one + two) / 2,
            "distance_gap": (one - two).abs(),
            "first_preferred": wins.double(),
            "counted": counts.double(),
        }
        return _Pair(chosen, rejected, statistics, counts.to(first))

    def _sample(self, guided: GuidedDenoiser, prefix: Prefix, purpose: str, ratio: float) -> Tensor:
        how = self.settings.completion
        how = replace(how, noise_scale=ratio * how.noise_scale)
        return student_samples(guided, self.scans, self._seeds(purpose), how, self.algorithm.schedule, prefix)

    def assistants(self) -> dict[str, Outcome]:
        """Each assistant's error in denoising its side's samples; of pairs that do not count, none."""
        with torch.no_grad():
            pair = self.sampled()
        outcomes = {}
        for name, samples in zip(ASSISTANTS, (pair.chosen, pair.rejected), strict=True):
            if samples is not None:
                levels, noise = self._noise(name, samples)
                noisy = add_noise(self.algorithm.schedule, samples, noise, levels, self.settings.completion.formulation)
                predicted = self._predicted([(self.algorithm.networks[name], 1.0)], noisy, levels)[0]
                error = (predicted - noise).pow(2).flatten(1).mean(dim=1)
                outcomes[name] = Outcome(pair.counts * error, {**pair.statistics, "error": error.detach()})
        return outcomes

    def student(self) -> dict[str, Outcome]:
        """The surrogate of the score differences. One level and one noise for both sides, as published."""
        pair = self.sampled()
        levels, noise = self._noise("student", pair.chosen)
        sides = []
        for name, samples in zip(ASSISTANTS, (pair.chosen, pair.rejected), strict=True):
            if samples is not None:
                sides.append(self._side(name, samples, levels, noise))
        rejected = sides[1] if len(sides) > 1 else None
        loss = pair.counts * student_loss(sides[0], rejected, loser_weight=self.settings.loser_weight)
        statistics = dict(pair.statistics)
        for side, kind in zip(sides, ("chosen", "rejected"), strict=False):
            statistics[f"score_gap_{kind}"] = (side.teacher - side.assistant).abs().flatten(1).mean(dim=1)
        if rejected is not None:
            sigma = self.algorithm.schedule.coefficients(levels, noise)[1]
            statistics["official_value"] = official_value(sides[0], rejected, noise, sigma).detach()
        return {STUDENT: Outcome(loss, statistics)}

    @torch.no_grad()
    def _noisy(self, samples: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return add_noise(self.algorithm.schedule, samples, noise, levels, self.settings.completion.formulation)

    def _side(self, assistant: str, samples: Tensor, levels: Tensor, noise: Tensor) -> Sides:
        networks = [(self.algorithm.teacher, self.settings.teacher_guidance), (self.algorithm.networks[assistant], 1.0)]
        with torch.no_grad():
            teacher, own = self._predicted(networks, self._noisy(samples, noise, levels), levels)
        return Sides(samples, teacher, own)

    def _predicted(self, networks: Sequence[tuple[nn.Module, float]], noisy: Tensor, levels: Tensor) -> list[Tensor]:
        """Noise (G, N, 3) by each network, at its guidance, of the same points: voxels and look-ups are made once."""
        size = self.settings.completion.voxel
        voxels, inverse = voxelise(noisy, size)
        return [
            self.guided(network, guidance).at(voxels, inverse, levels, size).reshape(noisy.shape)
            for network, guidance in networks
        ]


def scans_and_truths(rows: Sequence[Row]) -> Batch:
    """A batch of scans ``scan`` (G, P, 3) and ground truths ``full`` (G, M, 3).

    Raises:
        UserError: rows whose clouds have other sizes than those beside them.
    """
    tensors = {}
    for name in ("scan", "full"):
        shapes = {np.shape(row[name]) for row in rows}
        if len(shapes) != 1:
            raise UserError(f"clouds of a batch have one size, found {sorted(shapes)} in {name!r}; resample them first")
        tensors[name] = torch.as_tensor(np.stack([row[name] for row in rows]), dtype=torch.float32)
    return Batch(tuple(str(row["pair_id"]) for row in rows), torch.tensor([[1.0, 0.0]] * len(rows)), tensors)


def distillation_optimizers(config: OptimizerConfig, assistant_ratio: float) -> dict[str, OptimizerConfig]:
    """What the trainer takes as ``optimizers``: the assistants' learning rate is ``assistant_ratio`` times the student's. They
    have to keep up with it; in trials five times the student's rate was good."""
    faster = config.model_copy(update={"learning_rate": assistant_ratio * config.learning_rate})
    return dict.fromkeys(ASSISTANTS, faster)
