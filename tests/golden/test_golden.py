"""Values and gradients of the original code of each method, case by case."""

from __future__ import annotations

import torch

torch.set_num_threads(1)


def test_agrees_with_the_original(golden_case):
    golden_case.check(golden_case)
