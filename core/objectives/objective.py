"""An objective is a weighted list of terms plus regularisers; a term is one filling of the slots.

    rho = l_policy - l_reference          per unit, seats named by the term
    r   = sum_u w_u rho_u                 unit weights (weights.py)
    s   = phi(r)                          link (links.py)
    u   = kappa (beta s + o)              offset and scale (offsets.py)
    L   = loss(u, target)                 preference loss (losses.py)

and the objective's value for a group is weight_g (sum_j c_j v_j L_j + sum_k R_k), with v the detached sample weights and R the
regularisers. What cannot be combined is refused when the term is made; what the scores must provide is checked at the call.

Letters: G groups, K candidates in a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives.links import Identity, Link
from polyalign.core.objectives.losses import Logistic, PreferenceLoss, Scored
from polyalign.core.objectives.offsets import Offset
from polyalign.core.objectives.regularisers import Regulariser
from polyalign.core.objectives.safeguard import WinnerSafeguard
from polyalign.core.objectives.view import VALUE, View
from polyalign.core.objectives.weights import Mean, Sum, UnitWeights, reduce_units, reduce_view
from polyalign.core.scores import Kind, Scores

Data = Literal["pairs", "labels", "lists", "pairs with margins", "visual triples", "visual eights", "named branches"]
"""What groups an objective can be trained on. ``labels``: single candidates, each desirable or not. ``lists``: more than two
candidates with a target. ``visual triples``: chosen, rejected, chosen under another image. ``visual eights``: MCM-DPO's.
``named branches``: chosen, and a candidate for each of ``Objective.branches``."""

RUNNER_UP = frozenset({"runner_up"})
ANY_LIKELIHOOD: frozenset[Kind] = frozenset({"token", "timestep", "position", "surrogate"})


class SampleWeight(Protocol):
    """Slot G: a detached weight (G,) of each group (WPO, confidence, metric gap)."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def seats(self) -> tuple[str, ...]: ...

    def __call__(self, view: View) -> Tensor: ...


@dataclass(frozen=True)
class PolicyConfidence:
    """WPO (arXiv 2406.11827): exp of the sum over a group's candidates of the mean over tokens of log p - log sum p^2, which
    is near 1 for answers drawn from the policy itself and small for those it would never give."""

    needs: frozenset[str] = frozenset({"confidence"})
    seats: tuple[str, ...] = ()

    def __call__(self, view: View) -> Tensor:
        assert view.policy.dense is not None and view.policy.dense.confidence is not None, "Objective checks for confidence"
        confidence = view.policy.dense.confidence.to(view.dtype)
        return reduce_units(confidence, view.policy.mask, Mean()(view)).sum(1).exp()


