"""What the trainings of all embedded bases share: the loop with its average of the weights and its state, and the command."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from polyalign.core.environment import without_folders
from polyalign.core.errors import UserError


def rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def follow(average: Mapping[str, Tensor], network: nn.Module, step: int, *, ema: float) -> None:
    """Move ``average`` towards the weights after ``step``: by ``ema``, and faster in the first steps. Counts are copied."""
    decay = min(ema, (step + 1) / (step + 10))
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


@contextmanager
def averaged(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """The averaged weights in the network, and then its own again."""
    raw = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(average)
    yield
    network.load_state_dict(raw)


@dataclass(frozen=True)
class Work:
    """Where the states of a run lie, and what a state must have been made with to be gone on from."""

    folder: Path
    made_with: dict[str, Any]

    def refuse_other(self, file: Path, found: dict[str, Any] | None) -> None:
        """Raises UserError if a state was made with other settings or from other data, or does not say with which."""
        aside = f"Move the folder {self.folder} away to start anew, or give another FOLDER"
        if found is None:
            raise UserError(f"{file}: does not say what it was made with (it is of an earlier version). {aside}")
        changed = [
            f"{name} was {found.get(name)}, now {self.made_with.get(name)}"
            for name in dict.fromkeys([*self.made_with, *found])
            if found.get(name) != self.made_with.get(name)
        ]
        if changed:
            raise UserError(f"{file}: is of another run, which this one cannot go on from: {'; '.join(changed)}. {aside}")


@dataclass(frozen=True)
class Pace:
    """How long, how fast, and how often is saved: see :func:`rate_at` and :func:`follow`."""

    steps: int
    peak: float
    warmup: int
    ema: float
    save_every: int


class Stage:
    """One network's training: an optimiser, an average of the weights, and a state on disk that makes a killed run go on.

    Raises:
        UserError: the state on disk is of another run.
    """

    def __init__(self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer, pace: Pace, work: Work):
        self.name, self.network, self.optimizer, self.pace, self.work = name, network, optimizer, pace, work
        self.average = {key: value.clone() for key, value in network.state_dict().items()}
        self.file, self.start = work.folder / f"{name}.state.pt", 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            work.refuse_other(self.file, state.get("made_with"))
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            self.average, self.start = state["average"], state["step"]

    def run(
        self,
        loss_of: Callable[[int], Tensor],
        watch: Callable[[], Any] | None = None,
        *,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Minimise ``loss_of(step)``, and leave the averaged weights in the network.

        Args:
            watch: called at every save with the averaged weights in the network; what it gives is printed.
            before: called with the number of every step that is about to be made.
        """
        smooth, pace = None, self.pace
        with Progress() as progress:
            bar = progress.add_task(self.name, total=pace.steps, completed=self.start)
            for step in range(self.start, pace.steps):
                if before is not None:
                    before(step)
                loss = self._step(step, loss_of)
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                progress.update(bar, advance=1, description=f"{self.name} {smooth:.4f}")
                if (step + 1) % pace.save_every == 0 or step + 1 == pace.steps:
                    self._save(step + 1)
                    note = "" if watch is None else self._watched(watch)
                    progress.console.print(f"{self.name} step {step + 1}: loss {smooth:.4f} {note}", highlight=False)
        self.network.load_state_dict(self.average)

    def _step(self, step: int, loss_of: Callable[[int], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(step, self.pace.steps, self.pace.peak, self.pace.warmup)
        loss = loss_of(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        follow(self.average, self.network, step, ema=self.pace.ema)
        return loss.item()

    def _watched(self, watch: Callable[[], Any]) -> str:
        with averaged(self.network, self.average):
            found = watch()
        return found if isinstance(found, str) else json.dumps(found)

    def _save(self, step: int) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": step,
            "made_with": self.work.made_with,
        }
        temporary = self.file.with_suffix(".tmp")  # so that the file is always a whole one
        torch.save(state, temporary)
        temporary.replace(self.file)


def timesteps(count: int, length: int, draws: torch.Generator, *, noisy_share: float, noisy_from: float) -> Tensor:
    """(count,) timesteps below ``length``: uniform, and for ``noisy_share`` of them uniform above ``noisy_from * length``."""
    everywhere = torch.randint(length, (count,), generator=draws)
    noisy = torch.randint(int(noisy_from * length), length, (count,), generator=draws)
    return torch.where(torch.rand(count, generator=draws) < noisy_share, noisy, everywhere)


def digest(folder: Path) -> str:
    """SHA-256 over the weight files below ``folder``, in the order of their names."""
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        sha.update(file.read_bytes())
    return sha.hexdigest()


def write_record(
    folder: Path, found: Mapping[str, Any], *, started: float, module: str, options: Sequence[str]
) -> dict[str, Any]:
    """Write ``base.json``: ``found``, and how long the last run took (from ``started``), torch's version and the command, whose
    folders are left out. Returns it."""
    record = {
        **found,
        "seconds_of_the_last_run": round(time.time() - started),
        "torch": torch.__version__,
        "command": shlex.join(["python", "-m", module, *map(without_folders, options)]),
    }
    (folder / "base.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def command_line(
    argv: Sequence[str] | None,
    doc: str | None,
    defaults: Mapping[str, int],
    train: Callable[[Path, dict[str, int], Sequence[str]], tuple[dict[str, Any], str | None]],
) -> None:
    """A base's command, ``FOLDER [--NAME N ...] [--threads N]``: ``train(folder, lengths, words of the command)`` gives the
    record and why the base is not fit to be shipped, or None.

    Args:
        defaults: the lengths that the command can change, for trials.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the base goes; the state of a run that goes on lies in FOLDER.work")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run_command(lambda: train(options.folder, {name: getattr(options, name) for name in defaults}, arguments))


def run_command(train: Callable[[], tuple[dict[str, Any], str | None]]) -> None:
    """Call ``train``, print the record that it gives, and leave with its complaint, if any."""
    try:
        record, complaint = train()
    except UserError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps(record, indent=2))
    if complaint is not None:
        raise SystemExit(complaint)


def unfit_in_words(reason: str | None) -> str | None:
    return None if reason is None else f"this base is not fit to be aligned: {reason}"
