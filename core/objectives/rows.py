"""What a row of the table of objectives is, and the parameters that rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section
from polyalign.core.errors import UserError
from polyalign.core.objectives.losses import Hinge, Logistic, PreferenceLoss
from polyalign.core.objectives.objective import ANY_LIKELIHOOD, Data, Objective, Term
from polyalign.core.objectives.regularisers import AddedSFT, Regulariser, WinnerAnchor
from polyalign.core.objectives.safeguard import SafeguardScope, WinnerSafeguard
from polyalign.core.objectives.view import VALUE
from polyalign.core.recipe import BetaConfig, BetaConvention
from polyalign.core.scores import Kind

Flip = Annotated[float, Field(ge=0.0, lt=0.5)]
"""A share of labels that are wrong."""

TOKENS: frozenset[Kind] = frozenset({"token"})
DENOISING: frozenset[Kind] = frozenset({"timestep"})
PROBABILITY_FREE: frozenset[Kind] = frozenset({"timestep", "position"})


class Parameters(Section):
    """What every objective has. Subclasses add ``name``, a literal, by which a recipe chooses."""

    beta: BetaConfig = Field(default_factory=BetaConfig)
    """How strongly a log-ratio counts, with its convention."""

    @model_validator(mode="before")
    @classmethod
    def _part_of_beta(cls, given: Any) -> Any:
        """A recipe that states only the value keeps the row's own convention, and the other way round."""
        beta = given.get("beta") if isinstance(given, Mapping) else None
        if not isinstance(beta, Mapping):
            return given
        own = cls.model_fields["beta"].get_default(call_default_factory=True)
        return {**given, "beta": {"value": own.value, "convention": own.convention, **beta}}


class AnchoredParameters(Parameters):
    """What every objective has that tells a winner from a loser."""

    anchor: float = Field(default=0.0, ge=0.0)
    """Winner anchor: adds anchor * beta * e_w on the scale of the reward (0.3 means 0.3 * beta/2 * e_w in mean_half), which
    keeps the winner's error from rising with the loser's. 0.1 to 1 are sensible."""

    sft: float = Field(default=0.0, ge=0.0)
    """Added SFT: adds sft * e_w without beta (mean over tokens for language models)."""


class PreferenceParameters(AnchoredParameters):
    """What every objective has that a denoising model can be trained with."""

    winner_safeguard: float | None = Field(default=None, ge=0.0, le=1.0)
    """Diffusion-SDPO's mu: the rejected candidate's gradient is scaled down so far that this share of the winner's descent
    remains. Denoising models only; the publication uses 0.2 to 0.9. Null: off."""

    safeguard_scope: SafeguardScope = "batch"
    """`batch`: one scale for all pairs of a forward pass, as in the official code; needs train.micro_batch_size equal to
    train.batch_size, and one process. `group`: one for each pair, which does not depend on how a batch is cut."""


def logistic_or_hinge(loss: Literal["logistic", "hinge"], label_smoothing: float) -> PreferenceLoss:
    """The loss on a difference that a row lets choose.

    Raises:
        UserError: smoothed labels for the hinge, which has none.
    """
    if loss == "logistic":
        return Logistic(label_smoothing)
    if label_smoothing:
        raise UserError(
            f"objective.label_smoothing is for objective.loss: logistic, and {label_smoothing:g} was given with hinge. Leave "
            "one of the two out"
        )
    return Hinge()


def beta_of(value: float, convention: BetaConvention = "nats") -> Any:
    """A field for beta with another default than Diffusion-DPO's."""
    return Field(default_factory=lambda: BetaConfig(value=value, convention=convention))


@dataclass(frozen=True)
class Row:
    """One objective. ``build`` makes it from an instance of ``parameters``; ``needs`` are capabilities of scores that it always
    asks for (options may add some: see ``Objective.needs``). ``likelihoods`` and ``data`` are passed on to the objective.
    ``moving_reference``: it is this method only with a reference that follows the policy."""

    name: str
    summary: str
    formula: str
    source: str
    differences: str
    parameters: type[Parameters]
    build: Callable[[Any], Objective]
    needs: frozenset[str] = VALUE
    likelihoods: frozenset[Kind] = ANY_LIKELIHOOD
    data: tuple[Data, ...] = ("pairs",)
    moving_reference: bool = False


def preference(
    parameters: AnchoredParameters,
    name: str,
    loss: PreferenceLoss,
    *,
    regularisers: tuple[Regulariser, ...] = (),
    further: tuple[Term, ...] = (),
    **slots: Any,
) -> Objective:
    """An objective of one term with the options that every row takes; ``slots`` are further fields of :class:`Term`,
    ``further`` other terms and ``regularisers`` what the row itself adds."""
    safeguard = None
    if isinstance(parameters, PreferenceParameters) and parameters.winner_safeguard is not None:
        safeguard = WinnerSafeguard(parameters.winner_safeguard, parameters.safeguard_scope)
    anchor = (WinnerAnchor(parameters.anchor),) if parameters.anchor else ()
    sft = (AddedSFT(parameters.sft),) if parameters.sft else ()
    terms = (Term(loss, safeguard=safeguard, **slots), *further)
    return Objective(name, terms=terms, regularisers=(*anchor, *sft, *regularisers))
