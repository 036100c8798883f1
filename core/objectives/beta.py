"""beta in one meaning: the factor on the log-ratio of unit values, whatever convention a publication states it in.

Public code for denoising models uses incompatible conventions under the one name (Salesforce DiffusionDPO: half of beta times
the *mean* squared error; diffusers' SD1.5 script: without the half; the paper's pseudo-code and others: the *sum*), so "5000"
means different things, and the same number weakens with every added pixel. With d elements and T noise levels, on the mean
error:

    mean_half 0.5 v,   mean v,   sum_half 0.5 v d,   sum v d,   nats 0.5 v d T  (the simple bound: weight 1/2, summed over T)

Token log-probabilities are in nats already: ``nats`` and ``sum`` both mean v, the others mean nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.recipe import BetaConvention
from polyalign.core.scores import Unit

if TYPE_CHECKING:
    from polyalign.core.recipe import BetaConfig

CONVENTIONS: tuple[BetaConvention, ...] = get_args(BetaConvention)
_TOKEN_CONVENTIONS = ("sum", "nats")


@dataclass(frozen=True)
class Beta:
    """A value and the convention it is stated in."""

    value: float
    convention: BetaConvention = "mean_half"

    @classmethod
    def of(cls, config: BetaConfig) -> Beta:
        return cls(config.value, config.convention)

    def effective(self, unit: Unit) -> float:
        """The factor on a log-ratio of values of ``unit``.

        Raises:
            UserError: a convention that has no meaning for the unit, or one that needs a size which the unit does not state.
        """
        return self.value * _factor(self.convention, unit)

    def to(self, convention: BetaConvention, unit: Unit) -> Beta:
        """The same strength in another convention."""
        return Beta(self.effective(unit) / _factor(convention, unit), convention)

    def equivalents(self, unit: Unit) -> dict[str, float]:
        """The same strength in every convention that has a meaning for ``unit``."""
        effective = self.effective(unit)
        return {
            convention: effective / _factor(convention, unit) for convention in CONVENTIONS if _has_meaning(convention, unit)
        }


def _has_meaning(convention: BetaConvention, unit: Unit) -> bool:
    if unit.kind == "token":
        return convention in _TOKEN_CONVENTIONS
    if convention in ("mean_half", "mean"):
        return True
    return unit.elements is not None and (convention != "nats" or unit.steps is not None)


def _factor(convention: BetaConvention, unit: Unit) -> float:
    """Effective beta for the value 1."""
    if convention not in CONVENTIONS:
        raise UserError(f"beta.convention {convention!r} is not known; allowed: {', '.join(CONVENTIONS)}")
    if not _has_meaning(convention, unit):
        if unit.kind == "token":
            raise UserError(
                f"beta.convention {convention!r} is for squared errors; token log-probabilities are in nats. "
                "Use nats (a usual value is 0.1), or sum, which is the same."
            )
        raise UserError(
            f"beta.convention {convention!r} needs the number of elements (and for nats of noise levels), which these "
            f"scores do not state (unit {unit.kind!r}). Use mean_half or mean."
        )
    if unit.kind == "token":
        return 1.0
    half = 0.5 if convention in ("mean_half", "sum_half", "nats") else 1.0
    elements = (unit.elements or 1) if convention in ("sum", "sum_half", "nats") else 1
    steps = (unit.steps or 1) if convention == "nats" else 1
    return half * elements * steps


class AutoBeta:
    """beta that follows the training so that a typical pair's gradient factor sigmoid(-beta |h|) stays at a target g < 1/2.

    With m a running mean of |h|, h the log-ratio margin of a pair before beta, the effective beta is -logit(g) / m, clamped in
    the convention it is stated in. An idea of SimpleTuner's Flow-DPO (bghira/SimpleTuner@bc8e6ab7), where, in the half
    conventions, it reads -2 logit(g) / m. Until ``warmup_steps`` updates have been seen the given value is kept. The algorithm
    owns it, and gathers the margins of all processes first.

    The mean starts from nothing and is divided by the weight that its n values have together, 1 - decay^n, so that the small
    margins of the first steps count no more than later ones. SimpleTuner takes the first value for the mean instead; so does
    ``warmup_steps`` 0. Differences from it: that division, and that margins of exactly 0, which is what a fresh policy has, are
    left out until there is another one. They say nothing of a typical pair, and beta would rise to its maximum.
    """

    def __init__(self, config: BetaConfig):
        if config.auto is None:
            raise ValueError("automatic beta needs beta.auto")
        self.config = config.auto
        self.beta = Beta.of(config)
        self.updates = 0
        self.running = 0.0
        self.weight = 0.0

    @property
    def mean_margin(self) -> float | None:
        """m; None before there is a margin."""
        return self.running / self.weight if self.weight else None

    def update(self, log_ratio_margin: Tensor, unit: Unit) -> Beta:
        """Take in the log-ratio margins (any shape, before beta) of a step and return the beta for the next one.

        A step whose margins are not finite changes nothing, nor does one of zeros before any other.
        """
        size = float(log_ratio_margin.detach().to(torch.float64).abs().mean())
        if not math.isfinite(size) or (size == 0.0 and not self.weight):
            return self.beta
        share = 1.0 - self.config.decay if self.weight or self.config.warmup_steps else 1.0
        self.running += share * (size - self.running)
        self.weight += share * (1.0 - self.weight)
        self.updates += 1
        if self.updates > self.config.warmup_steps and self.running > 0.0:
            self.beta = self._aimed(self.running / self.weight, unit)
        return self.beta

    def _aimed(self, mean_margin: float, unit: Unit) -> Beta:
        target = self.config.target_gradient_factor
        aim = math.log((1.0 - target) / target)  # -logit(g)
        low, high = self.config.minimum, self.config.maximum
        wanted = aim / (mean_margin * _factor(self.beta.convention, unit))
        return Beta(min(max(wanted, low), high), self.beta.convention)

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.beta.value, "updates": self.updates, "running": self.running, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        self.beta = Beta(float(state["value"]), self.beta.convention)
        self.updates = int(state["updates"])
        self.running, self.weight = float(state["running"]), float(state["weight"])
