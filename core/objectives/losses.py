"""Slot F: preference losses, from scores of the candidates of a group to one number a group.

Pair losses see d = u_0 - u_1, the difference of the two candidates, and p, the probability that candidate 0 is preferred; a
loss with a soft p is p L(d) + (1 - p) L(-d), so that swapping candidates together with the target changes nothing. Listwise
losses see all candidates, each relative to one of them. Pointwise losses see absolute scores
(losses_pointwise.py).

Flags: ``shift_invariant``: adding a constant to all scores of a group changes nothing, so links with an unknown constant are
allowed. ``convex_in_difference``: the expectation over timesteps may be moved outside the loss, which is then an upper bound
(Jensen); otherwise it is a heuristic. ``group_separable``: a group's loss does not depend on other groups of the batch.
``needs`` and ``reference_needs`` are capabilities asked of the policy's and of the reference's scores.

Letters: G groups, K candidates in a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.view import NOTHING, View
from polyalign.core.objectives.weights import Reduced


@dataclass(frozen=True)
class Scored:
    """Scores u = kappa (beta phi(r) + o) of a batch, in the three forms that losses take.

    ``difference`` (G,): u_0 - u_1, jointly stable; None unless K = 2. ``relative`` (G, K): u up to a constant of the group,
    jointly stable. ``absolute`` (G, K): u itself. ``reduced`` and ``view`` are for losses that need more (AOT, KTO).
    """

    difference: Tensor | None
    relative: Tensor
    absolute: Tensor
    reduced: Reduced
    view: View

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(d, p) for a pair loss called ``name``.

        Raises:
            UserError: groups of another size than two.
        """
        self.view.require_pair(f"the {name} loss")
        assert self.difference is not None
        return self.difference, self.view.target[:, 0]