@dataclass(frozen=True)
class Outcome:
    """``loss`` (G,), with gradient. ``statistics``, detached: ``policy_value``, ``reference_value``, ``logratio`` and
    ``reward`` (G, K), ``margin``, ``accuracy`` and ``gradient_weight`` (G,), and ``rejected_scale`` (G,) where a safeguard
    acts.

    The reward is the score that is trained, u, with link, offset and scale; the margin is that of the chosen candidate over
    (the mean of) the others, and for single candidates with a label their reward, negative for an undesirable one; a tie counts
    half in the accuracy; ``gradient_weight`` is sigmoid(-margin). Where the value of the scores is not a likelihood, only
    ``policy_value`` and ``reference_value`` are given.
    """

    loss: Tensor
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One comparison. ``policy`` and ``reference`` name seats: OFS-DPO puts the slow adapter in the reference's place, SimPO
    has none. ``trains`` says which of the two keeps its gradient. ``candidates`` are those of the group that are compared, all
    by default: a term of a visual objective compares two of three. ``hardest_losers``: the losers' units are scored by the
    likeliest content that they do not have, under policy and reference each its own.

    Raises:
        UserError: slots that do not fit together.
    """

    loss: PreferenceLoss = field(default_factory=Logistic)
    weights: UnitWeights = field(default_factory=Sum)
    link: Link = field(default_factory=Identity)
    offset: Offset | None = None
    scale: float = 1.0
    sample_weight: SampleWeight | None = None
    safeguard: WinnerSafeguard | None = None
    policy: str = "policy"
    reference: str | None = "reference"
    trains: Literal["policy", "reference"] = "policy"
    coefficient: float = 1.0
    candidates: tuple[int, ...] | None = None
    hardest_losers: bool = False

    def __post_init__(self) -> None:
        loss, link = self.loss, self.link
        if link.needs_shift_invariance and not loss.shift_invariant:
            raise UserError(
                f"the {link.name} link gives scores up to an unknown constant of each prompt, which the {loss.name} loss does "
                "not cancel, since it does not look at differences within one prompt alone. Take the identity link (reverse "
                "KL), or a pairwise or listwise loss."
            )
        if self.weights.averages and not link.on_means:
            raise UserError(
                f"the {link.name} link cannot follow a mean over units: its unknown constant, divided by the candidates' "
                "lengths, would not cancel between candidates of different length. Reduce by the sum, or take the identity or "
                "the jensen_shannon link."
            )
        if link.of_likelihood and self.reference is not None:
            raise UserError(
                f"the {link.name} link is of a likelihood itself, and has no meaning for a ratio to a reference. Take a term "
                "without a reference, or another link."
            )
        if self.sample_weight is not None and not loss.group_separable:
            raise UserError(
                f"the {loss.name} loss couples the groups of a batch, so a weight for each group has no meaning in it"
            )
        if self.trains == "reference" and self.reference is None:
            raise UserError("a term that trains its reference needs a seat for it")

    @property
    def needs(self) -> frozenset[str]:
        slots = (self.weights, self.offset, self.loss, self.sample_weight, self.safeguard)
        return VALUE.union(RUNNER_UP if self.hardest_losers else (), *(slot.needs for slot in slots if slot is not None))

    @property
    def reference_needs(self) -> frozenset[str]:
        """Capabilities of the reference's scores besides its values."""
        return self.loss.reference_needs | (RUNNER_UP if self.hardest_losers and self.reference else frozenset())

    @property
    def seats(self) -> tuple[str, ...]:
        slots = (self.weights, self.offset, self.sample_weight)
        further = [seat for slot in slots if slot is not None for seat in slot.seats]
        return _in_order([self.policy, *([self.reference] if self.reference else []), *further])

    @property
    def group_separable(self) -> bool:
        slots = (self.loss, self.offset, self.safeguard)
        return all(slot.group_separable for slot in slots if slot is not None)

    def view(self, scores: Mapping[str, Scores], batch: Batch, beta: float | Tensor) -> View:
        """What this term sees of ``scores``; the side that it does not train is detached."""
        policy = _seat(scores, self.policy)
        reference = scores.get(self.reference) if self.reference else None
        if self.trains == "reference":
            policy = policy.detach()
        elif reference is not None:
            reference = reference.detach()
        view = View(policy, reference, batch, scores, beta)
        if self.candidates is not None:
            view = view.of_candidates(self.candidates)
        return view.with_hardest_losers() if self.hardest_losers else view

    def __call__(self, view: View) -> Outcome:
        """The loss (G,) of this term, coefficient included, with its statistics."""
        scale = None
        if self.safeguard is not None:
            view, scale = self.safeguard.guard(view)
        scored = self.score(view)
        loss = self.coefficient * self.loss(scored)
        if self.sample_weight is not None:
            loss = loss * self.sample_weight(view).detach()
        statistics = statistics_of(scored)
        if scale is not None:
            statistics["rejected_scale"] = scale
        return Outcome(loss, statistics)

    def score(self, view: View) -> Scored:
        """u = kappa (beta phi(r) + o) in the forms that losses take."""
        reduced = reduce_view(view, self.weights)
        r = reduced.log_ratio
        offset = None if self.offset is None else self.offset(view)
        beta = view.beta_of_group
        greatest = r.gather(1, r.argmax(1, keepdim=True)).expand_as(r)

        def put_together(link_scores: Tensor, added: Tensor | None) -> Tensor:
            return self.scale * (beta * link_scores if added is None else beta * link_scores + added)

        difference = None
        if r.shape[1] == 2:
            between = None if offset is None else offset[:, :1] - offset[:, 1:]
            difference = put_together(self.link.difference(r[:, :1], r[:, 1:]), between).squeeze(1)
        return Scored(
            difference=difference,
            relative=put_together(self.link.difference(r, greatest), offset),
            absolute=put_together(self.link.score(r), offset),
            reduced=reduced,
            view=view,
        )


