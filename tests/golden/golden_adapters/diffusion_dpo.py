"""diffusion_dpo.json: loss blocks of SalesforceAIResearch/DiffusionDPO and of two diffusers scripts, with their schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import STEPS, grouped, pair_batch, run, ungrouped

from polyalign.core.likelihood.denoising import (
    Draws,
    NoiseSchedule,
    TimestepSampling,
    draw,
    rows_of,
    squared_error_scores,
    zero_terminal_snr,
)
from polyalign.core.objectives import Outcome, build
from polyalign.core.objectives.table import DPO, IPO, SFT, HingeDPO, Parameters
from polyalign.core.recipe import BetaConfig, BetaConvention

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": STEPS}
SAMPLING = {
    "sdxl-turbo": TimestepSampling(choices=(249, 499, 749, 999)),
    "stable-diffusion-xl-refiner-1.0": TimestepSampling(high=200),
    "stable-diffusion-xl-base-1.0": TimestepSampling(),
}


def _pair_outputs(case: Case, outcome: Outcome) -> None:
    """Errors, differences and their means, which the two codes name a little differently."""
    statistics, outputs = outcome.statistics, case.outputs
    policy, reference = -statistics["policy_value"], -statistics["reference_value"]
    ours = {
        "model_losses": ungrouped(policy),
        "ref_losses": ungrouped(reference),
        "ref_loss": ungrouped(reference),
        "model_diff": policy[:, 0] - policy[:, 1],
        "ref_diff": reference[:, 0] - reference[:, 1],
        "raw_model_loss": policy.mean(),
        "raw_ref_loss": reference.mean(),
        "inside_term": statistics["margin"],
        "logits": statistics["logratio"][:, 0] - statistics["logratio"][:, 1],
    }
    for name in ours.keys() & outputs.keys():
        agree(name, ours[name], outputs[name])


def _check_pairs(case: Case, spec: Parameters, ties: float, effective: float | None = None) -> None:
    """``ties`` is what a tie counts in the original's accuracy; in ours it is 0.5."""
    outcome, gradient = run(spec, case.inputs, tensor(case.inputs["target"]), effective=effective)
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    agree("grad_model_pred", gradient, case.outputs["grad_model_pred"])
    _pair_outputs(case, outcome)
    accuracy = outcome.statistics["accuracy"]
    agree("implicit_acc", torch.where(accuracy == 0.5, ties, accuracy).mean(), case.outputs["implicit_acc"])
    if case.inputs["model_pred"] == case.inputs["ref_pred"]:
        assert outcome.statistics["margin"].eq(0.0).all(), "policy == reference must give a margin of exactly zero"
        assert outcome.loss.eq(torch.tensor(2.0, dtype=torch.float64).log()).all(), "and a loss of exactly ln 2"


def _dpo(convention: BetaConvention, ties: float) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        value = float(case.params["beta_dpo"])
        spec = DPO(beta=BetaConfig(value=value or 1.0, convention=convention))
        _check_pairs(case, spec, ties, effective=0.0 if value == 0.0 else None)

    return check


def _diffusers_sd15(case: Case) -> None:
    value = float(case.params["beta_dpo"])
    beta = BetaConfig(value=value, convention="mean")
    specs: dict[str, Parameters] = {
        "sigmoid": DPO(beta=beta),
        "hinge": HingeDPO(beta=beta),
        "ipo": IPO(beta=BetaConfig(value=1.0, convention="mean"), tau=value, reduction="mean"),
    }
    _check_pairs(case, specs[case.params["loss_type"]], ties=0.5)


def _sft(case: Case) -> None:
    prediction, target = tensor(case.inputs["model_pred"]).unsqueeze(1), tensor(case.inputs["target"]).unsqueeze(1)
    prediction.requires_grad_(True)
    scores = {"policy": squared_error_scores(prediction, target, steps=STEPS)}
    outcome = build(SFT())(scores, pair_batch(len(prediction), candidates=1), beta=1.0)
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    (gradient,) = torch.autograd.grad(outcome.loss.mean(), prediction)
    agree("gradient", gradient, (2.0 * (prediction - target) / prediction.numel()).tolist())


def _add_noise_and_velocity(case: Case) -> None:
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    clean, noise = tensor(case.inputs["latents"]), tensor(case.inputs["noise"])
    steps = torch.tensor(case.inputs["timesteps"])
    agree("noisy", schedule.add_noise(clean, noise, steps), case.outputs["noisy"], atol=1e-6)
    agree("velocity", schedule.target(clean, noise, steps, "v_prediction"), case.outputs["velocity"], atol=1e-6)
    agree("alphas_cumprod_at_t", schedule.signal[steps].double() ** 2, case.outputs["alphas_cumprod_at_t"], atol=1e-6)


def _zero_terminal_snr(case: Case) -> None:
    index = torch.tensor(case.inputs["index"])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    agree("before", (1.0 - betas).cumprod(0)[index], case.outputs["before"], atol=1e-6)
    agree("after", (1.0 - zero_terminal_snr(betas)).cumprod(0)[index], case.outputs["after"], atol=1e-6)
    schedule = NoiseSchedule.from_scheduler_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True})
    agree("after, from a scheduler's config", schedule.signal[index].double() ** 2, case.outputs["after"], atol=1e-6)


def _sharing(case: Case) -> None:
    """Winner and loser share timestep and noise; and the levels are among those we draw for that model."""
    sampling = SAMPLING[case.params["model"].rsplit("/", 1)[-1]]
    levels, noise = torch.tensor(case.outputs["timesteps"]), tensor(case.inputs["noise"])
    pairs = len(levels) // 2
    draws = Draws(levels[:pairs].unsqueeze(1), noise[:pairs].unsqueeze(1))
    ours = rows_of(draws.timesteps[:, 0], 2, 1, per_candidate=False).unflatten(0, (pairs, 2))
    agree("timesteps", ungrouped(ours), case.outputs["timesteps"])
    ours = rows_of(draws.noise[:, 0], 2, 1, per_candidate=False).unflatten(0, (pairs, 2))
    agree("noise", ungrouped(ours), case.outputs["noise"])
    assert grouped(levels).unbind(1)[0].tolist() == grouped(levels).unbind(1)[1].tolist()
    drawn = draw([f"group-{number}" for number in range(400)], (1,), steps=STEPS, seed=0, index=0, sampling=sampling)
    low, high = int(drawn.timesteps.min()), int(drawn.timesteps.max())
    if sampling.choices:
        assert set(drawn.timesteps.flatten().tolist()) == set(sampling.choices) >= set(levels.tolist())
    else:
        top = sampling.high or STEPS
        assert max(levels.tolist()) < top and low < 0.05 * top and 0.95 * top < high < top


METHODS: dict[str, Callable[[Case], None]] = {
    "salesforce_dpo": _dpo("mean_half", ties=0.0),
    "diffusers_sdxl": _dpo("mean_half", ties=0.5),
    "diffusers_sd15": _diffusers_sd15,
    "salesforce_sft": _sft,
    "ddpm_add_noise_and_velocity": _add_noise_and_velocity,
    "turbo_zero_terminal_snr": _zero_terminal_snr,
    "timestep_and_noise_sharing": _sharing,
}
NOT_IN_PLACE: dict[str, str] = {}
