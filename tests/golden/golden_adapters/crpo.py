"""crpo.json: TangoFlux's loss and its noising, which compute in float32 from float64 inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import STEPS, pair_batch, run
from torch import Tensor

from polyalign.core.likelihood.denoising import NoiseSchedule, squared_error_scores
from polyalign.core.objectives import Outcome, build
from polyalign.core.objectives.table import SFT
from polyalign.core.objectives.table_denoising import CRPO
from polyalign.core.recipe import BetaConfig

SINGLE = {"rtol": 2e-6, "atol": 1e-7}
"""float32 errors."""


def method_of(content: Mapping[str, Any]) -> str:
    return "sft" if content["params"]["sft"] else "crpo"


def _target(case: Case) -> Tensor:
    """The velocity, with its noisy input and levels checked: their table of timesteps falls, ours rises."""
    schedule = NoiseSchedule.rectified_flow(case.params["num_train_timesteps"])
    latents = tensor(case.inputs["latents"])
    repeat = 1 if case.params["sft"] else 2
    rows = latents[: len(case.inputs["u"]) * repeat]
    noise = tensor(case.inputs["noise_raw"])[: len(case.inputs["u"])].repeat(repeat, 1, 1)
    levels = (schedule.steps - 1 - (tensor(case.inputs["u"]) * schedule.steps).long()).repeat(repeat)
    agree("timesteps", schedule.timestep[levels], case.outputs["timesteps"], **SINGLE)
    agree("sigmas", schedule.noise[levels], case.outputs["sigmas"], **SINGLE)
    agree("noisy_input", schedule.add_noise(rows, noise, levels), case.outputs["noisy_input"], **SINGLE)
    target = schedule.target(rows, noise, levels, "flow")
    agree("target", target, case.outputs["target"], **SINGLE)
    return target


def agree_single(case: Case, outcome: Outcome, gradient: Tensor, beta: float) -> None:
    """Where errors have float32's rounding, beta multiplies it: in the margin, and so in loss and gradient."""
    margin = 1e-7 * beta
    agree("loss", outcome.loss.mean(), case.outputs["loss"], rtol=1e-6, atol=margin)
    expected = tensor(case.outputs["grad_pred"])
    agree("grad_pred", gradient, expected.tolist(), rtol=1e-5, atol=1e-7 * float(expected.abs().max()) * max(1.0, beta))
    errors = {side: -outcome.statistics[f"{side}_value"] for side in ("policy", "reference")}
    for side, name in (("policy", "model"), ("reference", "ref")):
        agree(f"{name}_losses_w", errors[side][:, 0], case.outputs[f"{name}_losses_w"], **SINGLE)
        agree(f"{name}_losses_l", errors[side][:, 1], case.outputs[f"{name}_losses_l"], **SINGLE)
        agree(f"raw_{name}_loss", errors[side].mean(), case.outputs[f"raw_{name}_loss"], **SINGLE)
    agree("inside_term", outcome.statistics["margin"], case.outputs["inside_term"], rtol=2e-6, atol=margin)


def _crpo(case: Case) -> None:
    """A tie is wrong in the original's accuracy."""
    beta = case.params["beta_dpo"]
    outcome, gradient = run(CRPO(beta=BetaConfig(value=beta, convention="mean_half")), case.inputs, _target(case))
    agree_single(case, outcome, gradient, beta)
    agree("implicit_acc", (outcome.statistics["margin"] > 0).double().mean(), case.outputs["implicit_acc"])


def check_sft(case: Case, target: Tensor, weight: Tensor | None = None) -> None:
    """The winners' own loss."""
    prediction = tensor(case.inputs["model_pred"]).unsqueeze(1).requires_grad_(True)
    scores = {"policy": squared_error_scores(prediction, target.unsqueeze(1), steps=STEPS, weight=weight)}
    outcome = build(SFT())(scores, pair_batch(len(prediction), candidates=1), beta=1.0)
    agree("loss", outcome.loss.mean(), case.outputs["loss"], **SINGLE)
    (gradient,) = torch.autograd.grad(outcome.loss.mean(), prediction)
    agree("grad_pred", gradient[:, 0], case.outputs["grad_pred"], rtol=1e-5, atol=1e-8)


def _sft(case: Case) -> None:
    check_sft(case, _target(case))


METHODS: dict[str, Callable[[Case], None]] = {"crpo": _crpo, "sft": _sft}
NOT_IN_PLACE: dict[str, str] = {}