def statistics_of(scored: Scored) -> dict[str, Tensor]:
    """The detached statistics of :class:`Outcome`, from scores as they enter the loss."""
    view, reduced = scored.view, scored.reduced
    statistics = {"policy_value": reduced.policy, "reference_value": reduced.reference}
    if view.policy.value_meaningful:
        margin = _margin(scored)
        tie = torch.full_like(margin, 0.5)
        statistics |= {
            "logratio": reduced.log_ratio,
            "reward": scored.absolute,
            "margin": margin,
            "accuracy": torch.where(margin == 0, tie, (margin > 0).to(margin)),
            "gradient_weight": torch.sigmoid(-margin),
        }
    return {name: value.detach() for name, value in statistics.items()}


def _margin(scored: Scored) -> Tensor:
    view = scored.view
    if scored.absolute.shape[1] == 1 and view.batch.desirable is not None:
        return torch.where(view.desirability[:, 0] > 0.5, scored.absolute[:, 0], -scored.absolute[:, 0])
    if scored.difference is not None:
        return torch.where(view.chosen == 0, scored.difference, -scored.difference)
    others = scored.relative.masked_fill(view.is_chosen, 0.0).sum(1) / max(1, scored.relative.shape[1] - 1)
    return view.of_chosen(scored.relative) - others


def _seat(scores: Mapping[str, Scores], seat: str) -> Scores:
    if seat not in scores:
        raise ValueError(f"the objective asks for scores of the seat {seat!r}; given are {sorted(scores)}")
    return scores[seat]


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


_OBSERVER = Term()
"""Gives an objective without terms (plain SFT) the statistics of all others: those of the implicit DPO reward."""


