"""Our step against the benchmark's live loop, which decodes, encodes and forwards a full reference copy in every step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import image_dpo  # noqa: E402  # pyright: ignore[reportMissingImports]
from benchmarks.live_loop import live_loop  # noqa: E402  # pyright: ignore[reportMissingImports]

STEPS = 4


@pytest.mark.parametrize(("train", "seat"), [("lora", "adapter_off"), ("full", "frozen")])
def test_the_live_loop_has_the_same_losses(train: str, seat: str) -> None:
    torch.set_num_threads(1)
    rows = image_dpo.rows_of(4)
    _, ours = image_dpo.ours(train, seat, rows, STEPS)
    _, live = live_loop(image_dpo.adapter_of(train), rows, STEPS, beta=image_dpo.BETA, rate=image_dpo.RATE)
    assert live[0] == pytest.approx(0.6931472, abs=1e-5) and len({round(loss, 6) for loss in live}) == STEPS
    assert ours == pytest.approx(live, rel=1e-3)
