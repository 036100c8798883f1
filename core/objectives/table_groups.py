"""Rows of the table: lists of candidates, and several seats."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.links import Clipped, Identity
from polyalign.core.objectives.losses import Clamped, Listwise, Logistic, PlackettLuce
from polyalign.core.objectives.objective import ANY_LIKELIHOOD, Objective, Term
from polyalign.core.objectives.regularisers import ReferenceKL
from polyalign.core.objectives.rows import TOKENS, Flip, Parameters, PreferenceParameters, Row, preference
from polyalign.core.objectives.weights import Mean, Sum


class ADPO(Parameters):
    name: Literal["adpo"] = "adpo"

    loss: Literal["cross_entropy", "plackett_luce"] = "cross_entropy"
    """`cross_entropy` with the target as it is; `plackett_luce` with the ranking that the target gives."""

    reduction: Literal["sum", "mean"] = "sum"
    """Over a candidate's units. The paper's lists are compared by means where their lengths differ."""

    clip: float | None = Field(default=None, gt=0.0)
    """Log-ratios are kept within this distance from 0, where their gradient ends; the authors' later code uses 5. Null: off."""

    reference_kl: float = Field(default=0.0, ge=0.0)
    """Weight of a KL to the anchor (k3, mean over all tokens of the batch, which couples the groups). Tokens only."""


class OFSDPO(Parameters):
    name: Literal["ofs_dpo"] = "ofs_dpo"

    side: Literal["fast", "slow"] = "fast"
    """Which of the two adapters is trained; the other one is the seat `partner`."""

    alpha: float = Field(default=0.1, ge=0.0)
    """Weight of the comparison of fast with slow. The authors' value is not public; 0.1 is our suggestion."""

    clamp: float | None = Field(default=None, gt=0.0)
    """The comparison of fast with slow teaches nothing more where their reward margins differ by more than this, which bounds
    the slow side's loss; the public re-implementation uses 10. Null: off."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class OnlineDPO(PreferenceParameters):
    name: Literal["online_dpo"] = "online_dpo"

    label_smoothing: Flip = 0.0
    """Share of judgements taken to be wrong."""


def _adpo(parameters: ADPO) -> Objective:
    term = Term(
        Listwise() if parameters.loss == "cross_entropy" else PlackettLuce(),
        weights=Mean() if parameters.reduction == "mean" else Sum(),
        link=Identity() if parameters.clip is None else Clipped(-parameters.clip, parameters.clip),
    )
    penalty = (ReferenceKL(parameters.reference_kl),) if parameters.reference_kl else ()
    return Objective("adpo", terms=(term,), regularisers=penalty, likelihoods=TOKENS if penalty else ANY_LIKELIHOOD)


def _ofs(parameters: OFSDPO) -> Objective:
    smoothing, clamp = parameters.label_smoothing, parameters.clamp
    loss = Logistic(smoothing)
    between = loss if clamp is None else Clamped(clamp, smoothing)
    if parameters.side == "fast":
        chase = Term(between, reference="partner", coefficient=parameters.alpha)
    else:
        chase = Term(between, policy="partner", reference="policy", trains="reference", coefficient=-parameters.alpha)
    return Objective("ofs_dpo", terms=(Term(loss), chase))


ROWS = (
    Row(
        name="adpo",
        summary="A cross-entropy between a target over k candidates and the policy's share of them, seen from an anchor.",
        formula="-sum_k q_k log softmax(beta r)_k, or the Plackett-Luce likelihood of the ranking by q",
        source="arXiv 2510.18913; wk222/verlm@e4883c9 and @9b2152a verl/trainer/adpo/core_algos.py.",
        differences="beta is the paper's 1/tau. Its Plackett-Luce code is wrong where a running maximum changes; ours is not. "
        "Targets come with the data (softmax of rewards, say). The anchor is train.reference.seat: frozen, ema, adapter.",
        parameters=ADPO,
        data=("pairs", "lists"),
        build=_adpo,
    ),
    Row(
        name="online_dpo",
        summary="DPO on fresh samples with a judge's preference as a target, which may be soft.",
        formula="-p log sigma(beta h) - (1-p) log sigma(-beta h)",
        source="arXiv 2402.04792; TRL 1.16 OnlineDPOTrainer loss_type sigmoid.",
        differences="A tie is p = 1/2 (TRL: goes to the first). Sampling is the loop's part; on stored pairs this is dpo.",
        parameters=OnlineDPO,
        build=lambda p: preference(p, "online_dpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="ofs_dpo",
        summary="Two adapters, a fast and a slow one, that chase each other, so that learning goes on as margins grow.",
        formula="fast: L(F|ref) + alpha L(F|S); slow: L(S|ref) - alpha L(F|S); L(a|b) = -log sigma(beta (h_a - h_b))",
        source="arXiv 2406.05534, Eq. 3 to 6, as given by a public re-implementation; there is no code of the authors.",
        differences="Not compared with code of the authors. The slow side's loss is unbounded below unless "
        "clamp is given. Both sides are trained at once, each on an adapter of its own (fast_slow).",
        parameters=OFSDPO,
        build=_ofs,
    ),
)
