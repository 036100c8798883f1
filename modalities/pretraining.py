"""What the trainings of all embedded bases share: the learning rate, the average of the weights, the state, the command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write what a killed run goes on from, so that the file is always a whole one."""
    temporary = file.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    temporary.replace(file)


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
