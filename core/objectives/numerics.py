"""Exponentials that stay finite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CAP_MARGIN = 24.0
"""Exponents are followed up to log(largest number of the dtype) minus this, which leaves a factor of 10^10 for beta, for
1/alpha and for the continuation above the cap: 64.7 in float32, 685.8 in float64."""


def exponent_cap(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max) - CAP_MARGIN


def bounded_exp(exponent: Tensor) -> Tensor:
    """e^x up to the cap, and above it the straight line that touches it there: value and gradient stay finite, and the gradient
    does not vanish."""
    cap = exponent_cap(exponent.dtype)
    return exponent.clamp(max=cap).exp() + math.exp(cap) * F.relu(exponent - cap)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, by the form that keeps its digits on either side of -log 2."""
    near = x > -math.log(2.0)
    close = torch.where(near, x, torch.full_like(x, -1.0))
    far = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, (-close.expm1()).log(), torch.log1p(-far.exp()))
