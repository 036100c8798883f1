"""Rows of the table: objectives for denoising models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyalign.core.objectives.links import ErrorOdds
from polyalign.core.objectives.losses import Logistic, ReverseKL
from polyalign.core.objectives.losses_coupled import DSPO, NFT, DSPOForm
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.rows import (
    DENOISING,
    PROBABILITY_FREE,
    Flip,
    Parameters,
    PreferenceParameters,
    Row,
    beta_of,
    preference,
)
from polyalign.core.objectives.view import VALUE
from polyalign.core.recipe import BetaConfig


class SDPO(PreferenceParameters):
    name: Literal["sdpo"] = "sdpo"

    winner_safeguard: float | None = Field(default=0.9, ge=0.0, le=1.0)
    """mu: the share of the winner's own descent that must remain. The publication uses 0.2 to 0.9; 1 switches a conflicting
    loser off."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class MaPO(PreferenceParameters):
    name: Literal["mapo"] = "mapo"

    beta: BetaConfig = beta_of(1000.0, "mean")
    """The factor on the difference of odds inside the sigmoid: the publication's T, 1000, on mean errors."""

    snr: float = Field(default=0.5, gt=0.0)
    """Scale of the error in the odds x/(e^x - 1), x = snr e."""

    weight: float = Field(default=0.1, ge=0.0)
    """Weight of the comparison beside the winner's error (the code's beta_mapo)."""

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's error."""


class DSPOParameters(PreferenceParameters):
    name: Literal["dspo"] = "dspo"

    beta: BetaConfig = beta_of(0.001, "mean_half")
    """How strongly a log-ratio counts inside the sigmoid. The authors use 0.001 for SD1.5, so that it hardly moves from 1/2."""

    correction: float = Field(default=0.001, ge=0.0)
    """The factor on the distance from the reference outside the sigmoid. The code takes the same number for both."""

    form: DSPOForm = "score_matching"
    """`score_matching`: the publication. `sdxl_code`: what the code does for SDXL, another loss, which couples the batch."""


class DMPO(PreferenceParameters):
    name: Literal["dmpo"] = "dmpo"

    beta: BetaConfig = beta_of(2000.0, "mean_half")
    """How strongly a log-ratio counts; the authors use 2000 (SD1.5) and 6000 (SDXL)."""

    alpha: float = Field(default=0.01, gt=0.0, lt=0.5)
    """Share of labels taken to be wrong."""


class CRPO(PreferenceParameters):
    name: Literal["crpo"] = "crpo"

    beta: BetaConfig = beta_of(2000.0, "mean_half")
    """How strongly a log-ratio counts; 2000 is the authors'."""

    sft: float = Field(default=1.0, ge=0.0)
    """Weight of the winner's error; fixed at 1 in the code, where it is 500 times weaker than the comparison at margin 0."""

    label_smoothing: Flip = 0.0
    """Share of labels taken to be wrong."""


class DiffusionNFT(Parameters):
    name: Literal["diffusion_nft"] = "diffusion_nft"

    mixing: float = Field(default=1.0, gt=0.0, le=1.0)
    """The publication's beta: the policy's share of the mixtures with the reference. A small one takes larger steps (1/mixing
    is its guidance strength); the authors use 1 and 0.1."""

    scale: float = Field(default=5.0, gt=0.0)
    """The factor on the regressions: the code's adv_clip_max."""

    proximity: float = Field(default=0.0, ge=0.0)
    """Weight of the squared distance of the policy's output from the reference's; the authors take 0.0001, to the base."""


