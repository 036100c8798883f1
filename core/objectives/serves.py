"""What a modality can give an objective, and the refusal, in words, of an objective that asks for more.

It is asked before hours go into making pairs; the objective itself asks again when it sees scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyalign.core.errors import UserError
from polyalign.core.objectives.objective import LIKELIHOOD_WORDS, Data, Objective, capability_words, in_words
from polyalign.core.scores import Kind

SEAT_WORDS: Mapping[str, str] = {
    "guide": "a model trained by DPO before, as a guide for tokens",
    "partner": "a second adapter that is trained beside",
    "mismatched": "the policy on completions of other prompts",
    "mismatched_reference": "the reference on completions of other prompts",
}
DATA_WORDS: Mapping[Data, str] = {
    "pairs": "pairs",
    "labels": "single candidates with a label",
    "lists": "lists of candidates with a target",
    "pairs with margins": "margins, the weighted rewards of the other objectives for both candidates of every pair",
    "visual triples": "a third candidate for every pair, the chosen answer under another image",
    "visual eights": "all eight combinations of right and wrong context, image and text",
    "named branches": "a candidate for every branch that its terms name",
}


@dataclass(frozen=True)
class Offer:
    """What the recipes of a modality can give: the kind of ``likelihood``, ``capabilities`` of its scores, kinds of ``data``
    and ``seats`` besides the policy. ``who`` names it in messages."""

    who: str
    likelihood: Kind
    capabilities: frozenset[str]
    data: frozenset[Data] = frozenset({"pairs"})
    seats: frozenset[str] = frozenset({"reference"})


@dataclass(frozen=True)
class Plan:
    """What a recipe plans that objectives may not stand: its ``reference`` seat, and whether a batch is ``cut`` into
    micro-batches."""

    reference: str
    cut: bool


def refuse_unless_served(objective: Objective, offer: Offer, plan: Plan, *, key: str) -> None:
    """Refuse an objective that ``offer`` or ``plan`` cannot serve; ``key`` is where it stands in the recipe.

    Raises:
        UserError: the first reason, and what to do.
    """
    reason = next(_reasons(objective, offer, plan), None)
    if reason is not None:
        raise UserError(f"{key}: {reason}")


def _reasons(objective: Objective, offer: Offer, plan: Plan) -> Iterator[str]:
    name, others = objective.name, "Take another objective (polyalign explain objective)"
    if offer.likelihood not in objective.likelihoods:
        yield (
            f"{name} is for scores of {in_words(objective.likelihoods)}, and {offer.who} has those of "
            f"{LIKELIHOOD_WORDS[offer.likelihood]}. {others}"
        )
    if not offer.data & set(objective.data):
        wanted = " or ".join(DATA_WORDS[data] for data in objective.data)
        yield f"{name} needs {wanted}, and {offer.who} makes {' and '.join(sorted(offer.data))} without. {others}"
    missing = objective.needs - offer.capabilities
    if missing:
        yield f"{name} needs {capability_words(missing)} of the scores, which {offer.who} does not give. {others}"
    for seat in objective.seats[1:]:
        if seat not in offer.seats:
            words = SEAT_WORDS.get(seat, "scores of another model")
            yield f"{name} needs the seat {seat!r} ({words}), which {offer.who} cannot fill. {others}"
    if plan.reference in ("cached", "none") and objective.reference_needs:
        yield values_only(objective, plan.reference)
    if objective.moving_reference and plan.reference != "ema":
        yield (
            f"{name} is DPO with a reference that follows the policy, and train.reference.seat is {plan.reference}. Set "
            "train.reference.seat: ema (and ema_decay), or take objective dpo"
        )
    if plan.cut and not objective.group_separable:
        yield (
            f"{name} as it is set couples the pairs of a batch, so a batch cannot be cut: set train.micro_batch_size to "
            f"train.batch_size{_uncoupled(objective)}"
        )


def _uncoupled(objective: Objective) -> str:
    if any(term.safeguard is not None and not term.safeguard.group_separable for term in objective.terms):
        return ", or objective.safeguard_scope to group"
    if any(term.offset is not None and not term.offset.group_separable for term in objective.terms):
        return ", or objective.baseline to none"
    return ""


def values_only(objective: Objective, seat: str) -> str:
    """Why a reference seat that has values and nothing else does not do for ``objective``."""
    return (
        f"{objective.name} needs {capability_words(objective.reference_needs)} of the reference, and "
        f"train.reference.seat: {seat} has values only, or none. Set it to adapter_off, frozen or ema"
    )
