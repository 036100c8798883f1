"""Slot C for answers of tokens: weights that depend on the partner's length, or on a third model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyalign.core.objectives.view import View
from polyalign.core.objectives.weights import Mean, Sum

PER_UNIT = frozenset({"per_unit"})


@dataclass(frozen=True)
class LengthDesensitised:
    """1 for the units that the shortest candidate of the group has too, ``alpha`` beyond them (LD-DPO, arXiv 2409.06411):
    alpha 1 is DPO, alpha 0 drops the tail. Places count units under the mask, so spans may be interrupted. With ``averages``
    the sum is divided by a candidate's whole length, as TRL does for IPO."""

    alpha: float
    averages: bool = False
    needs: frozenset[str] = PER_UNIT
    seats: tuple[str, ...] = ()

    def __call__(self, view: View) -> Tensor:
        mask = view.policy.mask
        shared = mask.sum(-1).amin(1).reshape(-1, 1, 1)
        tail = mask.cumsum(-1) > shared
        plain = Mean()(view) if self.averages else Sum()(view)
        return plain * torch.where(tail, self.alpha, 1.0).to(view.dtype)


@dataclass(frozen=True)
class TokenGuidance:
    """1 + (2q - 1) alpha r_t with r_t = beta (l_guide,t - l_reference,t) and q the candidate's target (TGDPO, arXiv
    2506.14574): 1 + alpha r_t for a winner, 1 - alpha r_t for a loser, 1 in a tie. The seat ``guide`` is a model trained by
    DPO from the same reference, with the same tokens.

    A weight is negative, and turns its token's gradient round, where alpha beta times the guide's log-ratio passes -1 (of the
    winner): ``clamp`` keeps weights at 0 or above, which the original code does not.
    """

    alpha: float
    clamp: bool = False
    averages: bool = False
    needs: frozenset[str] = PER_UNIT
    seats: tuple[str, ...] = ("guide",)

    def __call__(self, view: View) -> Tensor:
        guide = view.scores["guide"].values.to(view.policy_values).detach()
        guided = torch.where(view.policy.mask, guide - view.reference_values, torch.zeros_like(guide))
        beta = view.beta.to(guided).reshape(-1, 1, 1) if isinstance(view.beta, Tensor) else view.beta
        sign = (2.0 * view.target - 1.0).unsqueeze(-1)
        weights = 1.0 + sign * self.alpha * beta * guided
        return Sum()(view) * (weights.clamp(min=0.0) if self.clamp else weights)
