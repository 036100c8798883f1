"""Slot F, pointwise: losses that look at the score of each candidate by itself, and so at its absolute size.

A link that leaves an unknown constant of the prompt in the scores cannot go before them. Those that need a winner and a loser
see ``Scored.absolute`` in both roles and weigh them by p, as pair losses do; those that need no pair see ``View.desirability``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.losses import Flags, Scored
from polyalign.core.objectives.numerics import bounded_exp

Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"]
_RISK_SCALE = 100.0
"""The divisor in risk_seeking_2's exponential, as in the code."""


class Pointwise(Flags):
    """Flags of a pointwise loss."""

    shift_invariant: bool = False


class WinnerLoser(Pointwise, ABC):
    """A loss of a winner's and a loser's score; a soft p is the mean over both ways round."""

    name: str

    @abstractmethod
    def _hard(self, winner: Tensor, loser: Tensor) -> Tensor:
        """The loss where it is certain which is which."""

    def __call__(self, scored: Scored) -> Tensor:
        _, p = scored.pair(self.name)
        first, second = scored.absolute.unbind(1)
        return p * self._hard(first, second) + (1.0 - p) * self._hard(second, first)


@dataclass(frozen=True)
class NCA(WinnerLoser):
    """-log sigmoid(u_w) - (log sigmoid(-u_w) + log sigmoid(-u_l)) / 2 (arXiv 2402.05369): the winner's score has the fixed
    point sigma(u_w) = 2/3, so its likelihood does not fall without end."""

    name: str = "NCA"

    def _hard(self, winner: Tensor, loser: Tensor) -> Tensor:
        return F.softplus(-winner) + 0.5 * F.softplus(winner) + 0.5 * F.softplus(loser)


@dataclass(frozen=True)
class APOZero(WinnerLoser):
    """1 - sigmoid(u_w) + sigmoid(u_l) (arXiv 2408.06266): raises winners and lowers losers, each by itself."""

    name: str = "APO-zero"
    convex_in_difference: bool = False

    def _hard(self, winner: Tensor, loser: Tensor) -> Tensor:
        return torch.sigmoid(-winner) + torch.sigmoid(loser)


@dataclass(frozen=True)
class APODown(WinnerLoser):
    """sigmoid(u_w) + 1 - sigmoid(u_w - u_l) (arXiv 2408.06266): lowers both, the loser more, for a policy that is better than
    its winners."""

    name: str = "APO-down"
    convex_in_difference: bool = False

    def _hard(self, winner: Tensor, loser: Tensor) -> Tensor:
        return torch.sigmoid(winner) + torch.sigmoid(loser - winner)


@dataclass(frozen=True)
class SelfPlay(Pointwise):
    """sum_k (u_k - eta (q_k - 1/2))^2 with q the target (SPPO, arXiv 2405.00675): each score is regressed on its own win
    rate."""

    eta: float
    name: str = "SPPO"

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.absolute - self.eta * (scored.view.target - 0.5)).square().sum(1)


@dataclass(frozen=True)
class BinaryClassifier(Pointwise):
    """Cross-entropy of a classifier of desirable candidates, -log sigmoid(u) or -log sigmoid(-u), summed over a group (BCO,
    arXiv 2404.04656)."""

    name: str = "BCO"

    def __call__(self, scored: Scored) -> Tensor:
        desirability = scored.view.desirability
        parts = desirability * F.softplus(-scored.absolute) + (1.0 - desirability) * F.softplus(scored.absolute)
        return parts.sum(1)


@dataclass(frozen=True)
class ProspectValue(Pointwise):
    """w (1 - h(u)) with w the weight of the candidate's class and h a utility, mean over the candidates of a group (KTO, arXiv
    2402.01306; Diffusion-KTO, arXiv 2404.04465). x is u for a desirable candidate and -u for an undesirable one, s its sign.

    ``sigmoid``: h = sigma(x). ``loss_averse``: log sigma(x). ``risk_seeking_1``: -s log sigma(-u). ``risk_seeking_2``:
    s exp(u/100) - 1. ``risk_seeking_3``: -log sigma(-x).
    """

    utility: Utility = "sigmoid"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name: str = "KTO"
    convex_in_difference: bool = False

    def __call__(self, scored: Scored) -> Tensor:
        desirability = scored.view.desirability
        wanted = self.desirable_weight * (1.0 - self._value(scored.absolute, 1.0))
        unwanted = self.undesirable_weight * (1.0 - self._value(scored.absolute, -1.0))
        return (desirability * wanted + (1.0 - desirability) * unwanted).mean(1)

    def _value(self, score: Tensor, sign: float) -> Tensor:
        if self.utility == "sigmoid":
            return torch.sigmoid(sign * score)
        if self.utility == "loss_averse":
            return F.logsigmoid(sign * score)
        if self.utility == "risk_seeking_1":
            return -sign * F.logsigmoid(-score)
        if self.utility == "risk_seeking_2":
            return sign * bounded_exp(score / _RISK_SCALE) - 1.0
        if self.utility == "risk_seeking_3":
            return -F.logsigmoid(-sign * score)
        raise UserError(f"utility {self.utility!r} is not known")
