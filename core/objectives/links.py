"""Slot D: links s = phi(r) from a candidate's log-ratio r to its score.

f-DPO (Wang et al., arXiv 2309.16240) replaces the reverse KL of DPO by an f-divergence; the score is then f'(exp r) up to a
constant per prompt, which is unknown. It cancels in a difference of scores and in a softmax over candidates, and nowhere else,
so every link but the identity declares ``needs_shift_invariance``.

Scores here are shifted to be 0 at r = 0. The author's code (alecwangcq/f-divergence-dpo) drops the constant of the forward KL
and the alpha divergence instead, so its reported rewards are lower by beta / alpha; losses and gradients agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polyalign.core.errors import UserError

CAP_MARGIN = 24.0
"""Exponents are followed up to log(largest number of the dtype) minus this, which leaves a factor of 10^10 for beta, for
1/alpha and for the continuation above the cap: 64.7 in float32, 685.8 in float64."""


class Link(Protocol):
    """``score`` is phi(r); ``difference`` is phi(r) - phi(base), computed jointly, without cancellation or overflow.

    ``needs_shift_invariance``: scores are known up to a constant a group. ``on_means``: the link may follow a reduction that
    averages; otherwise the unknown constant, divided by unequal lengths, would no longer cancel.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_shift_invariance(self) -> bool: ...

    @property
    def on_means(self) -> bool: ...

    def score(self, log_ratio: Tensor) -> Tensor: ...

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity:
    """Reverse KL, plain DPO: s = r."""

    name: str = "identity"
    needs_shift_invariance: bool = False
    on_means: bool = True

    def score(self, log_ratio: Tensor) -> Tensor:
        return log_ratio

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return log_ratio - base


@dataclass(frozen=True)
class JensenShannon:
    """s = log 2 + log sigmoid(r), bounded above by log 2 and linear below: benign at any ratio."""

    name: str = "jensen_shannon"
    needs_shift_invariance: bool = True
    on_means: bool = True

    def score(self, log_ratio: Tensor) -> Tensor:
        return math.log(2.0) + F.logsigmoid(log_ratio)

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return F.logsigmoid(log_ratio) - F.logsigmoid(base)


@dataclass(frozen=True)
class AlphaDivergence:
    """s = (1 - exp(-alpha r)) / alpha with 0 < alpha <= 1; alpha -> 0 is the reverse KL (s = r), alpha = 1 the forward KL.

    ``alpha`` is the paper's; TRL's coefficient is 1 - alpha. With a = -alpha r and b = -alpha r', s(r) - s(r') = (e^b - e^a) /
    alpha = sign(b - a) exp(max(a, b)) (-expm1(-|a - b|)) / alpha, which is exactly 0 at equal ratios however extreme. Above
    the cap e^x goes on as the straight line that touches it there: values and gradients stay finite and the gradient does not
    vanish (official code: inf and nan; TRL: gradient 0, so the worst pairs silently stop teaching).
    """

    alpha: float
    needs_shift_invariance: bool = True
    on_means: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise UserError(
                f"the alpha divergence needs 0 < alpha <= 1 (1 is the forward KL, towards 0 the reverse KL), found {self.alpha}"
            )

    @property
    def name(self) -> str:
        return "forward_kl" if self.alpha == 1.0 else f"alpha({self.alpha:g})"

    def score(self, log_ratio: Tensor) -> Tensor:
        return self.difference(log_ratio, torch.zeros_like(log_ratio))

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        cap = math.log(torch.finfo(log_ratio.dtype).max) - CAP_MARGIN
        a, b = -self.alpha * log_ratio, -self.alpha * base
        above = F.relu(b - cap) - F.relu(a - cap)
        return (_exp_difference(b.clamp(max=cap), a.clamp(max=cap)) + math.exp(cap) * above) / self.alpha


def _exp_difference(x: Tensor, y: Tensor) -> Tensor:
    """e^x - e^y: the value without cancellation, the gradient (e^x, -e^y) as it stands.

    Differentiating the stable form would lose the smaller of the two gradients (torch's expm1 differentiates to result + 1),
    and a form with |x - y| would have no gradient at all at x = y. Both exponents are capped, so nothing overflows.
    """
    first = x >= y
    gap = torch.where(first, y - x, x - y)  # <= 0
    value = torch.where(first, -x.exp() * gap.expm1(), y.exp() * gap.expm1()).detach()
    plain = x.exp() - y.exp()
    return value + (plain - plain.detach())
