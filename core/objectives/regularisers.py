"""Regularisers: what is added to the preference terms, one number a group.

Most hold on to the winner, against the displacement in which the margin grows while winner and loser get worse together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from polyalign.core.objectives.numerics import bounded_exp
from polyalign.core.objectives.view import NOTHING, View
from polyalign.core.objectives.weights import Mean, Sum, UnitWeights, reduce_units


class Regulariser(Protocol):
    """``regulariser(view) -> (G,)``; the view's policy is the seat that is trained."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

    @property
    def group_separable(self) -> bool: ...

    def __call__(self, view: View) -> Tensor: ...


def _chosen_value(view: View, weights: UnitWeights) -> Tensor:
    return view.of_chosen(reduce_units(view.policy_values, view.policy.mask, weights(view)))


@dataclass(frozen=True)
class WinnerAnchor:
    """lambda beta (-value of the chosen), on the same scale as the reward. For a denoising model -value is the winner's error,
    and beta is half the published one in the usual convention: lambda (beta / 2) e_w."""

    weight: float
    unit_weights: UnitWeights = field(default_factory=Sum)
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        return self.weight * view.beta * -_chosen_value(view, self.unit_weights)


@dataclass(frozen=True)
class AddedSFT:
    """lambda (-value of the chosen), without beta: lambda e_w for a denoising model, lambda times the mean negative
    log-likelihood of a token for a language model (``unit_weights=Sum()`` for that of the whole answer)."""

    weight: float
    unit_weights: UnitWeights = field(default_factory=Mean)
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        return self.weight * -_chosen_value(view, self.unit_weights)


@dataclass(frozen=True)
class BatchTokenSFT:
    """lambda times the mean negative log-likelihood over *all* winners' tokens of the batch, so that long answers count more
    (TRL's sft loss). It couples the groups, through the number of tokens."""

    weight: float
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = False

    def __call__(self, view: View) -> Tensor:
        counts = view.of_chosen(view.policy.mask.sum(-1))
        total = counts.sum().clamp(min=1)
        mask = view.policy.mask
        return self.weight * -view.of_chosen(reduce_units(view.policy_values, mask, mask.to(view.dtype))) * len(counts) / total


@dataclass(frozen=True)
class KeepUp:
    """lambda softplus(margin - r_w), a smooth hinge that keeps the winner's log-ratio above the margin (Shi et al., arXiv
    2410.11677, beside SLiC's hinge)."""

    weight: float
    margin: float = 1.0
    unit_weights: UnitWeights = field(default_factory=Sum)
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ("reference",)
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        log_ratio = reduce_units(view.policy_values - view.reference_values, view.policy.mask, self.unit_weights(view))
        return self.weight * F.softplus(self.margin - view.of_chosen(log_ratio))


@dataclass(frozen=True)
class KeptReward:
    """-lambda log sigmoid(beta r_w - delta): the winner's reward is to exceed delta (mDPO's anchored preference, arXiv
    2406.11839)."""

    weight: float
    delta: float = 0.0
    unit_weights: UnitWeights = field(default_factory=Sum)
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ("reference",)
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        log_ratio = reduce_units(view.policy_values - view.reference_values, view.policy.mask, self.unit_weights(view))
        return self.weight * F.softplus(self.delta - view.beta * view.of_chosen(log_ratio))


@dataclass(frozen=True)
class ReferenceKL:
    """lambda times the estimate e^-rho - 1 + rho >= 0 of a unit's KL to the reference (k3), mean over all units of the batch,
    as ADPO's code takes it; rho is the unit's log-ratio. Exponentials go on as straight lines where they would overflow."""

    weight: float
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ("reference",)
    group_separable: bool = False

    def __call__(self, view: View) -> Tensor:
        mask = view.policy.mask
        log_ratio = (view.policy_values - view.reference_values).masked_fill(~mask, 0.0)
        estimate = bounded_exp(-log_ratio) - 1.0 + log_ratio
        return self.weight * estimate.sum((1, 2)) * len(mask) / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class CentredRewards:
    """c (sum of the group's rewards)^2: for a reward model, whose rewards a comparison leaves free up to a constant,
    c (r_w + r_l)^2 for a pair (arXiv 2312.09244)."""

    weight: float
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        return self.weight * reduce_units(view.policy_values, view.policy.mask, Sum()(view)).sum(1).square()
