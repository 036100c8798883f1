"""Rows of the table: objectives that look at single tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.losses import Logistic
from polyalign.core.objectives.objective import PolicyConfidence
from polyalign.core.objectives.offsets import PositionKL
from polyalign.core.objectives.rows import TOKENS, AnchoredParameters, Flip, Row, beta_of, preference
from polyalign.core.objectives.view import VALUE
from polyalign.core.objectives.weights_tokens import LengthDesensitised, TokenGuidance
from polyalign.core.recipe import BetaConfig


class TokenParameters(AnchoredParameters):
    """What the rows for tokens have."""

    beta: BetaConfig = beta_of(0.1)
    """How strongly a log-ratio counts, in nats."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class LDDPO(TokenParameters):
    name: Literal["ld_dpo"] = "ld_dpo"

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """What tokens past the partner's length count: 1 is DPO, 0 drops them. The publication tunes it for each model; weaker ones
    want less."""


class TDPO1(TokenParameters):
    name: Literal["tdpo1"] = "tdpo1"


class TDPO2(TokenParameters):
    name: Literal["tdpo2"] = "tdpo2"

    alpha: float = Field(default=0.5, ge=0.0)
    """How strongly the KL to the reference on the loser is held down; 0.5 is the authors' code's."""


class TGDPO(TokenParameters):
    name: Literal["tgdpo"] = "tgdpo"

    alpha: float = Field(default=0.5, ge=0.0)
    """How strongly the guide's token rewards change beta; 0 is DPO."""

    clamp: bool = False
    """Keep token weights at 0 or above. The authors' code does not, and a weight below 0 turns its token's gradient round."""


class WPO(TokenParameters):
    name: Literal["wpo"] = "wpo"


ROWS = (
    Row(
        name="ld_dpo",
        summary="DPO in which the tokens that only the longer answer has count less: shorter answers, same quality.",
        formula="-log sigma(beta h), tokens past the partner's length weighted by alpha in policy and reference",
        source="arXiv 2409.06411; TRL 1.16 ld_alpha (there is no public code of the authors).",
        differences="None. A reference cached token by token serves every alpha.",
        parameters=LDDPO,
        needs=VALUE | {"per_unit"},
        likelihoods=TOKENS,
        build=lambda p: preference(p, "ld_dpo", Logistic(p.label_smoothing), weights=LengthDesensitised(p.alpha)),
    ),
    Row(
        name="tdpo1",
        summary="DPO with the difference of the sequential KL to the reference in the margin.",
        formula="-log sigma(beta (h - (K_l - K_w))), K = sum_t KL(reference || policy) over whole distributions",
        source="arXiv 2404.11999, Eq. 17; Vance0124/Token-level-Direct-Preference-Optimization@2a736ec trainers.py.",
        differences="Finite where the reference underflows (official: log of a softmax, nan). Reported rewards are what is "
        "trained. The authors' README calls for TDPO2 but its configuration trains this one.",
        parameters=TDPO1,
        needs=VALUE | {"dense_kl"},
        likelihoods=TOKENS,
        build=lambda p: preference(p, "tdpo1", Logistic(p.label_smoothing), offset=PositionKL(1.0, frozen_winner=False)),
    ),
    Row(
        name="tdpo2",
        summary="TDPO in which only the loser's KL is trained, with a weight.",
        formula="-log sigma(beta (h - alpha (K_l - sg K_w)))",
        source="arXiv 2404.11999, Eq. 19; Vance0124/Token-level-Direct-Preference-Optimization@2a736ec trainers.py.",
        differences="Finite where the reference underflows (official: log of a softmax, nan). Reported rewards are what is "
        "trained (official: beta (r + K) whatever alpha).",
        parameters=TDPO2,
        needs=VALUE | {"dense_kl"},
        likelihoods=TOKENS,
        build=lambda p: preference(p, "tdpo2", Logistic(p.label_smoothing), offset=PositionKL(p.alpha, frozen_winner=True)),
    ),
    Row(
        name="tgdpo",
        summary="DPO whose beta is set token by token by a model that was trained by DPO before.",
        formula="-log sigma(beta (sum_t (1 + alpha g_t) rho_w,t - sum_t (1 - alpha g_t) rho_l,t)), "
        "g_t = beta (l_guide,t - l_ref,t)",
        source="arXiv 2506.14574; dvlab-research/TGDPO@dd88982 src/llamafactory/train/tgdpo/trainer.py.",
        differences="None by default; clamp keeps weights from turning negative.",
        parameters=TGDPO,
        needs=VALUE | {"per_unit"},
        likelihoods=TOKENS,
        build=lambda p: preference(p, "tgdpo", Logistic(p.label_smoothing), weights=TokenGuidance(p.alpha, p.clamp)),
    ),
    Row(
        name="wpo",
        summary="DPO in which pairs count by how likely the policy would give these answers itself.",
        formula="-v log sigma(beta h), v = exp(sum over both of mean_t (log p_t - log sum p_t^2)), detached",
        source="arXiv 2406.11827; TRL 1.16 use_weighting.",
        differences="None.",
        parameters=WPO,
        needs=VALUE | {"confidence"},
        likelihoods=TOKENS,
        build=lambda p: preference(p, "wpo", Logistic(p.label_smoothing), sample_weight=PolicyConfidence()),
    ),
)
