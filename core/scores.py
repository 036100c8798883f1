"""Scores: how likely each unit of each candidate is under one model.

Letters: G groups, K candidates in a group, U units of a candidate (tokens, sampled timesteps, masked positions), D elements of
one unit's output (latent elements of a denoising model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["token", "timestep", "position", "surrogate"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What one value of ``Scores.values`` is, so that beta can be stated in any convention and converted exactly.

    ``token``: the log-probability of one token, in nats. ``timestep`` and ``position``: *minus the mean* over ``elements`` of a
    squared error at one of ``steps`` noise levels. ``surrogate``: a value whose gradient is meant and whose size is not.
    """

    kind: Kind
    elements: int | None = None  # d, elements in the mean
    steps: int | None = None  # T, noise levels the estimator samples from


@dataclass(frozen=True)
class DenseStatistics:
    """What some objectives need beyond one number a unit. ``kl`` (G, K, U) is KL(reference || policy) at each unit (TDPO);
    ``confidence`` (G, K, U) is log p - log sum p^2 (WPO). Absent ones are None."""

    kl: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Unit log-likelihoods (G, K, U) with their mask, in float32 or wider whatever the model's dtype.

    ``residual`` (G, K, U, D), prediction minus target with gradient, is filled by denoising likelihoods on request:
    output-space safeguards (Diffusion-SDPO) need it. ``notes`` are detached extras for the report, for instance ``timestep``
    (G, U). ``value_meaningful`` is False where the value is not a likelihood (score-difference surrogates): margins and
    accuracies computed from it are then not rewards and are not reported.
    """

    values: Tensor
    mask: Tensor
    unit: Unit
    residual: Tensor | None = None
    dense: DenseStatistics | None = None
    value_meaningful: bool = True
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape != self.mask.shape:
            raise ValueError(
                f"scores are (groups, candidates, units) with a mask of that shape, found values {tuple(self.values.shape)} "
                f"and mask {tuple(self.mask.shape)}"
            )

    @property
    def provides(self) -> frozenset[str]:
        """Capabilities an objective may ask for."""
        have = {"value"}
        if self.values.shape[-1] > 1 or self.unit.kind == "token":
            have.add("per_unit")
        if self.residual is not None:
            have.add("output_gradient")
        if self.dense is not None and self.dense.kl is not None:
            have.add("dense_kl")
        if self.dense is not None and self.dense.confidence is not None:
            have.add("confidence")
        return frozenset(have)

    def of_candidates(self, places: Sequence[int]) -> Scores:
        """Scores of some candidates of each group, in the given order."""
        index = torch.tensor(places, device=self.values.device)

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(1, index)

        return replace(
            self,
            values=self.values.index_select(1, index),
            mask=self.mask.index_select(1, index),
            residual=part(self.residual),
            dense=None if self.dense is None else DenseStatistics(part(self.dense.kl), part(self.dense.confidence)),
        )

    def detach(self) -> Scores:
        return replace(
            self,
            values=self.values.detach(),
            residual=None if self.residual is None else self.residual.detach(),
            dense=None
            if self.dense is None
            else DenseStatistics(*(None if x is None else x.detach() for x in (self.dense.kl, self.dense.confidence))),
        )
