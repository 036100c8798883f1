"""Rows of the table: objectives on pairs with a reference, DPO and what stands close to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.links import AlphaDivergence, Identity, JensenShannon, Link
from polyalign.core.objectives.losses import DiscoPOP, Hinge, Logistic, ReverseKL, Robust, Square
from polyalign.core.objectives.losses_coupled import AOT
from polyalign.core.objectives.losses_pointwise import BinaryClassifier
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.offsets import RewardMargins
from polyalign.core.objectives.regularisers import AddedSFT, BatchTokenSFT
from polyalign.core.objectives.rows import (
    AnchoredParameters,
    Flip,
    Parameters,
    PreferenceParameters,
    Row,
    logistic_or_hinge,
    preference,
)
from polyalign.core.objectives.weights import Mean, Sum


class DPO(PreferenceParameters):
    name: Literal["dpo"] = "dpo"

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class CDPO(PreferenceParameters):
    name: Literal["cdpo"] = "cdpo"

    label_smoothing: Flip = 0.1
    """Share of labels taken to be wrong; the loss has its minimum at sigma(beta h) = 1 - label_smoothing."""


class RobustDPO(PreferenceParameters):
    name: Literal["robust"] = "robust"

    label_smoothing: Flip = 0.1
    """Share of labels that are flipped."""


class IPO(PreferenceParameters):
    name: Literal["ipo"] = "ipo"

    reduction: Literal["sum", "mean"]
    """Over a candidate's units: `sum` (the paper, and the DPO authors' code) or `mean` (TRL). For language models they need
    very different tau, so there is no default; for denoising models they are the same."""

    tau: float = Field(default=0.1, gt=0.0)
    """Regularisation: the reward margin is pulled to 1 / (2 tau)."""


class HingeDPO(PreferenceParameters):
    name: Literal["hinge"] = "hinge"

    margin: float = Field(default=1.0, gt=0.0)
    """A pair stops teaching when its reward margin reaches this."""


class FDPO(PreferenceParameters):
    name: Literal["f_dpo"] = "f_dpo"

    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "jensen_shannon"
    """The divergence from the reference. jensen_shannon is benign at any log-ratio; forward_kl and alpha are exponential in it
    and need a beta smaller by orders of magnitude (the authors use 1e-5 for forward_kl)."""

    alpha: float = Field(default=0.5, gt=0.0, lt=1.0)
    """For `alpha` only, in the paper's sense: towards 0 the reverse KL, towards 1 the forward KL (TRL's coefficient is 1 -
    alpha)."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class EXO(PreferenceParameters):
    name: Literal["exo"] = "exo"

    label_smoothing: float = Field(default=1e-3, gt=0.0, lt=0.5)
    """Share of labels taken to be wrong; at 0 the divergence would be infinite."""


class DiscoPOPParameters(PreferenceParameters):
    name: Literal["discopop"] = "discopop"

    tau: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Width, in reward margins, of the change from the exponential to the logistic loss."""


class OnlineIPO(PreferenceParameters):
    name: Literal["online_ipo"] = "online_ipo"

    tau: float = Field(default=1.0, gt=0.0)
    """Regularisation of the preference game; 1 is the publication's choice."""


class LengthNormalised(PreferenceParameters):
    name: Literal["sigmoid_norm"] = "sigmoid_norm"

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class AOTParameters(AnchoredParameters):
    name: Literal["aot"] = "aot"

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class UnpairedAOT(AOTParameters):
    name: Literal["aot_unpaired"] = "aot_unpaired"


class TRDPO(PreferenceParameters):
    name: Literal["tr_dpo"] = "tr_dpo"

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class RPO(PreferenceParameters):
    name: Literal["rpo"] = "rpo"

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's negative log-likelihood (mean over its tokens); 1 is the publication's."""


class MPO(PreferenceParameters):
    name: Literal["mpo"] = "mpo"

    preference: float = Field(default=0.8, ge=0.0)
    """Weight of DPO's loss."""

    quality: float = Field(default=0.2, ge=0.0)
    """Weight of BCO's loss, which says how good each candidate is by itself."""

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's negative log-likelihood."""

    sft_over: Literal["candidate", "batch"] = "candidate"
    """The mean of the winner's negative log-likelihood: over its own tokens, or over all winners' tokens of the batch, as in
    TRL, which couples the pairs."""