@dataclass(frozen=True)
class Objective:
    """``objective(scores, batch, beta=Beta.effective(unit)) -> Outcome``. Statistics are those of the first term.

    ``likelihoods`` are the kinds of units it has a meaning for, ``data`` what its groups may be (any one of these);
    ``moving_reference`` says that it is what its name says only with a reference that follows the policy. ``branches`` are the
    names of the candidates after the first, in order, where the parameters name them; what they mean is the modality's.

    Without terms (SFT) they are those of the implicit reward, where a missing reference counts as zeros.

    Raises:
        UserError: neither terms nor regularisers; at the call, scores that lack what the slots need.
    """

    name: str
    terms: tuple[Term, ...] = ()
    regularisers: tuple[Regulariser, ...] = ()
    policy: str = "policy"
    likelihoods: frozenset[Kind] = ANY_LIKELIHOOD
    data: tuple[Data, ...] = ("pairs",)
    moving_reference: bool = False
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.terms and not self.regularisers:
            raise UserError(
                f"objective {self.name!r} has neither a preference term nor a regulariser, so there is nothing to train"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities of the policy's scores; the trainer asks the adapter for the costly ones only when they are here."""
        return VALUE.union(*(part.needs for part in (*self.terms, *self.regularisers)))

    @property
    def seats(self) -> tuple[str, ...]:
        """Seats to score, the policy first."""
        return _in_order([self.policy, *(seat for part in (*self.terms, *self.regularisers) for seat in part.seats)])

    @property
    def group_separable(self) -> bool:
        """Whether each group's loss depends on that group alone, so that micro-batches give the gradient of the whole batch."""
        return all(part.group_separable for part in (*self.terms, *self.regularisers))

    @property
    def is_bound(self) -> bool:
        """Whether the mean loss over noise levels is an upper bound of the loss of their mean log-ratio (Jensen): every loss is
        convex in it, and no link bends it before. Otherwise the objective is a heuristic for denoising models."""
        return all(
            term.loss.convex_in_difference and isinstance(term.link, Identity) and term.coefficient >= 0.0
            for term in self.terms
        )

    @property
    def reference_needs(self) -> frozenset[str]:
        """Capabilities of the reference's scores besides its values: a reference that is cached as values has none of them."""
        dense = frozenset({"dense_kl"}) & self.needs  # taken against whole distributions of the reference
        return dense.union(*(term.reference_needs for term in self.terms))

    def __call__(self, scores: Mapping[str, Scores], batch: Batch, *, beta: float | Tensor) -> Outcome:
        """The loss of each group of ``batch``, with gradient, and its statistics. ``beta``: a number, or one a group (G,)."""
        self._check(scores)
        outcomes = [term(term.view(scores, batch, beta)) for term in self.terms]
        observed = self._observe(scores, batch, beta)
        parts = [outcome.loss for outcome in outcomes] + [regulariser(observed) for regulariser in self.regularisers]
        loss = torch.stack(parts).sum(0)
        if batch.weight is not None:
            loss = loss * batch.weight.to(loss)
        return Outcome(loss, self._statistics(outcomes, observed))

    def _statistics(self, outcomes: list[Outcome], observed: View) -> dict[str, Tensor]:
        """Those of the first term. Where it has no reference and one is scored all the same, its values and the log-ratios to
        it are reported, for the displacement of winner and loser."""
        if outcomes and (self.terms[0].reference is not None or observed.reference is None):
            return outcomes[0].statistics
        seen = statistics_of(_OBSERVER.score(observed))
        if not outcomes:
            return seen
        return outcomes[0].statistics | {name: seen[name] for name in ("reference_value", "logratio") if name in seen}

    def _observe(self, scores: Mapping[str, Scores], batch: Batch, beta: float | Tensor) -> View:
        reference = scores.get("reference")
        return View(_seat(scores, self.policy), None if reference is None else reference.detach(), batch, scores, beta)

    def _check(self, scores: Mapping[str, Scores]) -> None:
        asked = [(term.policy, term.needs) for term in self.terms]
        asked += [(self.policy, regulariser.needs) for regulariser in self.regularisers]
        for seat, needs in asked:
            provides = _seat(scores, seat).provides
            kind = _seat(scores, seat).unit.kind
            if kind not in self.likelihoods:
                raise UserError(
                    f"objective {self.name!r} has no meaning for scores of {LIKELIHOOD_WORDS[kind]}: it is for "
                    f"{in_words(self.likelihoods)}. `polyalign explain objective` lists the others."
                )
            missing = needs - provides
            if missing:
                raise UserError(
                    f"objective {self.name!r} needs {capability_words(missing)} from the scores of the {seat} seat, and "
                    f"this likelihood provides only {capability_words(provides)}. {_REMEDY}"
                )
        for term in self.terms:
            given = frozenset() if term.reference is None or term.reference not in scores else scores[term.reference].provides
            if term.reference_needs - given:
                raise UserError(
                    f"objective {self.name!r} needs {capability_words(term.reference_needs)} from the reference as well. "
                    "Score it live (train.reference.seat: adapter_off, frozen or ema); a cached one keeps values only."
                )


LIKELIHOOD_WORDS: Mapping[Kind, str] = {
    "token": "tokens (text, vision-language)",
    "timestep": "denoising models (image, audio, video, LiDAR)",
    "position": "masked positions (MAR)",
    "surrogate": "surrogates (score differences)",
}


def in_words(likelihoods: frozenset[Kind]) -> str:
    return ", ".join(words for kind, words in LIKELIHOOD_WORDS.items() if kind in likelihoods)


_CAPABILITIES = {
    "value": "a value for each candidate",
    "per_unit": "a value for each unit (token, timestep)",
    "output_gradient": "the network's output (the residual, keep_residual=True)",
    "dense_kl": "the KL of whole next-token distributions",
    "confidence": "the confidence of next-token distributions",
    "runner_up": "the likeliest token that does not stand there",
}
_REMEDY = "Take an objective that needs less (`polyalign explain objective` lists them), or a likelihood that provides it."


def capability_words(capabilities: frozenset[str]) -> str:
    """Capabilities of scores, by name and in words."""
    if not capabilities:
        return "nothing"
    return " and ".join(f"{name} ({_CAPABILITIES.get(name, 'a capability of its own')})" for name in sorted(capabilities))
