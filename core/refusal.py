"""A step that would put a NaN or an infinity into the weights, and what its user is told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyalign.core.checkpoint import Checkpoint
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write

SHOWN = 4


@dataclass(frozen=True)
class Refusal:
    """The step, its groups, their losses and the gradient's norm by network."""

    step: int
    group_ids: Sequence[str]
    losses: Mapping[str, Sequence[float]]
    gradient_norms: Mapping[str, float | None]

    @property
    def not_finite(self) -> list[str]:
        """The groups whose own loss is not finite; none where it is only the gradient."""
        bad = {place for losses in self.losses.values() for place, loss in enumerate(losses) if not math.isfinite(loss)}
        return [group_id for place, group_id in enumerate(self.group_ids) if place in bad]

    @property
    def what(self) -> str:
        return "loss" if self.not_finite else "gradient"

    def write(self, path: Path) -> None:
        record = {
            "step": self.step,
            "what": self.what,
            "not_finite": self.not_finite,
            "group_ids": list(self.group_ids),
            "losses": {name: [_json(loss) for loss in losses] for name, losses in self.losses.items()},
            "gradient_norms": {name: _json(norm) for name, norm in self.gradient_norms.items()},
        }
        atomic_write(path, json.dumps(record, indent=1))

    def error(self, written: Path, kept: Checkpoint | None) -> UserError:
        named = self.not_finite or list(self.group_ids)
        pairs = ", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
        return UserError(
            f"step {self.step} was refused: its {self.what} is not finite, for {pairs} (losses and gradient norms stand in "
            f"{written}). The weights are as before the step, and "
            f"{f'the last checkpoint is {kept.folder}' if kept else 'there is no checkpoint yet'}. Running again meets the "
            "same step. Look at these pairs; if they are sound, start anew with a lower train.optimizer.learning_rate, a lower "
            "train.clip_norm, a smaller beta, or bf16 instead of fp16."
        )


def _json(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they become text."""
    return value if value is None or math.isfinite(value) else str(value)
