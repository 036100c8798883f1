"""The table of objectives: one row each, made of slots.

Everything a user reads about an objective (`polyalign explain`), everything a recipe may say about it, and how it is built
stands in its row. A new objective is one more row: a class of parameters and a :class:`Row` in ``TABLE``.

Notation: r log-ratio of a candidate, h = r_w - r_l, s = phi(r), e_w the winner's error (its negative log-likelihood), sigma
logistic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import Field

from polyalign.core.config import Section
from polyalign.core.errors import UserError
from polyalign.core.objectives.links import AlphaDivergence, Identity, JensenShannon, Link
from polyalign.core.objectives.losses import Hinge, Logistic, PreferenceLoss, Robust, Square
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.offsets import RewardMargins
from polyalign.core.objectives.regularisers import AddedSFT, WinnerAnchor
from polyalign.core.objectives.safeguard import SafeguardScope, WinnerSafeguard
from polyalign.core.objectives.view import VALUE
from polyalign.core.objectives.weights import Mean, Sum
from polyalign.core.recipe import BetaConfig

Flip = Annotated[float, Field(ge=0.0, lt=0.5)]


class Parameters(Section):
    """What every objective has. Subclasses add ``name``, a literal, by which a recipe chooses."""

    beta: BetaConfig = Field(default_factory=BetaConfig)
    """How strongly a log-ratio counts, with its convention."""


class PreferenceParameters(Parameters):
    """What every objective with a preference term has."""

    anchor: float = Field(default=0.0, ge=0.0)
    """Winner anchor: adds anchor * beta * e_w on the scale of the reward (0.3 means 0.3 * beta/2 * e_w in mean_half), which
    keeps the winner's error from rising with the loser's. 0.1 to 1 are sensible."""

    sft: float = Field(default=0.0, ge=0.0)
    """Added SFT: adds sft * e_w without beta (mean over tokens for language models)."""

    winner_safeguard: float | None = Field(default=None, ge=0.0, le=1.0)
    """Diffusion-SDPO's mu: the rejected candidate's gradient is scaled down so far that this share of the winner's descent
    remains. Denoising models only; the publication uses 0.2 to 0.9. Null: off."""

    safeguard_scope: SafeguardScope = "batch"
    """`batch`: one scale for all pairs of a forward pass, as in the official code; needs train.micro_batch_size equal to
    train.batch_size, and one process. `group`: one for each pair, which does not depend on how a batch is cut."""


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


class MODPO(PreferenceParameters):
    name: Literal["modpo"] = "modpo"

    weight: float = Field(default=0.5, gt=0.0)
    """Weight w of the objective whose preferences are trained; the others' weighted rewards are the pairs' margins. The
    effective beta is beta / w."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class SDPO(PreferenceParameters):
    name: Literal["sdpo"] = "sdpo"

    winner_safeguard: float | None = Field(default=0.9, ge=0.0, le=1.0)
    """mu: the share of the winner's own descent that must remain. The publication uses 0.2 to 0.9; 1 switches a conflicting
    loser off."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class SFT(Parameters):
    name: Literal["sft"] = "sft"


@dataclass(frozen=True)
class Row:
    """One objective. ``build`` makes it from an instance of ``parameters``; ``needs`` are capabilities of scores that it always
    asks for (options may add some: see ``Objective.needs``)."""

    name: str
    summary: str
    formula: str
    source: str
    differences: str
    parameters: type[Parameters]
    build: Callable[[Any], Objective]
    needs: frozenset[str] = VALUE


def preference(parameters: PreferenceParameters, name: str, loss: PreferenceLoss, **slots: Any) -> Objective:
    """An objective of one term with the options that every row takes; ``slots`` are further fields of :class:`Term`."""
    mu = parameters.winner_safeguard
    safeguard = None if mu is None else WinnerSafeguard(mu, parameters.safeguard_scope)
    anchor = (WinnerAnchor(parameters.anchor),) if parameters.anchor else ()
    sft = (AddedSFT(parameters.sft),) if parameters.sft else ()
    return Objective(name, terms=(Term(loss, safeguard=safeguard, **slots),), regularisers=anchor + sft)


def _f_link(parameters: FDPO) -> Link:
    if parameters.divergence == "reverse_kl":
        return Identity()
    if parameters.divergence == "jensen_shannon":
        return JensenShannon()
    return AlphaDivergence(1.0 if parameters.divergence == "forward_kl" else parameters.alpha)


_ROWS = (
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
        formula="-log sigma(u_w - u_l), u = (beta r - m)/w, with m the weighted rewards of the other objectives",
        source="arXiv 2310.03708; ZHZisZZ/modpo@2e2df20 src/trainer/modpo_trainer.py.",
        differences="Margins come with the pairs, one number a candidate, already weighted; the official code calls reward "
        "models while training.",
        parameters=MODPO,
        build=lambda p: preference(p, "modpo", Logistic(p.label_smoothing), offset=RewardMargins(), scale=1 / p.weight),
    ),
    Row(
        name="sdpo",
        summary="DPO with a winner safeguard: the loser's gradient may not undo the winner's.",
        formula="-log sigma(beta h), loser's gradient times clip((1-mu)|g_w|^2/<g_w,g_l>, 0, 1) where <g_w,g_l> > 0",
        source="arXiv 2511.03317; AIDC-AI/Diffusion-SDPO@84fb241 train.py.",
        differences="No constant 1e-9 in the denominator. safeguard_scope batch: one scale for the whole batch, which then "
        "cannot be cut (official: one for each micro-batch of each process); group: one for each pair.",
        parameters=SDPO,
        needs=VALUE | {"output_gradient"},
        build=lambda p: preference(p, "sdpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="sft",
        summary="Plain fine-tuning on the winners, the baseline that a preference method has to beat.",
        formula="e_w",
        source="SalesforceAIResearch/DiffusionDPO@5233e75 train.py, --sft.",
        differences="Beta does not enter the loss. The implicit reward is reported as for DPO, against zeros where no "
        "reference is scored.",
        parameters=SFT,
        build=lambda p: Objective("sft", regularisers=(AddedSFT(1.0),)),
    ),
)

TABLE: dict[str, Row] = {row.name: row for row in _ROWS}


def spec_type(table: Mapping[str, Row]) -> Any:
    """The type of the recipe key ``objective``: the parameters of one row of ``table``, chosen by ``name``."""
    return Annotated[Union[tuple(row.parameters for row in table.values())], Field(discriminator="name")]  # noqa: UP007


if TYPE_CHECKING:
    ObjectiveSpec: TypeAlias = Parameters
else:
    ObjectiveSpec = spec_type(TABLE)


def build(spec: ObjectiveSpec, table: Mapping[str, Row] = TABLE) -> Objective:
    """The objective that ``spec`` describes.

    Raises:
        UserError: a name that the table does not have, or slots that do not fit together.
    """
    name = str(getattr(spec, "name", None))
    if name not in table:
        raise UserError(f"objective {name!r} is not in the table; allowed: {', '.join(sorted(table))}")
    return table[name].build(spec)
