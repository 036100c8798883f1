"""Rows of the table: objectives without a reference, and reward models.

They compare likelihoods themselves. Those of tokens have a scale for that, squared errors have none: these rows are for tokens.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.links import LogOdds, PowerReward
from polyalign.core.objectives.losses import Hinge, Logistic
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.offsets import ConstantMargin
from polyalign.core.objectives.regularisers import CentredRewards, KeepUp
from polyalign.core.objectives.rows import (
    TOKENS,
    AnchoredParameters,
    Flip,
    Parameters,
    Row,
    beta_of,
    logistic_or_hinge,
    preference,
)
from polyalign.core.objectives.weights import Mean, Sum
from polyalign.core.recipe import BetaConfig


class SLiC(AnchoredParameters):
    name: Literal["slic_hf"] = "slic_hf"

    beta: BetaConfig = beta_of(1.0)
    """How strongly a log-likelihood counts; 1 is the publication's, which has none."""

    margin: float = Field(default=1.0, gt=0.0)
    """A pair stops teaching when the winner's log-likelihood is this much above the loser's."""

    reduction: Literal["mean", "sum"] = "mean"
    """Of a candidate's log-likelihood: mean over its tokens, or their sum."""

    keep_up: float = Field(default=0.0, ge=0.0)
    """Weight of softplus(1 - r_w), which keeps the winner above the reference, and needs one."""


class SimPO(AnchoredParameters):
    name: Literal["simpo"] = "simpo"

    beta: BetaConfig = beta_of(2.0)
    """How strongly a mean log-likelihood counts; the publication uses 2 to 2.5 (10 for some models)."""

    gamma: float = Field(default=0.5, ge=0.0)
    """Margin on the reward scale by which the winner has to win; the publication's gamma/beta is 0.3 to 0.5 and more."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class AlphaPO(SimPO):
    name: Literal["alphapo"] = "alphapo"

    alpha: float = Field(default=0.25, ge=-2.0, le=2.0)
    """Shape of the reward (1 - p^-alpha)/alpha; 0 is SimPO's log p."""


class CPO(AnchoredParameters):
    name: Literal["cpo"] = "cpo"

    beta: BetaConfig = beta_of(0.1)
    """How strongly a log-likelihood counts."""

    loss: Literal["logistic", "hinge"] = "logistic"
    """On beta (l_w - l_l): -log sigma(d), or max(0, 1 - d)."""

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's negative log-likelihood (mean over its tokens)."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong, for `logistic`."""


class ORPO(AnchoredParameters):
    name: Literal["orpo"] = "orpo"

    beta: BetaConfig = beta_of(1.0)
    """The factor on the log-odds inside the sigmoid; the publication has none, which is 1."""

    weight: float = Field(default=0.1, ge=0.0)
    """Weight of the odds-ratio loss beside the negative log-likelihood (lambda; TRL calls it beta)."""

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's negative log-likelihood (mean over its tokens)."""


class BradleyTerry(Parameters):
    name: Literal["bradley_terry"] = "bradley_terry"

    beta: BetaConfig = beta_of(1.0)
    """The factor on a reward; 1, since a reward model has its own scale."""

    margin: float = Field(default=0.0, ge=0.0)
    """By how much the winner's reward has to exceed the loser's."""

    centre: float = Field(default=0.0, ge=0.0)
    """Weight of (r_w + r_l)^2, which takes away the free constant of rewards; TRL suggests 0.01."""


def _slic(parameters: SLiC) -> Objective:
    keep_up = (KeepUp(parameters.keep_up),) if parameters.keep_up else ()
    weights = Mean() if parameters.reduction == "mean" else Sum()
    hinge = Hinge(parameters.margin)
    return preference(parameters, "slic_hf", hinge, reference=None, weights=weights, regularisers=keep_up)


def _reward_model(parameters: BradleyTerry) -> Objective:
    offset = ConstantMargin(parameters.margin) if parameters.margin else None
    centre = (CentredRewards(parameters.centre),) if parameters.centre else ()
    return Objective("bradley_terry", terms=(Term(Logistic(), offset=offset, reference=None),), regularisers=centre)


