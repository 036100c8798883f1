"""The training loop. One step, whatever the method:

    rows of the batch -> prepare -> losses of every group -> gradient -> update -> figures -> now and then a checkpoint

Which rows, which draws and which learning rate a step has follows from its number, so a run that was killed and started again
goes on from its last checkpoint to the same final weights, bit for bit.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from polyalign.core import checkpoint as checkpoints
from polyalign.core.algorithm import Algorithm, Layout, Rows
from polyalign.core.early_stop import TopKWatch
from polyalign.core.errors import UserError
from polyalign.core.files import set_aside
from polyalign.core.launch import accelerator_beside
from polyalign.core.learner import Learner, TorchLearner, refuse_float16
from polyalign.core.memory import peak_memory
from polyalign.core.objectives import Outcome
from polyalign.core.optimisers import schedule_factor
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import permutation, seed_of
from polyalign.core.recipe import OptimizerConfig, TrackingConfig, TrainSettings
from polyalign.core.refusal import Refusal
from polyalign.core.tracking import MetricsFile, figures_of, open_tracker

# Settings that may change between a kill and a resume: none of them changes the weights but by rounding, and
# micro_batch_size by what dropout draws.
HARMLESS = {"save_every", "keep_checkpoints", "log_every", "micro_batch_size", "threads", "gradient_checkpointing"}

Statistics = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Summary:
    """What a call of ``Trainer.run`` did. ``steps`` and ``pairs`` are those of this call; ``last_step`` counts all. ``stopped``
    says why the run ended before its last step, if ``train.stop`` ended it."""

    steps: int
    last_step: int
    seconds: float
    pairs: int
    pairs_per_second: float
    peak_memory: Mapping[str, int]
    checkpoint: Path | None
    stopped: str | None = None


@dataclass(frozen=True)
class Part:
    """The steps that a trainer's data are for, where rounds of a training have data of their own: those past ``after``, up to
    ``until``. The learning rate follows the step among all of ``train.steps``. ``fresh_optimizer``: at the first of them the
    optimiser forgets the steps before."""

    after: int
    until: int
    fresh_optimizer: bool = False


class Trainer:
    """Trains an algorithm's networks on preference groups.

    Args:
        data: rows by position; its order in epoch e is a permutation keyed by (seed, e).
        folder: the run folder, for ``checkpoints/``, ``metrics.jsonl`` and, after a refused step, ``refused.json``.
        identity: what a resumed run must share besides the settings: the objective, the base's hash, the pairs' hash.
        optimizers: settings by network name, where they differ from ``settings.optimizer``.
        part: the steps that ``data`` are for; all by default.
        accelerator: one that is there already; by default one is started for the processes that run, on the kind of device
            that the networks are on.

    Raises:
        UserError: no pairs; networks elsewhere than the accelerator, or in float16 without fp16's loss scale; a batch that
            would have to be cut and cannot be.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        data: Rows,
        settings: TrainSettings,
        folder: str | Path,
        *,
        seed: int = 0,
        identity: Mapping[str, Any] | None = None,
        optimizers: Mapping[str, OptimizerConfig] | None = None,
        part: Part | None = None,
        tracking: TrackingConfig | None = None,
        accelerator: Accelerator | None = None,
    ):
        if len(data) == 0:
            raise UserError("there are no pairs to train on; pairs/summary.json says how many were made and why not more")
        self.algorithm, self.data, self.settings, self.folder, self.seed = algorithm, data, settings, Path(folder), seed
        self.part = part or Part(0, settings.steps)
        for network in algorithm.networks.values():
            refuse_float16(network, settings.mixed_precision)
        self.accelerator = accelerator_beside(algorithm.networks.values(), settings, accelerator)
        self.optimizers = {name: (optimizers or {}).get(name, settings.optimizer) for name in algorithm.networks}
        self.learners = {name: self._learner(name) for name in algorithm.networks}
        self.tracking = tracking or TrackingConfig()
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        self.watch = None if settings.stop is None else TopKWatch(settings.stop)
        self.identity = json.loads(json.dumps({**(identity or {}), "seed": seed, "train": resumable(settings)}, default=str))
        self._refuse_cut_batches()

    def run(self, *, anew: bool = False) -> Summary:
        """Train from the last checkpoint, or from the start, to ``settings.steps`` or to where ``settings.stop`` ends it.

        ``anew`` moves earlier checkpoints aside and starts at step 1.

        Raises:
            UserError: a loss or gradient that is not finite; a checkpoint of other settings; a full disk.
        """
        settings, algorithm, main = self.settings, self.algorithm, self.accelerator.is_main_process
        first = self._resume(anew)
        tracker = open_tracker(self.tracking, self.folder, recipe=self.identity, resumed_step=first) if main else None
        layout = Layout(
            self.accelerator.device,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.wait_for_everyone,
            lambda: autocast(settings, self.accelerator.device),
        )
        for network in algorithm.networks.values():
            network.train()
        algorithm.begin(self.data, layout, micro_batch_size=settings.micro_batch_size)
        began, step = time.monotonic(), first

        with ProgressLine("train", total=settings.steps, start=first, visible=main) as progress:
            for step in range(first + 1, (first if self._stopped else self.part.until) + 1):
                step_began = time.monotonic()
                group_ids: list[str] = []
                results: list[Statistics] = []
                for rows, place, last in self._micro_batches(step):
                    torch.manual_seed(seed_of(self.seed, "layers", step, place))  # dropout's; see core/randomness.py
                    batch = algorithm.prepare(rows, step=step).to(self.accelerator.device)
                    with layout.autocast():
                        outcomes = algorithm.step(batch, step=step)
                    for name, outcome in outcomes.items():
                        loss = outcome.loss.float().sum() / settings.batch_size
                        self.learners[name].backward(loss, alone=len(outcomes) == 1, last=last)
                    group_ids += batch.group_ids
                    results.append({name: with_loss(outcome) for name, outcome in outcomes.items()})

                statistics = self._gathered(results)
                norms = {name: self.learners[name].gradient_norm() for name in statistics}
                self._refuse_unless_finite(step, statistics, norms, group_ids)
                rates = {name: self._learning_rate(name, step) for name in statistics}
                for name in statistics:
                    norms[name] = self.learners[name].update(learning_rate=rates[name], clip_norm=settings.clip_norm)
                if self.accelerator.scaler is not None:
                    self.accelerator.scaler.update()
                algorithm.after_step(step, statistics)

                figures = self._figures(step, statistics, norms, rates, time.monotonic() - step_began)
                progress.advance(figures)
                if self.watch is not None:
                    self.watch.of_figures(step, figures)
                ends = step == self.part.until or self._stopped is not None
                if main and (step % settings.log_every == 0 or ends):
                    self.metrics.append(figures)
                    if tracker is not None:
                        tracker.log(step, {name: value for name, value in figures.items() if isinstance(value, float | int)})
                if step % settings.save_every == 0 or ends:
                    self._save(step)
                if ends:
                    break

        if self._stopped and main:
            print(f"train: ended early by train.stop: {self._stopped}", file=sys.stderr, flush=True)
        if tracker is not None:
            tracker.close()
        return self._summary(first, step, time.monotonic() - began)

    @property
    def _stopped(self) -> str | None:
        """Why ``train.stop`` has ended this run; None while it has not."""
        return None if self.watch is None else self.watch.stopped

    def _learner(self, name: str) -> Learner:
        network, config = self.algorithm.networks[name], self.optimizers[name]
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            from polyalign.core.learner_deepspeed import DeepSpeedLearner

            learner: Learner = DeepSpeedLearner(network, config, self.accelerator, self.settings)
        else:
            learner = TorchLearner(network, config, self.accelerator)
        self.algorithm.networks[name] = learner.network
        return learner

    def _micro_batches(self, step: int) -> Iterator[tuple[Sequence[Any], int, bool]]:
        """This process's share of the step's rows, cut: (rows, place in the whole order, whether it is the last cut)."""
        share = self.settings.batch_size // self.accelerator.num_processes
        start = (step - 1 - self.part.after) * self.settings.batch_size + self.accelerator.process_index * share
        for place in range(start, start + share, self.settings.micro_batch_size):
            end = min(place + self.settings.micro_batch_size, start + share)
            yield self.data.rows([self._row(position) for position in range(place, end)]), place, end == start + share

    def _row(self, position: int) -> int:
        """The row at a position of the endless order of epochs."""
        epoch, place = divmod(position, len(self.data))
        return order(self.seed, len(self.data), epoch)[place]

    def _gathered(self, results: Sequence[Statistics]) -> Statistics:
        """The micro-batches of all processes joined, in the order of the data, on the CPU."""
        gathered: Statistics = {}
        for name, first in results[0].items():
            joined = {key: torch.cat([result[name][key] for result in results]).contiguous() for key in first}
            together: Any = self.accelerator.gather(joined)
            gathered[name] = {key: value.cpu() for key, value in together.items()}
        return gathered

    def _learning_rate(self, name: str, step: int) -> float:
        factor = schedule_factor(step, steps=self.settings.steps, schedule=self.settings.schedule)
        return factor * self.optimizers[name].learning_rate

    def _figures(
        self,
        step: int,
        statistics: Statistics,
        norms: Mapping[str, float | None],
        rates: Mapping[str, float],
        seconds: float,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl. Where there are several networks their figures have the network's name before them."""
        pairs = step * self.settings.batch_size
        epoch = (step - self.part.after) * self.settings.batch_size / len(self.data)
        figures: dict[str, Any] = {"step": step, "epoch": epoch}
        figures["loss"] = sum(values["loss"].double().mean().item() for values in statistics.values())
        for name, values in statistics.items():
            prefix = f"{name}/" if len(self.learners) > 1 else ""
            norm = norms[name]
            own = {"learning_rate": rates[name], "gradient_norm": norm if norm is not None and math.isfinite(norm) else None}
            own |= figures_of(values)
            figures |= {f"{prefix}{key}": value for key, value in own.items()}
        figures |= self.algorithm.figures()
        if self.accelerator.scaler is not None:
            figures["loss_scale"] = self.accelerator.scaler.get_scale()
        return figures | {"seconds": round(seconds, 4), "pairs_seen": pairs, **peak_memory()}

    def _refuse_unless_finite(
        self, step: int, statistics: Statistics, norms: Mapping[str, float | None], group_ids: Sequence[str]
    ) -> None:
        """Raises UserError, after writing ``refused.json``, if the step would put a NaN or an infinity into the weights."""
        losses_finite = all(bool(values["loss"].isfinite().all()) for values in statistics.values())
        scaler = self.accelerator.scaler
        searching = scaler is not None and scaler.get_scale() > 1.0  # fp16 finds its scale by overflowing now and then
        if losses_finite and (searching or all(norm is None or math.isfinite(norm) for norm in norms.values())):
            return
        for learner in self.learners.values():
            learner.discard()
        losses = {name: values["loss"].tolist() for name, values in statistics.items()}
        refusal = Refusal(step, gather_object(list(group_ids)), losses, dict(norms))
        if self.accelerator.is_main_process:
            refusal.write(self.folder / "refused.json")
        raise refusal.error(self.folder / "refused.json", checkpoints.latest(self.folder / "checkpoints"))

    def _refuse_cut_batches(self) -> None:
        share = self.settings.batch_size // self.accelerator.num_processes
        cut = self.accelerator.num_processes > 1 or self.settings.micro_batch_size < share
        if cut and not self.algorithm.group_separable:
            raise UserError(
                "this objective couples the pairs of a batch, so a batch cannot be cut: set train.micro_batch_size to "
                f"train.batch_size ({self.settings.batch_size}) and use one process. If the winner safeguard couples them "
                "(sdpo, objective.winner_safeguard), objective.safeguard_scope: group takes each pair by itself instead."
            )

    def _save(self, step: int) -> None:
        """All processes gather, the main one writes."""
        weights = {name: learner.weights() for name, learner in self.learners.items()}
        optimizers = {name: learner.optimizer_state() for name, learner in self.learners.items()}
        scaler = self.accelerator.scaler
        kept = {"algorithm": self.algorithm.state_dict(), "scaler": {} if scaler is None else scaler.state_dict()}
        if self.watch is not None:
            kept["stop"] = self.watch.state_dict()
        if self.accelerator.is_main_process:
            self.metrics.sync()
            checkpoints.save(
                self.folder / "checkpoints",
                step,
                weights=weights,
                optimizers=optimizers,
                algorithm=kept,
                identity=self.identity,
                keep=self.settings.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self, anew: bool) -> int:
        """Load the last checkpoint and return its step; 0 without one."""
        root = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if anew:
                set_aside(self.folder, [root.name, self.metrics.path.name])
            for folder, wrong in checkpoints.damaged(root).items():
                print(f"{folder}: is damaged and passed over ({wrong})", file=sys.stderr, flush=True)
        self.accelerator.wait_for_everyone()
        found = checkpoints.latest(root)
        if found is not None:
            checkpoints.refuse_other_settings(found, self.identity)
            if found.step > self.part.until:
                raise UserError(
                    f"train.steps is {self.part.until}, but {found.folder} is already further. Set train.steps to "
                    f"{found.step} or more, or start anew."
                )
            for name, learner in self.learners.items():
                learner.load(found.weights(name), self._optimizer_state(found, name))
            kept = found.algorithm()
            self.algorithm.load_state_dict(kept["algorithm"])
            if self.accelerator.scaler is not None and kept["scaler"]:
                self.accelerator.scaler.load_state_dict(kept["scaler"])
            if self.watch is not None and "stop" in kept:
                self.watch.load_state_dict(kept["stop"])
        step = 0 if found is None else found.step
        if step < self.part.after:
            raise ValueError(f"these data are for steps past {self.part.after}, and the last checkpoint is of step {step}")
        if self.accelerator.is_main_process and found is None:
            set_aside(self.folder, [self.metrics.path.name])  # figures of steps whose weights are lost
        elif self.accelerator.is_main_process:
            self.metrics.rewind(step)
        return step

    def _optimizer_state(self, found: checkpoints.Checkpoint, name: str) -> dict[str, Any]:
        state = found.optimizer(name)
        return state | {"state": {}} if self.part.fresh_optimizer and found.step == self.part.after else state

    def _summary(self, first: int, last: int, seconds: float) -> Summary:
        steps = last - first
        pairs = steps * self.settings.batch_size
        newest = checkpoints.latest(self.folder / "checkpoints")
        speed = pairs / seconds if steps and seconds else 0.0
        folder = None if newest is None else newest.folder
        return Summary(steps, last, seconds, pairs, speed, peak_memory(), folder, self._stopped)


def with_loss(outcome: Outcome) -> dict[str, Tensor]:
    """The statistics and the loss of each group, without the graph, which would keep its memory until the end of the step."""
    return {**outcome.statistics, "loss": outcome.loss.detach().float()}


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """The recipe's precision for forward passes. The reference is scored inside it too, and after the policy: torch then uses
    the policy's casts of the weights, which carry its gradient."""
    dtype = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=settings.mixed_precision != "no")


@lru_cache(maxsize=4)
def order(seed: int, length: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch."""
    return permutation(seed, length, "order", epoch)


def resumable(settings: TrainSettings) -> dict[str, Any]:
    """The settings that a resumed run must share. With a constant learning rate the number of steps is not among them, so that
    a finished run can be made longer."""
    free = HARMLESS | ({"steps"} if settings.schedule.name == "constant" else set())
    return {key: value for key, value in settings.model_dump(mode="json").items() if key not in free}
