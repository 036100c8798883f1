"""Rows of the table: the same answer under other pictures, for models that see.

Notation besides that of table.py: v the right picture, v_l a wrong one (retrieved, cropped, noised), r(y|v) the log-ratio of an
answer under a picture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from polyalign.core.errors import UserError
from polyalign.core.objectives.losses import Contrast, Logistic
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.offsets import AnswerKL
from polyalign.core.objectives.regularisers import KeptReward
from polyalign.core.objectives.rows import TOKENS, AnchoredParameters, Flip, Row, beta_of, preference
from polyalign.core.objectives.view import VALUE
from polyalign.core.recipe import BetaConfig

Weight = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
ANSWERS, PICTURES = (0, 1), (0, 2)
"""The candidates that the term of the answers and the term of the pictures compare."""


class VisualParameters(AnchoredParameters):
    """What the rows for pictures have."""

    beta: BetaConfig = beta_of(0.1)
    """How strongly a log-ratio counts, in nats."""


class RDPO(VisualParameters):
    name: Literal["rdpo"] = "rdpo"

    visual: float = Field(default=1.0, ge=0.0)
    """Weight of the visual term: the same answer under the right and under a retrieved image."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""

    loser_logp: Literal["label", "hardest_negative"] = "label"
    """`label`: a loser is as likely as its own tokens, as in the paper. `hardest_negative`: as the likeliest other token at
    each of its places, as in the authors' code; the reference has to be scored live."""


class MDPO(VisualParameters):
    name: Literal["mdpo"] = "mdpo"

    visual: float = Field(default=1.0, ge=0.0)
    """Weight of the visual term: the same answer under the right image and under one from which much was taken."""

    anchored: float = Field(default=1.0, ge=0.0)
    """Weight of the term that keeps the winner's reward above `delta`, so that the margin does not grow by its falling."""

    delta: float = 0.0
    """What the winner's reward is to exceed; 0 is the publication's."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class CHiP(VisualParameters):
    name: Literal["chip"] = "chip"

    visual: float = Field(default=1.0, ge=0.0)
    """Weight of the comparison of images within the one margin; 1 is the publication's."""

    alpha: float = Field(default=0.1, ge=0.0)
    """How strongly the KL to the reference on the loser's tokens is held down; 0.1 is the authors' code's, 0 leaves it out, and
    with it the need of whole distributions."""


class MCMDPO(VisualParameters):
    name: Literal["mcm_dpo"] = "mcm_dpo"

    weights: tuple[Weight, Weight, Weight, Weight, Weight, Weight, Weight] = (1.0, 0.5, 0.2, 0.5, 0.2, 0.2, 0.2)
    """Weights of the comparisons of (context, image, text) all right with, in this order of what is wrong: text, image, image
    and text, context, context and text, context and image, all three (the code's r3, r2, r5, r1, r4, r6, r7)."""

    normaliser: float | None = Field(default=None, gt=0.0)
    """What the weighted sum is divided by; null divides by the sum of the weights, which is the code's 2.8."""


