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
from polyalign.core.objectives.numerics import exponent_cap, log1mexp


class Link(Protocol):
    """``score`` is phi(r); ``difference`` is phi(r) - phi(base), computed jointly, without cancellation or overflow.

    ``needs_shift_invariance``: scores are known up to a constant a group. ``on_means``: the link may follow a reduction that
    averages; otherwise the unknown constant, divided by unequal lengths, would no longer cancel. ``of_likelihood``: phi is a
    function of a likelihood itself and has no meaning for a ratio to a reference.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_shift_invariance(self) -> bool: ...

    @property
    def on_means(self) -> bool: ...

    @property
    def of_likelihood(self) -> bool: ...

    def score(self, log_ratio: Tensor) -> Tensor: ...

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity:
    """Reverse KL, plain DPO: s = r."""

    name: str = "identity"
    needs_shift_invariance: bool = False
    on_means: bool = True
    of_likelihood: bool = False

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
    of_likelihood: bool = False

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
    of_likelihood: bool = False

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
        return _power_difference(self.alpha, log_ratio, base)


def _power_difference(alpha: float, x: Tensor, base: Tensor) -> Tensor:
    """(e^(-alpha base) - e^(-alpha x)) / alpha, continued as a straight line where an exponential would overflow."""
    cap = exponent_cap(x.dtype)
    a, b = -alpha * x, -alpha * base
    above = F.relu(b - cap) - F.relu(a - cap)
    return (_exp_difference(b.clamp(max=cap), a.clamp(max=cap)) + math.exp(cap) * above) / alpha


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


@dataclass(frozen=True)
class Clipped:
    """s = r between ``low`` and ``high``, the bound beyond, where the gradient ends: ADPO's clipped log-ratios, and SPO's
    clipped probability ratios (arXiv 2406.04314) with the bounds log(1 - e) and log(1 + e)."""

    low: float
    high: float
    name: str = "clipped"
    needs_shift_invariance: bool = False
    on_means: bool = True
    of_likelihood: bool = False

    def __post_init__(self) -> None:
        if not self.low < 0.0 < self.high:
            raise UserError(f"a clipped log-ratio needs a bound below 0 and one above it, found {self.low} and {self.high}")

    def score(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(self.low, self.high)

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return self.score(log_ratio) - self.score(base)


# --- links of a likelihood itself: for terms without a reference, where no constant is unknown --------------------------------


@dataclass(frozen=True)
class PowerReward:
    """s = (1 - p^-alpha) / alpha of a probability p = e^l (AlphaPO, arXiv 2501.03884); alpha 0 is s = l, SimPO. The formula of
    the alpha divergence, but of a likelihood, so there is no unknown constant, any alpha is allowed, and so is a mean."""

    alpha: float
    name: str = "power reward"
    needs_shift_invariance: bool = False
    on_means: bool = True
    of_likelihood: bool = True

    def score(self, log_ratio: Tensor) -> Tensor:
        return self.difference(log_ratio, torch.zeros_like(log_ratio))

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return log_ratio - base if self.alpha == 0.0 else _power_difference(self.alpha, log_ratio, base)


@dataclass(frozen=True)
class LogOdds:
    """s = l - log(1 - e^l), the log-odds of a probability e^l (ORPO, arXiv 2403.07691), of the mean of a candidate's tokens.

    l is kept below minus the dtype's resolution, where the odds would be infinite: a certain answer scores 36 in float64 and 16
    in float32, without gradient.
    """

    name: str = "log-odds"
    needs_shift_invariance: bool = False
    on_means: bool = True
    of_likelihood: bool = True

    def score(self, log_ratio: Tensor) -> Tensor:
        log_probability = log_ratio.clamp(max=-torch.finfo(log_ratio.dtype).eps)
        return log_probability - log1mexp(log_probability)

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return self.score(log_ratio) - self.score(base)


@dataclass(frozen=True)
class ErrorOdds:
    """s = x / (e^x - 1) with x = snr e and e = -value the error of a denoising model (MaPO, arXiv 2406.06424): 1 at no error,
    0 at a large one."""

    snr: float
    name: str = "error odds"
    needs_shift_invariance: bool = False
    on_means: bool = True
    of_likelihood: bool = True

    def score(self, log_ratio: Tensor) -> Tensor:
        x = -self.snr * log_ratio
        small = x.abs() < 1e-4  # the series is exact to x^4/720 there, and has its gradient at 0
        safe = torch.where(small, torch.ones_like(x), x)
        size = safe.abs()  # x / (e^x - 1) = |x| e^-max(x, 0) / (1 - e^-|x|), in which no exponent is positive
        odds = size * (-safe.clamp(min=0.0)).exp() / -(-size).expm1()
        return torch.where(small, 1.0 - x / 2.0 + x.square() / 12.0, odds)

    def difference(self, log_ratio: Tensor, base: Tensor) -> Tensor:
        return self.score(log_ratio) - self.score(base)
