"""tango2.json: Tango 2's Diffusion-DPO on latents of audio, and its fine-tuning loss; float32 from float64 inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.crpo import SINGLE, agree_single, check_sft
from golden_adapters.pairs import run
from torch import Tensor

from polyalign.core.likelihood.denoising import NoiseSchedule
from polyalign.core.objectives.table import DPO
from polyalign.core.recipe import BetaConfig


def method_of(content: Mapping[str, Any]) -> str:
    return "sft" if content["params"]["sft"] else "dpo"


def _target(case: Case) -> tuple[NoiseSchedule, Tensor]:
    """Winner and loser share noise and timestep. Which captions are dropped is the data's part, and not compared."""
    schedule = NoiseSchedule.from_scheduler_config(case.params["scheduler"])
    timesteps = torch.tensor(case.inputs["timesteps"])
    repeat = 1 if case.params["sft"] else 2
    levels = timesteps.repeat(repeat)
    latents = tensor(case.inputs["latents"])[: len(levels)]
    noise = tensor(case.inputs["noise_raw"])[: len(timesteps)].repeat(repeat, 1, 1, 1)
    agree("timesteps_fed", levels, case.outputs["timesteps_fed"])
    agree("noisy_input", schedule.add_noise(latents, noise, levels), case.outputs["noisy_input"], **SINGLE)
    target = schedule.target(latents, noise, levels, case.params["prediction_type"])
    agree("target", target, case.outputs["target"], **SINGLE)
    return schedule, target


def _dpo(case: Case) -> None:
    beta = case.params["beta_dpo"]
    outcome, gradient = run(DPO(beta=BetaConfig(value=beta, convention="mean_half")), case.inputs, _target(case)[1])
    agree_single(case, outcome, gradient, beta)
    log_ratio = outcome.statistics["logratio"]
    difference = tensor(case.outputs["ref_diff"]) - tensor(case.outputs["model_diff"])
    agree("log-ratio margin", log_ratio[:, 0] - log_ratio[:, 1], difference.tolist(), rtol=2e-6, atol=1e-7)


def _sft(case: Case) -> None:
    """The original weighs by min(SNR, gamma)/SNR whatever is predicted; for a velocity ours would be min(SNR, gamma)/(SNR +
    1)."""
    schedule, target = _target(case)
    gamma, weight = case.params["snr_gamma"], None
    if gamma is not None:
        levels = torch.tensor(case.inputs["timesteps"])
        weight = schedule.weights("min_snr", "epsilon", gamma)[levels].unsqueeze(1)
    check_sft(case, target, weight)


METHODS: dict[str, Callable[[Case], None]] = {"dpo": _dpo, "sft": _sft}
NOT_IN_PLACE: dict[str, str] = {}
