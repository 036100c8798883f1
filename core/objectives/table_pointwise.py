"""Rows of the table: objectives that judge each candidate by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.losses_pointwise import NCA, APODown, APOZero, BinaryClassifier, ProspectValue, SelfPlay, Utility
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.offsets import Baseline
from polyalign.core.objectives.rows import PROBABILITY_FREE, Parameters, PreferenceParameters, Row, preference


class NCAParameters(PreferenceParameters):
    name: Literal["nca"] = "nca"


class APOZeroParameters(PreferenceParameters):
    name: Literal["apo_zero"] = "apo_zero"


class APODownParameters(PreferenceParameters):
    name: Literal["apo_down"] = "apo_down"


class SPPO(PreferenceParameters):
    name: Literal["sppo"] = "sppo"

    eta: float = Field(default=10.0, gt=0.0)
    """The reward of a candidate that always wins is eta/2, of one that always loses -eta/2. TRL's beta is 1/eta (0.1); the
    publication uses 1000."""


class BCO(Parameters):
    name: Literal["bco"] = "bco"

    baseline: Literal["none", "batch", "classes"] = "none"
    """Reward shift: `classes`, the mean of the desirable and the undesirable mean reward of the batch (the publication keeps a
    running mean of it); `batch`, the batch's mean, at least 0; `none`, as in TRL 1.16. Shifts couple the pairs of a batch."""


class KTO(Parameters):
    name: Literal["kto"] = "kto"

    baseline: Literal["batch", "classes", "mismatched", "none"] = "batch"
    """Where gains begin: `batch`, the mean log-ratio of the batch, at least 0; `classes`, the mean of the desirable and the
    undesirable mean; `mismatched`, the mean over completions of other prompts, as in the publication, which have to be scored
    as well; `none`, 0, which is APO-zero for unpaired data. All but `none` couple the pairs of a batch."""

    desirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of desirable candidates; the publication balances the classes with the two weights."""

    undesirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of undesirable candidates."""


class DiffusionKTO(KTO):
    name: Literal["diffusion_kto"] = "diffusion_kto"

    baseline: Literal["batch", "classes", "none"] = "batch"
    """Where gains begin: `batch`, the mean log-ratio of the batch, at least 0; `classes`, the mean of the desirable and the
    undesirable mean; `none`, 0. All but `none` couple the pairs of a batch."""

    utility: Utility = "sigmoid"
    """How a gain is valued: `sigmoid` is the Kahneman-Tversky model, and the publication's best; `loss_averse` is concave,
    `risk_seeking_1` to `_3` reward gains without bound."""


def _baseline(parameters: BCO | KTO) -> Baseline | None:
    return None if parameters.baseline == "none" else Baseline(parameters.baseline)


def _kto(parameters: KTO, name: str, utility: Utility) -> Objective:
    value = ProspectValue(utility, parameters.desirable_weight, parameters.undesirable_weight)
    return Objective(name, terms=(Term(value, offset=_baseline(parameters)),))


ROWS = (
    Row(
        name="nca",
        summary="Noise contrastive alignment: winners are told from noise, so that their likelihood does not fall.",
        formula="-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l))/2",
        source="arXiv 2402.05369; TRL 1.16 loss_type nca_pair.",
        differences="None.",
        parameters=NCAParameters,
        build=lambda p: preference(p, "nca", NCA()),
    ),
    Row(
        name="sppo",
        summary="Self-play: each candidate's log-ratio is regressed on its own win rate.",
        formula="sum_k (beta r_k - eta (q_k - 1/2))^2, q the win rate (1 and 0 for a plain pair)",
        source="arXiv 2405.00675; TRL 1.16 loss_type sppo_hard.",
        differences="As for ipo there is no beta in the paper: {value: 1, convention: nats}. Soft win rates are "
        "taken as they are.",
        parameters=SPPO,
        build=lambda p: preference(p, "sppo", SelfPlay(p.eta)),
    ),
    Row(
        name="apo_zero",
        summary="Winners up and losers down, each by itself: for winners better than the policy.",
        formula="1 - sigma(beta r_w) + sigma(beta r_l)",
        source="arXiv 2408.06266; TRL 1.16 loss_type apo_zero.",
        differences="None.",
        parameters=APOZeroParameters,
        build=lambda p: preference(p, "apo_zero", APOZero()),
    ),
    Row(
        name="apo_down",
        summary="Both down, losers more: for a policy better than its winners.",
        formula="sigma(beta r_w) + 1 - sigma(beta h)",
        source="arXiv 2408.06266; TRL 1.16 loss_type apo_down.",
        differences="None.",
        parameters=APODownParameters,
        build=lambda p: preference(p, "apo_down", APODown()),
    ),
    Row(
        name="bco",
        summary="A classifier of desirable candidates whose logit is the implicit reward.",
        formula="-log sigma(beta r - delta) for a desirable, -log sigma(-(beta r - delta)) for an undesirable candidate",
        source="arXiv 2404.04656; TRL 1.16 loss_type bco_pair.",
        differences="TRL 1.16 has delta = 0 (baseline: none); earlier versions and the paper keep a running mean, ours is "
        "of the batch (baseline: classes). Takes pairs, or single candidates with labels.",
        parameters=BCO,
        data=("pairs", "labels"),
        build=lambda p: Objective("bco", terms=(Term(BinaryClassifier(), offset=_baseline(p)),)),
    ),
    Row(
        name="kto",
        summary="Prospect theory on single candidates that are liked or disliked; a pair counts as one of each.",
        formula="w_d (1 - sigma(beta (r - z))) for a desirable, w_u (1 - sigma(beta (z - r))) for an undesirable candidate",
        source="arXiv 2402.01306, Eq. 8; TRL 1.16 KTOTrainer loss_type kto, and apo_zero_unpaired with baseline: none.",
        differences="z is the batch's mean log-ratio unless baseline says mismatched, which is the paper's and TRL's estimate.",
        parameters=KTO,
        data=("pairs", "labels"),
        build=lambda p: _kto(p, "kto", "sigmoid"),
    ),
    Row(
        name="diffusion_kto",
        summary="KTO for denoising models: single pictures that are liked or disliked; a pair counts as one of each.",
        formula="w (1 - h(+-beta (r - z))), h sigmoid or another utility, z the batch's mean log-ratio, at least 0",
        source="arXiv 2404.04465; jacklishufan/diffusion-kto@226bbd0 train_kto_sd_v1.5.py.",
        differences="The code's beta is on the mean error: {value: 5000, convention: mean}.",
        parameters=DiffusionKTO,
        likelihoods=PROBABILITY_FREE,
        data=("pairs", "labels"),
        build=lambda p: _kto(p, "diffusion_kto", p.utility),
    ),
)