class Branches(VisualParameters):
    name: Literal["branches"] = "branches"

    terms: dict[str, Positive] = Field(default={"response": 1.0, "image": 1.0}, min_length=1)
    """Weights of the comparisons of all right with branches, by what loses in each: for vision-language models `response`,
    `image` and `context`, joined by + where several do (`image+response`). Figures such as the margin are of the first one, or
    of all where `joint`."""

    joint: bool = False
    """False: each comparison is a loss of its own, and these are added with their weights, as in Re-Align and mDPO. True: one
    loss of the weighted sum of all comparisons, as in MCM-DPO and CHiP."""

    normaliser: float | None = Field(default=None, gt=0.0)
    """Where `joint`, what the weighted sum is divided by; null divides by the sum of the weights."""

    anchored: float = Field(default=0.0, ge=0.0)
    """Weight of mDPO's term, which keeps the winner's reward above `delta`; mDPO has 1."""

    delta: float = 0.0
    """What the winner's reward is to exceed where `anchored`."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""

    @field_validator("terms")
    @classmethod
    def _each_once(cls, terms: dict[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for given, weight in terms.items():
            parts = [part.strip() for part in given.split("+")]
            name = "+".join(sorted(parts))
            if "" in parts or len(set(parts)) < len(parts):
                raise ValueError(f"{given!r} names no branch: write what loses in it, each once, joined by +")
            if "chosen" in parts:
                raise ValueError(f"{given!r} names no branch: nothing loses in chosen, with which all branches are compared")
            if name in found:
                raise ValueError(f"{given!r} is the branch {name!r} once more; give each branch one weight")
            found[name] = weight
        return found

    @model_validator(mode="after")
    def _used(self) -> Branches:
        if self.normaliser is not None and not self.joint:
            raise ValueError("'normaliser' divides the sum of a joint comparison: set 'joint: true', or leave it out")
        if self.delta and not self.anchored:
            raise ValueError("'delta' is what the anchored term asks for: give 'anchored' a weight, or leave it out")
        return self


def _rdpo(parameters: RDPO) -> Objective:
    loss, hardest = Logistic(parameters.label_smoothing), parameters.loser_logp == "hardest_negative"
    visual = Term(loss, candidates=PICTURES, coefficient=parameters.visual, hardest_losers=hardest)
    return preference(parameters, "rdpo", loss, candidates=ANSWERS, hardest_losers=hardest, further=(visual,))


def _mdpo(parameters: MDPO) -> Objective:
    loss = Logistic(parameters.label_smoothing)
    visual = Term(loss, candidates=PICTURES, coefficient=parameters.visual)
    kept = (KeptReward(parameters.anchored, parameters.delta),) if parameters.anchored else ()
    return preference(parameters, "mdpo", loss, candidates=ANSWERS, further=(visual,), regularisers=kept)


def _chip(parameters: CHiP) -> Objective:
    offset = AnswerKL(parameters.alpha) if parameters.alpha else None
    return preference(parameters, "chip", Contrast((1.0, parameters.visual)), offset=offset)


def _mcm(parameters: MCMDPO) -> Objective:
    divisor = sum(parameters.weights) if parameters.normaliser is None else parameters.normaliser
    if not divisor:
        raise UserError("objective.weights are all 0, so there is nothing to compare; give at least one of them a weight")
    return preference(parameters, "mcm_dpo", Contrast(tuple(weight / divisor for weight in parameters.weights)))


def _branches(parameters: Branches) -> Objective:
    names, weights = tuple(parameters.terms), tuple(parameters.terms.values())
    kept = (KeptReward(parameters.anchored, parameters.delta),) if parameters.anchored else ()
    if parameters.joint:
        divisor = sum(weights) if parameters.normaliser is None else parameters.normaliser
        contrast = Contrast(tuple(weight / divisor for weight in weights), parameters.label_smoothing)
        built = preference(parameters, "branches", contrast, regularisers=kept)
    else:
        loss = Logistic(parameters.label_smoothing)
        first, *others = [{"candidates": (0, place), "coefficient": weight} for place, weight in enumerate(weights, start=1)]
        further = tuple(Term(loss, **slots) for slots in others)
        built = preference(parameters, "branches", loss, further=further, regularisers=kept, **first)
    return replace(built, branches=names)


ROWS = (
    Row(
        name="rdpo",
        summary="Re-Align: DPO on the answer, and DPO on the image, under which the same answer should be less likely.",
        formula="-log sigma(beta (r(y_w|v) - r(y_l|v))) - visual log sigma(beta (r(y_w|v) - r(y_w|v_l)))",
        source="arXiv 2502.13146; taco-group/Re-Align@a82ce56 rDPOtrainer.py.",
        differences="The paper's formula. The code scores both losers by the likeliest other token at each place instead, "
        "which the paper does not say: that is loser_logp: hardest_negative.",
        parameters=RDPO,
        likelihoods=TOKENS,
        data=("visual triples",),
        build=_rdpo,
    ),
    Row(
        name="mdpo",
        summary="DPO on the answer, DPO on the image, and a winner that has to stay likelier than it was.",
        formula="-log sigma(beta (r(y_w|v) - r(y_l|v))) - visual log sigma(beta (r(y_w|v) - r(y_w|v_l))) "
        "- anchored log sigma(beta r(y_w|v) - delta)",
        source="arXiv 2406.11839; luka-group/mDPO@ec316ce mdpo_trainer.py.",
        differences="The losing image comes with the pair (the paper crops the right one; the code hides image tokens inside "
        "the model instead).",
        parameters=MDPO,
        likelihoods=TOKENS,
        data=("visual triples",),
        build=_mdpo,
    ),
    Row(
        name="chip",
        summary="One margin of the answers and of the images, with the KL to the reference on the loser's tokens (TDPO2's).",
        formula="-log sigma(beta [(r(y_w|v) - r(y_l|v)) + visual (r(y_w|v) - r(y_w|v_l)) - alpha (K_l - sg K_w)])",
        source="arXiv 2501.16629; LVUGAI/CHiP@ea61529 muffin/train/trainers.py chip_loss.",
        differences="Without its weights on the segments in which the answers differ. Reported rewards are what is trained "
        "(official: beta (r + K) whatever alpha). Finite where the reference underflows.",
        parameters=CHiP,
        needs=VALUE | {"dense_kl"},
        likelihoods=TOKENS,
        data=("visual triples",),
        build=_chip,
    ),
    Row(
        name="mcm_dpo",
        summary="One comparison of (context, image, text) all right with all seven ways of being wrong.",
        formula="-log sigma(beta sum_k w_k (r_0 - r_k) / sum_k w_k)",
        source="LVUGAI/MCM-DPO@519439d llava/train/llava_trainer.py mcmdpo_loss.",
        differences="None with normaliser 2.8. Fewer comparisons are weights of 0; the code keeps dividing by 2.8 then.",
        parameters=MCMDPO,
        likelihoods=TOKENS,
        data=("visual eights",),
        build=_mcm,
    ),
    Row(
        name="branches",
        summary="Any of these made in the recipe: what loses in each comparison, by name, with its weight.",
        formula="-sum_k w_k log sigma(beta (r_0 - r_k)) - anchored log sigma(beta r_0 - delta); with joint the first part is "
        "-log sigma(beta sum_k w_k (r_0 - r_k) / sum_k w_k)",
        source="The common form of dpo, rdpo, mdpo, mcm_dpo, and chip without its KL: each is a choice of terms.",
        differences="None: with their terms it has their values and gradients.",
        parameters=Branches,
        likelihoods=TOKENS,
        data=("named branches",),
        build=_branches,
    ),
)
