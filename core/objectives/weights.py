"""Slot C: how the units of a candidate count, and how they become one number.

A candidate's log-ratio is r = sum_u w_u rho_u with rho_u = l_policy,u - l_reference,u. The weights w are detached, and the same
for policy and reference, so a policy equal to its reference has r = 0 exactly whatever they are. They may depend on the whole
group (a token past the end of the partner's answer) and on other seats (a token guide).

Letters: G groups, K candidates in a group, U units of a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyalign.core.objectives.view import NOTHING, View

SAMPLED_UNITS = frozenset({"timestep", "position"})
"""Units that are a sample of what they stand for: their mean is the estimate, and beta's convention holds the rest (d and
T)."""


class UnitWeights(Protocol):
    """Weights (G, K, U) for the units of ``view``. ``needs`` are capabilities asked of the policy's scores, ``seats`` further
    seats that have to be scored, ``averages`` tells that the result is a mean over units and not a total."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

    @property
    def averages(self) -> bool: ...

    def __call__(self, view: View) -> Tensor: ...


def _mean_weights(view: View) -> Tensor:
    mask = view.policy.mask
    count = mask.sum(-1, keepdim=True).clamp(min=1)  # an empty completion scores 0 and has no gradient
    return mask.to(view.dtype) / count


@dataclass(frozen=True)
class Sum:
    """The log-likelihood of the whole candidate: w = 1 for tokens. Sampled timesteps and masked positions are averaged, since
    they are draws of one estimate and not further observations: 1 / (number drawn)."""

    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    averages: bool = False

    def __call__(self, view: View) -> Tensor:
        if view.policy.unit.kind in SAMPLED_UNITS:
            return _mean_weights(view)
        return view.policy.mask.to(view.dtype)


@dataclass(frozen=True)
class Mean:
    """The mean over a candidate's units, w = 1 / n: length-normalised objectives and IPO as TRL computes it."""

    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    averages: bool = True

    def __call__(self, view: View) -> Tensor:
        return _mean_weights(view)


def reduce_units(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """sum_u w_u values_u over units where ``mask`` is true: (G, K, U) -> (G, K).

    Masked values are replaced and not multiplied by zero, so that -inf or nan under the mask harms neither value nor gradient.
    """
    return (torch.where(mask, values, torch.zeros_like(values)) * weights.detach()).sum(-1)


@dataclass(frozen=True)
class Reduced:
    """One number a candidate (G, K): ``log_ratio`` r, ``policy`` and ``reference`` the two sides of it."""

    log_ratio: Tensor
    policy: Tensor
    reference: Tensor


def reduce_view(view: View, unit_weights: UnitWeights) -> Reduced:
    """Policy and reference of ``view`` by ``unit_weights``. The log-ratio is differenced unit by unit before it is summed,
    which makes it exactly zero, and not nearly so, where policy and reference agree."""
    weights, mask = unit_weights(view), view.policy.mask
    policy, reference = view.policy_values, view.reference_values
    return Reduced(
        log_ratio=reduce_units(policy - reference, mask, weights),
        policy=reduce_units(policy, mask, weights),
        reference=reduce_units(reference, mask, weights),
    )