ROWS = (
    Row(
        name="slic_hf",
        summary="A hinge on log-likelihoods alone, with a regulariser towards the winner.",
        formula="max(0, margin - beta (l_w - l_l)) + sft e_w + keep_up softplus(1 - r_w)",
        source="arXiv 2305.10425; with means and keep_up as in arXiv 2410.11677; TRL 1.16 CPOTrainer loss_type hinge.",
        differences="The first paper's regulariser is a cross-entropy on a fine-tuning target: give the winner as one by sft.",
        parameters=SLiC,
        likelihoods=TOKENS,
        build=_slic,
    ),
    Row(
        name="simpo",
        summary="A logistic loss on mean log-likelihoods with a margin, without a reference.",
        formula="-log sigma(beta (l_w/n_w - l_l/n_l) - gamma)",
        source="arXiv 2405.14734; TRL 1.16 experimental CPOTrainer loss_type simpo.",
        differences="None. A denoising model's error has no scale of its own, so this is for tokens; mapo is its counterpart.",
        parameters=SimPO,
        likelihoods=TOKENS,
        build=lambda p: preference(
            p, "simpo", Logistic(p.label_smoothing), weights=Mean(), reference=None, offset=ConstantMargin(p.gamma)
        ),
    ),
    Row(
        name="alphapo",
        summary="SimPO with a reward whose shape can be chosen: power functions of the probability instead of its logarithm.",
        formula="-log sigma(beta (s_w - s_l) - gamma), s = (1 - exp(-alpha l/n))/alpha",
        source="arXiv 2501.03884; TRL 1.16 experimental CPOTrainer alphapo_alpha.",
        differences="Taken as a difference of exponentials that goes on as a straight line where it would overflow (TRL: pow).",
        parameters=AlphaPO,
        likelihoods=TOKENS,
        build=lambda p: preference(
            p,
            "alphapo",
            Logistic(p.label_smoothing),
            weights=Mean(),
            link=PowerReward(p.alpha),
            reference=None,
            offset=ConstantMargin(p.gamma),
        ),
    ),
    Row(
        name="cpo",
        summary="DPO against a uniform reference, with the winner's negative log-likelihood added.",
        formula="-log sigma(beta (l_w - l_l)) + sft e_w/n_w",
        source="arXiv 2401.08417; TRL 1.16 experimental CPOTrainer.",
        differences="The added mean is over the winner's own tokens (TRL: over all tokens of a batch).",
        parameters=CPO,
        likelihoods=TOKENS,
        build=lambda p: preference(p, "cpo", logistic_or_hinge(p.loss, p.label_smoothing), reference=None),
    ),
    Row(
        name="orpo",
        summary="Fine-tuning on the winners with a penalty on the odds of the losers, without a reference.",
        formula="e_w/n_w - weight log sigma(o_w - o_l), o = log(p/(1-p)), p = exp(l/n)",
        source="arXiv 2403.07691, Eq. 6; TRL 1.16 experimental ORPOTrainer.",
        differences="The negative log-likelihood is of the answer (TRL: of prompt and answer).",
        parameters=ORPO,
        likelihoods=TOKENS,
        build=lambda p: preference(p, "orpo", Logistic(), weights=Mean(), link=LogOdds(), reference=None, coefficient=p.weight),
    ),
    Row(
        name="bradley_terry",
        summary="A reward model: a head on a backbone whose outputs explain the preferences.",
        formula="-log sigma(r_w - r_l - margin) + centre (r_w + r_l)^2, r the head's reward",
        source="Bradley and Terry 1952; arXiv 2203.02155, Eq. 1; TRL 1.16 RewardTrainer.",
        differences="None. The scores are those of a reward head, one unit a candidate, and not a likelihood.",
        parameters=BradleyTerry,
        likelihoods=frozenset({"token", "surrogate"}),
        build=_reward_model,
    ),
)