class MODPO(PreferenceParameters):
    name: Literal["modpo"] = "modpo"

    loss: Literal["logistic", "hinge"] = "logistic"
    """On the difference of scores: -log sigma(d), or max(0, 1 - d)."""

    weight: float = Field(default=0.5, gt=0.0)
    """Weight w of the objective whose preferences are trained; the others' weighted rewards are the pairs' margins. The
    effective beta is beta / w."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong, for `logistic`."""


class SFT(Parameters):
    name: Literal["sft"] = "sft"


def _f_link(parameters: FDPO) -> Link:
    if parameters.divergence == "reverse_kl":
        return Identity()
    if parameters.divergence == "jensen_shannon":
        return JensenShannon()
    return AlphaDivergence(1.0 if parameters.divergence == "forward_kl" else parameters.alpha)


def _mpo(parameters: MPO) -> Objective:
    by_batch = parameters.sft_over == "batch"
    return preference(
        parameters.model_copy(update={"sft": 0.0}) if by_batch else parameters,
        "mpo",
        Logistic(),
        coefficient=parameters.preference,
        further=(Term(BinaryClassifier(), coefficient=parameters.quality),),
        regularisers=(BatchTokenSFT(parameters.sft),) if by_batch else (),
    )


ROWS = (
    Row(
        name="dpo",
        summary="Direct preference optimisation: a logistic regression on the difference of log-ratios.",
        formula="-log sigma(beta h)",
        source="arXiv 2305.18290, Eq. 7; for denoising models 2311.12908, Eq. 14. Code: eric-mitchell/"
        "direct-preference-optimization@f8b8c0f, SalesforceAIResearch/DiffusionDPO@5233e75 train.py.",
        differences="A tie counts half in the accuracy (official: as wrong). All reductions in float32 (Salesforce: those of "
        "the reference in fp16). The diffusion paper's equation draws noise for each candidate; its code, and we, share it.",
        parameters=DPO,
        build=lambda p: preference(p, "dpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="cdpo",
        summary="DPO whose labels are taken to be wrong with a fixed probability e: the margin has a finite optimum.",
        formula="-(1-e) log sigma(beta h) - e log sigma(-beta h)",
        source="E. Mitchell, 'A note on DPO with noisy preferences'; eric-mitchell/direct-preference-optimization@f8b8c0f.",
        differences="None. Equals listwise cross-entropy with target (1-e, e).",
        parameters=CDPO,
        build=lambda p: preference(p, "cdpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="robust",
        summary="DPO corrected to be unbiased when labels are flipped with a known probability e.",
        formula="[-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1-2e)",
        source="arXiv 2403.00409; TRL 1.16 loss_type robust.",
        differences="None. The loss is unbounded below, so a falling loss is no sign of health here.",
        parameters=RobustDPO,
        build=lambda p: preference(p, "robust", Robust(p.label_smoothing)),
    ),
    Row(
        name="ipo",
        summary="A regression of the margin on a fixed target, so that certain pairs cannot drive it to infinity.",
        formula="(beta h - 1/(2 tau))^2, with h of sums or of means",
        source="arXiv 2310.12036, Eq. 17; eric-mitchell/direct-preference-optimization@f8b8c0f (sum); TRL 1.16 (mean).",
        differences="The paper has no beta: take {value: 1, convention: nats} for it. beta declares the scale on which tau is "
        "read, without which 1/(2 tau) means nothing for a denoising model. diffusers' SD1.5 script is {value: 1, convention: "
        "mean}; its ipo branch reads an undefined argument. A soft target p pulls to (p - 1/2)/tau, as in online IPO "
        "(arXiv 2403.08635).",
        parameters=IPO,
        build=lambda p: preference(p, "ipo", Square(1 / (2 * p.tau)), weights=Sum() if p.reduction == "sum" else Mean()),
    ),
    Row(
        name="hinge",
        summary="The hinge of SLiC on DPO's margin: pairs past the margin teach nothing more.",
        formula="max(0, 1 - beta h)",
        source="arXiv 2305.10425 and 2309.06657; TRL 1.16 loss_type hinge; diffusers train_diffusion_dpo.py@968e857.",
        differences="With a reference, as in TRL; SLiC-HF itself has none.",
        parameters=HingeDPO,
        build=lambda p: preference(p, "hinge", Hinge(p.margin)),
    ),
    Row(
        name="f_dpo",
        summary="DPO under another divergence from the reference than the reverse KL.",
        formula="-log sigma(beta (s_w - s_l)); s = r | 1 - exp(-r) | log 2 + log sigma(r) | (1 - exp(-alpha r))/alpha",
        source="arXiv 2309.16240; alecwangcq/f-divergence-dpo@07d9369 trainers.py.",
        differences="Finite where the official code gives inf or nan: the difference is taken jointly, and e^x goes on as a "
        "straight line where it would overflow. Scores are 0 at r = 0; the official ones of forward_kl and alpha lack the "
        "constant 1/alpha. On sampled timesteps the link acts on each estimate, which makes the loss a heuristic, no bound.",
        parameters=FDPO,
        build=lambda p: preference(p, "f_dpo", Logistic(p.label_smoothing), link=_f_link(p)),
    ),
    Row(
        name="modpo",
        summary="DPO for one of several objectives; the rewards of the others enter as fixed margins.",
        formula="-log sigma(u_w - u_l) or max(0, 1 - (u_w - u_l)), u = (beta r - m)/w, m the weighted rewards of the others",
        source="arXiv 2310.03708; ZHZisZZ/modpo@2e2df20 src/trainer/modpo_trainer.py.",
        differences="Margins come with the pairs, one number a candidate, already weighted; the official code calls reward "
        "models while training.",
        parameters=MODPO,
        data=("pairs with margins",),
        build=lambda p: preference(
            p, "modpo", logistic_or_hinge(p.loss, p.label_smoothing), offset=RewardMargins(), scale=1 / p.weight
        ),
    ),
    Row(
        name="online_ipo",
        summary="IPO on fresh samples with a judge's preference probability p as a soft target; at its optimum the equilibrium "
        "of the regularised preference game.",
        formula="(beta h - (p - 1/2)/tau)^2, with h of sums",
        source="arXiv 2403.08635, Eq. 7 (with the mixture of policy and reference as sampler: IPO-MD).",
        differences="Lower by p (1 - p)/tau^2, which has no gradient. The paper has no beta: take {value: 1, convention: "
        "nats}. Sampling from the policy, or from the mixture, is the loop's part; on stored pairs this is ipo with sums.",
        parameters=OnlineIPO,
        build=lambda p: preference(p, "online_ipo", Square(1 / (2 * p.tau))),
    ),
    Row(
        name="exo",
        summary="The reverse KL from a pair's labels instead of the cross-entropy: mode-seeking, and bounded.",
        formula="KL((sigma(beta h), sigma(-beta h)) || (1-e, e))",
        source="arXiv 2402.00856; TRL 1.16 loss_type exo_pair.",
        differences="None. Over several timesteps of a denoising model it is a heuristic, no bound.",
        parameters=EXO,
        build=lambda p: preference(p, "exo", ReverseKL(p.label_smoothing)),
    ),
    Row(
        name="discopop",
        summary="A loss found by a language model: logistic for pairs that are wrong, exponential for those that are right.",
        formula="-(1-m) log sigma(beta h) + m exp(-beta h), m = sigma(beta h/tau)",
        source="arXiv 2406.08414 (LRML); TRL 1.16 loss_type discopop.",
        differences="m exp(-beta h) is taken as one exponential, finite where the original multiplies 0 by infinity.",
        parameters=DiscoPOPParameters,
        build=lambda p: preference(p, "discopop", DiscoPOP(p.tau)),
    ),
    Row(
        name="sigmoid_norm",
        summary="DPO on the mean log-ratio of a token, so that long answers weigh no more than short ones.",
        formula="-log sigma(beta (r_w/n_w - r_l/n_l))",
        source="arXiv 2411.15124 (Tulu 3); TRL 1.16 loss_type sigmoid_norm.",
        differences="None. For denoising models it is dpo, whose values are means already.",
        parameters=LengthNormalised,
        build=lambda p: preference(p, "sigmoid_norm", Logistic(p.label_smoothing), weights=Mean()),
    ),
    Row(
        name="aot",
        summary="Optimal transport: the sorted margins of the policy are to exceed the sorted margins of the reference.",
        formula="-log sigma(beta (sort(l_w - l_l) - sort(l_ref,w - l_ref,l))) over the batch",
        source="arXiv 2406.05882; TRL 1.16 loss_type aot.",
        differences="None. It depends on the batch, so train.micro_batch_size must be train.batch_size, in one process.",
        parameters=AOTParameters,
        build=lambda p: preference(p, "aot", AOT(label_smoothing=p.label_smoothing)),
    ),
    Row(
        name="aot_unpaired",
        summary="Optimal transport without pairing: the sorted log-ratios of winners are to exceed those of losers.",
        formula="-log sigma(beta (sort(r_w) - sort(r_l))) over the batch",
        source="arXiv 2406.05882; TRL 1.16 loss_type aot_unpaired.",
        differences="None. It depends on the batch, so train.micro_batch_size must be train.batch_size, in one process.",
        parameters=UnpairedAOT,
        build=lambda p: preference(p, "aot_unpaired", AOT(paired=False, label_smoothing=p.label_smoothing)),
    ),
    Row(
        name="tr_dpo",
        summary="DPO whose reference follows the policy, which lets it go further than a fixed one does.",
        formula="-log sigma(beta h), the reference a running mean of the policy",
        source="arXiv 2404.09656.",
        differences="The reference is train.reference.seat: ema. By default it moves a little at every step; the paper's soft "
        "update is ema_decay: 0.4 with ema_every: 512, its hard one ema_decay: 0.",
        parameters=TRDPO,
        moving_reference=True,
        build=lambda p: preference(p, "tr_dpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="rpo",
        summary="DPO with the winner's negative log-likelihood added, so that the winner itself becomes likelier.",
        formula="-log sigma(beta h) + sft e_w/n_w",
        source="arXiv 2404.19733 (iterative reasoning preference optimisation), Eq. 1; TRL's former rpo_alpha.",
        differences="The mean is over the winner's own tokens. The same as dpo with objective.sft.",
        parameters=RPO,
        build=lambda p: preference(p, "rpo", Logistic()),
    ),
    Row(
        name="mpo",
        summary="Preference, quality and generation together: DPO, BCO and SFT in one weighted sum.",
        formula="0.8 (-log sigma(beta h)) + 0.2 (-log sigma(beta r_w) - log sigma(-beta r_l)) + 1.0 e_w/n_w",
        source="arXiv 2411.10442; TRL 1.16 loss_type [sigmoid, bco_pair, sft] with loss_weights [0.8, 0.2, 1.0].",
        differences="BCO without a reward shift, as in TRL 1.16. sft_over: batch is TRL's mean over all tokens of a batch.",
        parameters=MPO,
        build=_mpo,
    ),
    Row(
        name="sft",
        summary="Plain fine-tuning on the winners, the baseline that a preference method has to beat.",
        formula="e_w",
        source="SalesforceAIResearch/DiffusionDPO@5233e75 train.py, --sft.",
        differences="Beta does not enter the loss. The implicit reward is reported as for DPO, against zeros where no "
        "reference is scored.",
        parameters=SFT,
        data=("pairs", "labels"),
        build=lambda p: Objective("sft", regularisers=(AddedSFT(1.0),)),
    ),
)
