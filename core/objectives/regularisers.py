"""Regularisers: what is added to the preference terms, one number a group.

Both hold on to the winner, against the displacement in which the margin grows while winner and loser get worse together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from polyalign.core.objectives.view import NOTHING, View
from polyalign.core.objectives.weights import Mean, Sum, UnitWeights, reduce_units


class Regulariser(Protocol):
    """``regulariser(view) -> (G,)``; the view's policy is the seat that is trained."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

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

    def __call__(self, view: View) -> Tensor:
        return self.weight * -_chosen_value(view, self.unit_weights)
