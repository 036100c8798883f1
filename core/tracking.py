"""Where the figures go: ``metrics.jsonl`` always, and one optional tracker beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from polyalign.core.files import atomic_write
from polyalign.core.optional import require
from polyalign.core.recipe import TrackingConfig

# Statistics with one column a candidate become two figures: the first candidate's and the mean of the others'.
COLUMNS = {
    "reward": ("rewards/chosen", "rewards/rejected"),
    "logratio": ("logratios/chosen", "logratios/rejected"),
    "tokens": ("tokens/chosen", "tokens/rejected"),
}
NAMES = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, steps rising, no step twice."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step`` and a line torn by a kill, so that a resumed run writes each step once."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))

    def append(self, figures: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def sync(self) -> None:
        """Make what is written survive a power cut; called before a checkpoint that counts on these lines."""
        if self.path.exists():
            with open(self.path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())


def _step_of(line: str) -> float:
    """The step of a line; infinite for a torn one, so that it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Tracker(Protocol):
    """A place outside the run folder that takes the same figures."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under ``tensorboard/``; events after the resumed step are hidden by ``purge_step``."""

    def __init__(self, folder: Path, resumed_step: int):
        require("tensorboard", extra="track", purpose="tracking with tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLike:
    """wandb, or trackio, which has the same calls. The run's id comes from its folder, so a resumed run goes on in place."""

    def __init__(self, backend: str, config: TrackingConfig, folder: Path, recipe: Mapping[str, Any]):
        self.module = require(backend, extra="track", purpose=f"tracking with {backend}")
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        name = f"{folder.name}-{identity[:6]}"
        own = {"id": identity, "dir": str(folder)} if backend == "wandb" else {}
        self.module.init(project=config.project, name=name, config=dict(recipe), resume="allow", **own)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.module.log(dict(figures), step=step)

    def close(self) -> None:
        self.module.finish()


def open_tracker(config: TrackingConfig, folder: Path, *, recipe: Mapping[str, Any], resumed_step: int) -> Tracker | None:
    """The tracker that the recipe names, or None.

    Raises:
        UserError: its package is missing.
    """
    if config.backend == "none":
        return None
    if config.backend == "tensorboard":
        return TensorBoard(folder, resumed_step)
    return WandbLike(config.backend, config, folder, recipe)


def figures_of(statistics: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over the batch, under the names users know from other preference trainers.

    ``statistics`` are per group, (G,) or (G, K), gathered from all processes in the order of the data, so that the means do not
    depend on how the batch was cut. A name with a slash, ``error/policy`` (G, K), becomes ``error/policy_chosen`` and
    ``error/policy_rejected``; single candidates (K = 1) have the first of the two alone. ``timestep`` (G, U) is not averaged:
    with it the margins are listed by timestep.
    """
    figures: dict[str, Any] = {}
    for name, values in statistics.items():
        values = values.double()
        if name in ("timestep", "policy_value", "reference_value"):
            continue
        if values.ndim == 1:
            figures[NAMES.get(name, name)] = values.mean().item()
        elif name in COLUMNS or "/" in name:
            chosen, rejected = COLUMNS.get(name, (f"{name}_chosen", f"{name}_rejected"))
            figures[chosen] = values[:, 0].mean().item()
            if values.shape[1] > 1:  # a single candidate has no other one
                figures[rejected] = values[:, 1:].mean().item()
    if "timestep" in statistics and "margin" in statistics:
        figures["margins_by_timestep"] = [
            [round(t, 6), margin]
            for row, margin in zip(statistics["timestep"].tolist(), statistics["margin"].tolist(), strict=True)
            for t in row
        ]
    return figures
