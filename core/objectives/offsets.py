"""Slot E: offset and scale, u = kappa (beta s + o).

An offset is one number a candidate, on the scale of the reward beta s. Offsets may carry gradient (TDPO's KL of the loser does)
and say so; one that is taken over the batch (a baseline) is not ``group_separable``. kappa is a plain number of the term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.view import NOTHING, View
from polyalign.core.objectives.weights import Sum, reduce_units


class Offset(Protocol):
    """Offsets (G, K) for the candidates of ``view``; ``needs`` and ``seats`` as for unit weights."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

    @property
    def group_separable(self) -> bool: ...

    def __call__(self, view: View) -> Tensor: ...


@dataclass(frozen=True)
class RewardMargins:
    """o = -m(y), with m the fixed margins of the batch: the weighted rewards of the other objectives (MODPO, arXiv 2310.03708).

    Raises:
        UserError: the batch has no margins.
    """

    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        if view.batch.margins is None:
            raise UserError(
                "this objective subtracts the rewards of other objectives, but the pairs carry no margins. "
                "Give every pair a margin for each candidate (the weighted sum of the other rewards), or take objective dpo."
            )
        return -view.batch.margins.to(view.policy_values).detach()


@dataclass(frozen=True)
class ConstantMargin:
    """o = -gamma q with q the target: -gamma for a preferred candidate, 0 for the others, so it must win by gamma (SimPO,
    SLiC); the same for both in a tie."""

    gamma: float
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        return -self.gamma * view.target


@dataclass(frozen=True)
class PositionKL:
    """o = alpha beta K with K the KL(reference || policy) summed over a candidate's tokens (TDPO, arXiv 2404.11999).

    ``frozen_winner``: the winner's K has no gradient (TDPO2), so that only the loser's is trained, and pushed down. Under a
    soft target q a candidate's K keeps the share 1 - q of its gradient.
    """

    alpha: float
    frozen_winner: bool
    needs: frozenset[str] = frozenset({"dense_kl"})
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        assert view.policy.dense is not None and view.policy.dense.kl is not None, "Objective checks for dense_kl"
        divergence = reduce_units(view.policy.dense.kl.to(view.dtype), view.policy.mask, Sum()(view))
        if self.frozen_winner:
            divergence = divergence + view.target * (divergence.detach() - divergence)
        return self.alpha * view.beta_of_group * divergence


@dataclass(frozen=True)
class AnswerKL:
    """:class:`PositionKL` with a frozen winner, for the first two candidates alone; further ones, the same answer under other
    images, have the first's offset, so that the two cancel (CHiP, arXiv 2501.16629)."""

    alpha: float
    needs: frozenset[str] = frozenset({"dense_kl"})
    seats: tuple[str, ...] = ()
    group_separable: bool = True

    def __call__(self, view: View) -> Tensor:
        offsets = PositionKL(self.alpha, frozen_winner=True)(view)
        return torch.cat([offsets[:, :2], offsets[:, :1].expand(-1, offsets.shape[1] - 2)], 1)


@dataclass(frozen=True)
class Baseline:
    """o = -beta z with one z for the whole batch, detached: the point from which KTO and BCO call a candidate gained or lost.

    ``batch``: the mean log-ratio, at least 0 (Diffusion-KTO). ``classes``: the mean of the desirable and of the undesirable
    mean (Diffusion-KTO's other baseline; BCO's reward shift, there a running mean). ``mismatched``: the mean log-ratio, at
    least 0, of completions that belong to other prompts, an estimate of the KL to the reference (KTO); these are scored in the
    seats ``mismatched`` and ``mismatched_reference``.
    """

    kind: Literal["batch", "classes", "mismatched"]
    needs: frozenset[str] = NOTHING
    group_separable: bool = False

    @property
    def seats(self) -> tuple[str, ...]:
        return ("mismatched", "mismatched_reference") if self.kind == "mismatched" else ()

    def __call__(self, view: View) -> Tensor:
        log_ratio = self._log_ratio(view).detach()
        if self.kind == "classes":
            wanted = view.desirability
            # 1e-6 is the original's guard for a class that is absent, whose mean then counts as 0.
            z = 0.5 * sum((log_ratio * share).sum() / (share.sum() + 1e-6) for share in (wanted, 1.0 - wanted))
        else:
            z = log_ratio.mean().clamp(min=0.0)
        return -(view.beta_of_group * z) * torch.ones_like(view.target)

    def _log_ratio(self, view: View) -> Tensor:
        if self.kind == "mismatched":
            view = View(view.scores["mismatched"], view.scores["mismatched_reference"], view.batch, view.scores, view.beta)
        return reduce_units(view.policy_values - view.reference_values, view.policy.mask, Sum()(view))