class PreferenceLoss(Protocol):
    """``loss(scored) -> (G,)``."""

    @property
    def name(self) -> str: ...

    @property
    def shift_invariant(self) -> bool: ...

    @property
    def convex_in_difference(self) -> bool: ...

    @property
    def group_separable(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def reference_needs(self) -> frozenset[str]: ...

    def __call__(self, scored: Scored) -> Tensor: ...


class Flags:
    """What holds for most losses; a loss overrides what does not hold for it."""

    shift_invariant: bool = True
    convex_in_difference: bool = True
    group_separable: bool = True
    needs: frozenset[str] = NOTHING
    reference_needs: frozenset[str] = NOTHING


def logistic_with_flips(difference: Tensor, flip: Tensor) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d) = softplus(-d) + e d, elementwise, for any real flip weight e.

    Written for the side that holds more than half the weight, so that neither form cancels; log 2 exactly at d = 0.
    """
    swapped = flip > 0.5
    difference = torch.where(swapped, -difference, difference)
    flip = torch.where(swapped, 1.0 - flip, flip)
    return flip * difference - F.logsigmoid(difference)


def check_smoothing(smoothing: float) -> None:
    if not 0.0 <= smoothing < 0.5:
        raise UserError(
            f"label_smoothing is the share of labels taken to be wrong: 0 or more and less than 0.5, found {smoothing}"
        )


@dataclass(frozen=True)
class Logistic(Flags):
    """-log sigmoid(d), DPO (arXiv 2305.18290, Eq. 7); with ``label_smoothing`` e the cross-entropy to labels wrong with
    probability e (cDPO, eric-mitchell/direct-preference-optimization): -(1-e) log sigmoid(d) - e log sigmoid(-d)."""

    label_smoothing: float = 0.0
    name: str = "logistic"

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        return logistic_with_flips(difference, (1.0 - p) + self.label_smoothing * (2.0 * p - 1.0))


@dataclass(frozen=True)
class Clamped(Flags):
    """The logistic loss with d kept within plus or minus ``limit``, past which it teaches nothing: a bound for a loss that is
    subtracted and would otherwise have none (the slow side of OFS-DPO)."""

    limit: float
    label_smoothing: float = 0.0
    name: str = "clamped logistic"
    convex_in_difference: bool = False

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def __call__(self, scored: Scored) -> Tensor:
        clamped = None if scored.difference is None else scored.difference.clamp(-self.limit, self.limit)
        return Logistic(self.label_smoothing, name=self.name)(replace(scored, difference=clamped))


@dataclass(frozen=True)
class Robust(Flags):
    """[-(1-e) log sigmoid(d) + e log sigmoid(-d)] / (1 - 2e): unbiased when labels are flipped with probability e < 1/2 (robust
    DPO, arXiv 2403.00409). Equals softplus(-d) - e d / (1 - 2e), so it is convex like the logistic loss and unbounded below."""

    label_smoothing: float
    name: str = "robust"

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        correction = self.label_smoothing / (1.0 - 2.0 * self.label_smoothing)
        return logistic_with_flips(difference, (1.0 - p) - correction * (2.0 * p - 1.0))


@dataclass(frozen=True)
class Hinge(Flags):
    """max(0, margin - d) (SLiC, RSO); the gradient at the kink is 0, as in torch."""

    margin: float = 1.0
    name: str = "hinge"

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        return p * F.relu(self.margin - difference) + (1.0 - p) * F.relu(self.margin + difference)


@dataclass(frozen=True)
class Square(Flags):
    """(d - t (2p - 1))^2: a regression of the difference on ``target`` t for a certain label, 0 for a tie, -t for the opposite.

    IPO (arXiv 2310.12036, Eq. 17) has t = 1/(2 tau). For a soft p it is online IPO (arXiv 2403.08635) up to the constant
    p (1 - p) / tau^2, which has no gradient.
    """

    target: float
    name: str = "square"

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        return (difference - self.target * (2.0 * p - 1.0)).square()


@dataclass(frozen=True)
class Listwise(Flags):
    """-sum_k q_k log softmax(u)_k with q the target over K candidates (ADPO, arXiv 2510.18913). With K = 2 and q = (1-e, e) it
    is cDPO with label smoothing e."""

    name: str = "listwise cross-entropy"

    def __call__(self, scored: Scored) -> Tensor:
        target = scored.view.target
        parts = target * F.log_softmax(scored.relative, dim=1)
        return -torch.where(target > 0, parts, torch.zeros_like(parts)).sum(1)


@dataclass(frozen=True)
class ReverseKL(Flags):
    """KL((sigma(d), sigma(-d)) || (1-e, e)) with e = ``label_smoothing`` > 0: the pair form of EXO (arXiv 2402.00856) and DMPO
    (arXiv 2507.07510, where e is alpha). Mode-seeking, bounded, with its minimum 0 at sigma(d) = 1 - e."""

    label_smoothing: float
    name: str = "reverse KL"
    convex_in_difference: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.label_smoothing < 0.5:
            raise UserError(
                "the reverse KL compares with labels that are wrong with a probability label_smoothing greater than 0 and less "
                f"than 0.5 (at 0 the divergence is infinite), found {self.label_smoothing}"
            )

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        other = (1.0 - p) + self.label_smoothing * (2.0 * p - 1.0)
        first, second = F.logsigmoid(difference), F.logsigmoid(-difference)
        return first.exp() * (first - torch.log1p(-other)) + second.exp() * (second - other.log())


@dataclass(frozen=True)
class DiscoPOP(Flags):
    """-(1 - m) log sigmoid(d) + m exp(-d) with m = sigmoid(d / tau) (arXiv 2406.08414, LRML), exp(-d) m taken as one
    exponential, which is bounded for tau < 1 where the original multiplies 0 by infinity."""

    tau: float
    name: str = "DiscoPOP"
    convex_in_difference: bool = False

    def __call__(self, scored: Scored) -> Tensor:
        difference, p = scored.pair(self.name)
        return p * self._hard(difference) + (1.0 - p) * self._hard(-difference)

    def _hard(self, difference: Tensor) -> Tensor:
        modulation = torch.sigmoid(-difference / self.tau)
        return -modulation * F.logsigmoid(difference) + (F.logsigmoid(difference / self.tau) - difference).exp()


@dataclass(frozen=True)
class PlackettLuce(Flags):
    """-log probability of the ranking by target under a Plackett-Luce model of the scores, mean over its K - 1 places:
    log sum_{j >= k} exp(u_j) - u_k in the order of falling target (ListMLE; ADPO's other loss)."""

    name: str = "Plackett-Luce"

    def __call__(self, scored: Scored) -> Tensor:
        order = scored.view.target.argsort(dim=1, descending=True, stable=True)
        ranked = scored.relative.gather(1, order)
        remaining = ranked.flip(1).logcumsumexp(1).flip(1)
        return (remaining - ranked)[:, :-1].mean(1)


@dataclass(frozen=True)
class Contrast(Flags):
    """-log sigmoid(sum_k w_k (u_0 - u_k)): one comparison of the first candidate with all others together (MCM-DPO).

    ``weights`` are those of candidates 1 to K - 1; ``label_smoothing`` is that of :class:`Logistic`. Targets other than "the
    first one" have no meaning here.
    """

    weights: tuple[float, ...]
    label_smoothing: float = 0.0
    name: str = "contrast"

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def __call__(self, scored: Scored) -> Tensor:
        others = scored.relative[:, 1:]
        if others.shape[1] != len(self.weights) or bool((scored.view.chosen != 0).any()):
            raise UserError(
                f"the {self.name} loss compares a preferred first candidate with {len(self.weights)} others, but the groups of "
                f"this batch have {others.shape[1] + 1} candidates, or another one is preferred"
            )
        weights = torch.tensor(self.weights).to(others)
        difference = (weights * (scored.relative[:, :1] - others)).sum(1)
        return logistic_with_flips(difference, torch.full_like(difference, self.label_smoothing))
