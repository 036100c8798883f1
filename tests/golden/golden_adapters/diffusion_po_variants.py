"""diffusion_po_variants.json: successors of Diffusion-DPO, each from its own code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import STEPS, grouped, pair_batch, run, scores_of
from golden_adapters.sequences import columns, evaluate
from torch import Tensor

from polyalign.core.likelihood.denoising import Draws, NoiseSchedule, denoising_scores, squared_error_scores
from polyalign.core.objectives import AutoBeta, Objective, Outcome, Term, build
from polyalign.core.objectives.links import Clipped
from polyalign.core.objectives.losses import Logistic
from polyalign.core.objectives.table import DPO, SDPO, Parameters
from polyalign.core.objectives.table_denoising import DMPO, DiffusionNFT, DSPOParameters, MaPO
from polyalign.core.objectives.table_pointwise import DiffusionKTO
from polyalign.core.recipe import AutoBetaConfig, BetaConfig
from polyalign.core.scores import Scores, Unit


def _flow_dpo(case: Case) -> None:
    clean, noise = tensor(case.inputs["latents"]), tensor(case.inputs["noise"])
    target = NoiseSchedule.rectified_flow().target(clean, noise, torch.zeros(len(clean), dtype=torch.long), "flow")
    outcome, gradient = run(DPO(beta=BetaConfig(value=case.params["beta"], convention="mean_half")), case.inputs, target)
    log_ratio, margin = outcome.statistics["logratio"], outcome.statistics["margin"]
    agree("inside_term", margin, case.outputs["inside_term"])
    agree("w_diff", -log_ratio[:, 0], case.outputs["w_diff"])
    agree("l_diff", -log_ratio[:, 1], case.outputs["l_diff"])
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    # The file has no gradient; it follows from the loss: sigma(-m) beta/2 2 (prediction - target) / (d B), sign by candidate.
    residual = grouped(tensor(case.inputs["model_pred"]) - target)
    factor = torch.sigmoid(-margin) * 0.5 * case.params["beta"] * 2.0 / (residual[0, 0].numel() * len(margin))
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1)
    agree("gradient", grouped(gradient), (factor.reshape(-1, 1, 1, 1, 1) * sign * residual).tolist())


def _per_sample_error(case: Case) -> None:
    """Sum, mean over all elements, and mean over counted elements, from our mean over counted elements."""
    prediction, target, mask = (tensor(case.inputs[name]).unsqueeze(1) for name in ("pred", "target", "mask"))
    scores = squared_error_scores(prediction, target, steps=STEPS, mask=mask)
    plain = squared_error_scores(prediction, target, steps=STEPS)
    counted = mask.expand_as(prediction).flatten(1).sum(1)
    elements = prediction[0].numel()
    masked, unmasked = {
        "sum": (counted, elements),
        "mean": (counted / elements, 1.0),
        "masked_mean": (1.0, 1.0),
    }[case.params["norm_type"]]
    agree("error", -scores.values[:, 0, 0] * masked, case.outputs["error"])
    agree("error_nomask", -plain.values[:, 0, 0] * unmasked, case.outputs["error_nomask"])


def _auto_beta(case: Case) -> None:
    """SimpleTuner states beta on half the summed errors; our margins are of means, so they are divided by d."""
    config, elements = case.params["config"], 64
    auto = AutoBeta(
        BetaConfig(
            value=config["beta"],
            convention="sum_half",
            auto=AutoBetaConfig(
                target_gradient_factor=config["auto_beta_target_gf"],
                decay=config["auto_beta_decay"],
                minimum=config["auto_beta_min"],
                maximum=config["auto_beta_max"],
                warmup_steps=0,
            ),
        )
    )
    unit = Unit("timestep", elements=elements, steps=STEPS)
    values = [auto.update(margins / elements, unit).value for margins in tensor(case.inputs["margins"])]
    agree("beta", torch.tensor(values, dtype=torch.float64), case.outputs["beta"])
    assert auto.mean_margin is not None
    agree("margin_ema_last", auto.mean_margin * elements, case.outputs["margin_ema_last"])


def _dpo_with_safeguard(case: Case) -> None:
    target = tensor(case.inputs["target"])
    mu = case.params["winner_preserving_mu"]
    beta = BetaConfig(value=case.params["beta_dpo"], convention="mean_half")
    outcome, gradient = run(SDPO(beta=beta, winner_safeguard=mu), case.inputs, target)
    statistics = outcome.statistics
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    agree("grad_model_pred", gradient, case.outputs["grad_model_pred"])
    agree("inside_term", statistics["margin"], case.outputs["inside_term"])
    agree("implicit_acc", (statistics["margin"] > 0).double().mean(), case.outputs["implicit_acc"])
    agree("lose_l_scale", statistics["rejected_scale"], [case.outputs["lose_l_scale"]] * len(statistics["margin"]))
    same, _ = run(DPO(beta=beta, winner_safeguard=mu), case.inputs, target)
    assert torch.equal(same.loss, outcome.loss), "sdpo is dpo with the safeguard"
    unguarded = build(DPO(beta=beta))
    scores = {"policy": scores_of(tensor(case.inputs["model_pred"]), target)}
    scores["reference"] = scores_of(tensor(case.inputs["ref_pred"]), target)
    plain = unguarded(scores, pair_batch(len(statistics["margin"])), beta=0.5 * case.params["beta_dpo"])
    assert torch.equal(plain.loss, outcome.loss), "the safeguard leaves values alone"


def _mapo(case: Case) -> None:
    params, target = case.params, tensor(case.inputs["target"])
    beta = BetaConfig(value=params["num_train_timesteps"], convention="mean")
    inputs = {**case.inputs, "ref_pred": case.inputs["model_pred"]}  # a reference that the objective does not ask for
    outcome, gradient = run(MaPO(beta=beta, snr=params["snr_value"], weight=params["beta_mapo"]), inputs, target)
    errors = -outcome.statistics["policy_value"]
    agree("losses_w", errors[:, 0], case.outputs["losses_w"])
    agree("losses_l", errors[:, 1], case.outputs["losses_l"])
    agree("ratio_losses", errors[:, 0] - outcome.loss, case.outputs["ratio_losses"])
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    agree("gradient", gradient, case.outputs["grad"])


def _diffusion_kto(case: Case) -> None:
    """Single pictures with labels. The file has no gradient; that of finite differences takes its place."""
    params, labels = case.params, torch.tensor(case.inputs["labels"])
    baseline = {"batch": "batch", "sigmoid": "classes"}[params["bce_offset"]]
    spec = DiffusionKTO.model_validate({"name": "diffusion_kto", "utility": params["halo"], "baseline": baseline})
    objective = build(spec)
    batch = replace(pair_batch(len(labels), 1), desirable=labels.bool().unsqueeze(1))
    unit = Unit("timestep", elements=16, steps=STEPS)

    def values(name: str) -> Tensor:
        return -tensor(case.inputs[name]).reshape(-1, 1, 1)

    def outcome_of(objective: Objective, policy: Tensor) -> Outcome:
        pair = {"policy": policy, "reference": values("ref_losses")}
        scores = {seat: Scores(given, torch.ones_like(given, dtype=torch.bool), unit) for seat, given in pair.items()}
        return objective(scores, batch, beta=params["beta"])

    outcome = outcome_of(objective, values("model_losses"))
    agree("l_kto", outcome.loss, case.outputs["l_kto"])
    agree("acc", outcome.statistics["accuracy"].mean(), case.outputs["acc"])
    log_ratio = outcome.statistics["logratio"][:, 0]
    z = log_ratio - outcome.statistics["reward"][:, 0] / params["beta"]
    agree("kl", z, [case.outputs["kl"]] * len(z), atol=1e-9)
    unshifted = build(spec.model_copy(update={"baseline": "none"}))
    policy = (values("model_losses") - z.reshape(-1, 1, 1)).requires_grad_(True)
    same = outcome_of(unshifted, policy)
    agree("with z taken off beforehand", same.loss, case.outputs["l_kto"])
    same.loss.sum().backward()
    step = 1e-8
    up, down = (outcome_of(unshifted, policy.detach() + sign * step).loss for sign in (1.0, -1.0))
    assert policy.grad is not None
    agree("gradient", policy.grad.flatten(), ((up - down) / (2.0 * step)).tolist(), rtol=1e-4, atol=1e-5 * params["beta"])


def _dspo(case: Case) -> None:
    params, beta = case.params, BetaConfig(value=case.params["beta_dpo"], convention="mean_half")
    spec = DSPOParameters(
        beta=beta,
        correction=params["beta_dpo"],
        form="sdxl_code" if params["sdxl_branch"] else "score_matching",
        winner_safeguard=params["winner_preserving_mu"],
    )
    _successor(case, spec)


def _dmpo(case: Case) -> None:
    beta = BetaConfig(value=case.params["beta_dpo"], convention="mean_half")
    _successor(case, DMPO(beta=beta, alpha=case.params["dmpo_alpha"], winner_safeguard=case.params["winner_preserving_mu"]))


def _successor(case: Case, spec: Parameters) -> None:
    outcome, gradient = run(spec, case.inputs, tensor(case.inputs["target"]))
    statistics = outcome.statistics
    agree("loss", outcome.loss.mean(), case.outputs["loss"])
    agree("grad_model_pred", gradient, case.outputs["grad_model_pred"])
    agree("inside_term", statistics["margin"], case.outputs["inside_term"])
    agree("implicit_acc", (statistics["margin"] > 0).double().mean(), case.outputs["implicit_acc"])
    if "rejected_scale" in statistics:
        agree("lose_l_scale", statistics["rejected_scale"], [case.outputs["lose_l_scale"]] * len(statistics["margin"]))


def _spo(case: Case) -> None:
    """Per-step log-probabilities are given; their ratios are clipped by a link. The file has no gradient."""
    low, high = math.log(1.0 - case.params["eps"]), math.log(1.0 + case.params["eps"])
    objective = Objective("spo", terms=(Term(Logistic(), link=Clipped(low, high)),))
    policy, reference = (columns(case.inputs, (f"{side}_w", f"{side}_l")) for side in ("logp", "ref_logp"))
    result = evaluate(objective, policy, reference, beta=case.params["beta"])
    ratios = (result.outcome.statistics["reward"] / case.params["beta"]).exp()
    agree("ratios", ratios, columns(case.outputs, ("ratio_w", "ratio_l")).tolist())
    agree("loss", result.outcome.loss.mean(), case.outputs["loss"])


def _diffusion_nft(case: Case) -> None:
    """Flow matching: x_t = (1 - t) x0 + t noise. The file's ``loss`` is without the distance from the base, and it has no
    gradient; the one written out takes its place."""
    clean, noise = tensor(case.inputs["x0"]), tensor(case.inputs["noise"])
    levels = tensor(case.inputs["t"])
    schedule = NoiseSchedule("rectified_flow", 1 - levels, levels, levels * STEPS)
    draws = Draws(torch.arange(len(levels)).unsqueeze(1), noise.unsqueeze(1))
    batch = replace(pair_batch(len(clean), 1), desirable=tensor(case.outputs["r"]).unsqueeze(1))

    def scores(prediction: Tensor) -> Scores:
        return denoising_scores(
            lambda noisy, told: prediction,
            clean.unsqueeze(1),
            draws,
            schedule,
            prediction_type="flow",
            keep_residual=True,
        )

    def outcome_of(prediction: Tensor, **changes: float) -> Outcome:
        spec = DiffusionNFT(mixing=case.params["beta"], scale=case.params["adv_clip_max"], **changes)
        pair = {"policy": scores(prediction), "reference": scores(tensor(case.inputs["old_prediction"]))}
        return build(spec)(pair, batch, beta=1.0)

    policy = tensor(case.inputs["forward_prediction"]).requires_grad_(True)
    outcome = outcome_of(policy)
    factor = case.params["adv_clip_max"] / case.params["beta"]
    for side, wanted in (("positive", 1.0), ("negative", 0.0)):
        certain = replace(batch, desirable=torch.full((len(clean), 1), wanted, dtype=torch.float64))
        pair = {"policy": scores(policy), "reference": scores(tensor(case.inputs["old_prediction"]))}
        spec = DiffusionNFT(mixing=case.params["beta"], scale=case.params["adv_clip_max"])
        agree(f"{side}_loss", build(spec)(pair, certain, beta=1.0).loss / factor, case.outputs[f"{side}_loss"])
    agree("policy_loss", outcome.loss.mean(), case.outputs["policy_loss"])
    near = outcome_of(policy, proximity=case.params["kl_beta"]).loss - outcome.loss
    moved = policy - tensor(case.inputs["old_prediction"])
    agree("distance", near, (case.params["kl_beta"] * moved.square().mean((1, 2, 3))).tolist(), atol=1e-12)
    outcome.loss.mean().backward()
    assert policy.grad is not None
    agree("gradient", policy.grad, _by_residuals(case, factor).tolist())


def _by_residuals(case: Case, factor: float) -> Tensor:
    """The gradient written out: factor beta t / B d (r 2 e+ / |e+| - (1 - r) 2 e- / |e-|), e the errors of both velocities."""
    named = {name: tensor(case.inputs[name]) for name in ("x0", "noise", "t", "forward_prediction", "old_prediction")}
    level, wanted, share = named["t"].reshape(-1, 1, 1, 1), tensor(case.outputs["r"]).reshape(-1, 1, 1, 1), case.params["beta"]
    old = named["old_prediction"] - (named["noise"] - named["x0"])
    step = share * (named["forward_prediction"] - named["old_prediction"])
    up, down = (error / error.abs().mean((1, 2, 3), keepdim=True) for error in (old + step, old - step))
    return factor * share * level * 2.0 * (wanted * up - (1.0 - wanted) * down) / old.numel()


METHODS: dict[str, Callable[[Case], None]] = {
    "flow_dpo": _flow_dpo,
    "simpletuner_per_sample_error": _per_sample_error,
    "simpletuner_auto_beta": _auto_beta,
    "diffusion-dpo+sdpo": _dpo_with_safeguard,
    "mapo": _mapo,
    "diffusion_kto": _diffusion_kto,
    "dspo": _dspo,
    "dspo+sdpo": _dspo,
    "dmpo": _dmpo,
    "dmpo+sdpo": _dmpo,
    "spo": _spo,
    "diffusion_nft": _diffusion_nft,
}
