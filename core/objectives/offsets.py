"""Slot E: offset and scale, u = kappa (beta s + o).

An offset is one number a candidate, on the scale of the reward beta s. Offsets may carry gradient (TDPO's KL of the loser does)
and say so. kappa is a plain number of the term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.view import NOTHING, View


class Offset(Protocol):
    """Offsets (G, K) for the candidates of ``view``; ``needs`` and ``seats`` as for unit weights."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

    @property
    def carries_gradient(self) -> bool: ...

    def __call__(self, view: View) -> Tensor: ...


@dataclass(frozen=True)
class RewardMargins:
    """o = -m(y), with m the fixed margins of the batch: the weighted rewards of the other objectives (MODPO, arXiv 2310.03708).

    Raises:
        UserError: the batch has no margins.
    """

    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    carries_gradient: bool = False

    def __call__(self, view: View) -> Tensor:
        if view.batch.margins is None:
            raise UserError(
                "this objective subtracts the rewards of other objectives, but the pairs carry no margins. "
                "Give every pair a margin for each candidate (the weighted sum of the other rewards), or take objective dpo."
            )
        return -view.batch.margins.to(view.policy_values).detach()


@dataclass(frozen=True)
class ConstantMargin:
    """o = -gamma for the preferred candidate, 0 for the others: it must win by gamma (SimPO, SLiC)."""

    gamma: float
    needs: frozenset[str] = NOTHING
    seats: tuple[str, ...] = ()
    carries_gradient: bool = False

    def __call__(self, view: View) -> Tensor:
        return -self.gamma * view.is_chosen.to(view.dtype)
