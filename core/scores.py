"""Scores: how likely each unit of each candidate is under one model.

Letters: G groups, K candidates in a group, U units of a candidate (tokens, sampled timesteps, masked positions), D elements of
one unit's output (latent elements of a denoising model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

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


class Distributions(Protocol):
    """The whole distribution at each unit, in whatever form the likelihood keeps it."""

    def divergence_from(self, reference: Any) -> Tensor:
        """KL(reference || self) at each unit (G, K, U), with gradient for self."""
        ...

    def detach(self) -> Distributions: ...


@dataclass(frozen=True)
class DenseStatistics:
    """What some objectives need beyond one number a unit. Absent ones are None.

    ``kl`` (G, K, U) is KL(reference || policy) at each unit (TDPO), taken between the ``distributions`` of two passes;
    ``confidence`` (G, K, U), detached, is log p - log sum p^2 (WPO); ``hidden`` (G, K, U, D), detached, are the states from
    which the units are predicted (CHES); ``runner_up`` (G, K, U), with gradient, is the log-likelihood of the likeliest other
    content of each unit (rDPO as its authors' code has it).
    """

    kl: Tensor | None = None
    confidence: Tensor | None = None
    hidden: Tensor | None = None
    runner_up: Tensor | None = None
    distributions: Distributions | None = None

    def of_candidates(self, index: Tensor) -> DenseStatistics:
        """Those of some candidates; distributions have been compared by then, and stay out."""
        return self._each(lambda part: part.index_select(1, index), None)

    def detach(self) -> DenseStatistics:
        return self._each(Tensor.detach, None if self.distributions is None else self.distributions.detach())

    def _each(self, change: Callable[[Tensor], Tensor], distributions: Distributions | None) -> DenseStatistics:
        parts = (self.kl, self.confidence, self.hidden, self.runner_up)
        kl, confidence, hidden, runner_up = (None if part is None else change(part) for part in parts)
        return DenseStatistics(kl, confidence, hidden, runner_up, distributions)


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
        if self.dense is not None and self.dense.runner_up is not None:
            have.add("runner_up")
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
            dense=None if self.dense is None else self.dense.of_candidates(index),
        )

    def detach(self) -> Scores:
        return replace(
            self,
            values=self.values.detach(),
            residual=None if self.residual is None else self.residual.detach(),
            dense=None if self.dense is None else self.dense.detach(),
        )