ROWS = (
    Row(
        name="sdpo",
        summary="DPO with a winner safeguard: the loser's gradient may not undo the winner's.",
        formula="-log sigma(beta h), loser's gradient times clip((1-mu)|g_w|^2/<g_w,g_l>, 0, 1) where <g_w,g_l> > 0",
        source="arXiv 2511.03317; AIDC-AI/Diffusion-SDPO@84fb241 train.py.",
        differences="No constant 1e-9 in the denominator. safeguard_scope batch: one scale for the whole batch, which then "
        "cannot be cut (official: one for each micro-batch of each process); group: one for each pair.",
        parameters=SDPO,
        needs=VALUE | {"output_gradient"},
        likelihoods=DENOISING,
        build=lambda p: preference(p, "sdpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="mapo",
        summary="Winner's error and a comparison of odds, without a reference: one forward pass instead of two.",
        formula="sft e_w - weight log sigma(beta (phi(e_w) - phi(e_l))), phi(e) = x/(e^x - 1), x = snr e",
        source="arXiv 2406.06424; mapo-t2i/mapo@374b3d3 utils.py:compute_loss.",
        differences="None in value; finite at e = 0, where the code divides 0 by 0. Our beta is its T, our weight its "
        "beta_mapo. train.reference.seat: none saves the reference's forward pass, which is for the report only.",
        parameters=MaPO,
        likelihoods=PROBABILITY_FREE,
        build=lambda p: preference(p, "mapo", Logistic(), reference=None, link=ErrorOdds(p.snr), coefficient=p.weight),
    ),
    Row(
        name="dspo",
        summary="Score matching on the winner, away from the reference where the pair is not told apart yet.",
        formula="mean ((o_w - target) - correction (1 - sigma(beta h)) (o_w - o_ref,w))^2, o the network's output",
        source="DSPO, ICLR 2025; AIDC-AI/Diffusion-SDPO@84fb241 train.py, train_method dspo.",
        differences="Inside and outside factor may differ. All timesteps count alike in the outer mean, whatever "
        "likelihood.weighting says. form: sdxl_code is the code's other loss for SDXL.",
        parameters=DSPOParameters,
        needs=VALUE | {"output_gradient"},
        likelihoods=DENOISING,
        build=lambda p: preference(p, "dspo", DSPO(p.correction, p.form)),
    ),
    Row(
        name="dmpo",
        summary="Divergence minimisation: the reverse KL from a pair's labels, mode-seeking and bounded.",
        formula="KL((sigma(beta h), sigma(-beta h)) || (1-alpha, alpha))",
        source="arXiv 2507.07510; AIDC-AI/Diffusion-SDPO@84fb241 train.py, train_method dmpo.",
        differences="None. It is exo with label_smoothing alpha.",
        parameters=DMPO,
        build=lambda p: preference(p, "dmpo", ReverseKL(p.alpha)),
    ),
    Row(
        name="crpo",
        summary="DPO with the winner's error added, as for flow models of audio; the pairs are mined by CLAP between rounds.",
        formula="-log sigma(beta h) + sft e_w",
        source="arXiv 2412.21037; declare-lab/TangoFlux@164420f tangoflux/model.py.",
        differences="None. The same as dpo with objective.sft 1. Sampling and ranking between rounds are the loop's part.",
        parameters=CRPO,
        build=lambda p: preference(p, "crpo", Logistic(p.label_smoothing)),
    ),
    Row(
        name="diffusion_nft",
        summary="Negative-aware fine-tuning: regress on what is desirable and away from what is not, without a likelihood.",
        formula="scale/m (r |x(o_ref + m d) - x0|^2/w+ + (1-r) |x(o_ref - m d) - x0|^2/w-) + proximity |d|^2, d = o - o_ref",
        source="arXiv 2509.16117; NVlabs/DiffusionNFT@24af555 scripts/train_nft_sd3.py.",
        differences="The paper has no w (detached mean absolute errors) and no scale; both are the code's. r is the label, or "
        "the preference's probability (online.targets: soft); in the code 1/2 + adv/(2 adv_clip_max), adv the advantage within "
        "a prompt. The old policy, a moving mean of the policy, is our reference seat (train.reference.seat: ema, or "
        "online.reference: refreshed); proximity holds on to it too, the code to the base. Beta only scales what is reported.",
        parameters=DiffusionNFT,
        needs=VALUE | {"output_gradient"},
        likelihoods=DENOISING,
        data=("pairs", "labels"),
        build=lambda p: Objective("diffusion_nft", terms=(Term(NFT(p.mixing, p.scale, p.proximity)),)),
    ),
)
