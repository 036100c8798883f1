"""diffusion_po_variants.json: successors of Diffusion-DPO, each from its own code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import STEPS, grouped, pair_batch, run, scores_of

from polyalign.core.likelihood.denoising import NoiseSchedule, squared_error_scores
from polyalign.core.objectives import AutoBeta, build
from polyalign.core.objectives.table import DPO, SDPO
from polyalign.core.recipe import AutoBetaConfig, BetaConfig
from polyalign.core.scores import Unit


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


METHODS: dict[str, Callable[[Case], None]] = {
    "flow_dpo": _flow_dpo,
    "simpletuner_per_sample_error": _per_sample_error,
    "simpletuner_auto_beta": _auto_beta,
    "diffusion-dpo+sdpo": _dpo_with_safeguard,
}
_NO_ROW = "no row of the objective table yet"
_ONLINE = "its sampling loop is not here yet"
NOT_IN_PLACE: dict[str, str] = {
    "mapo": _NO_ROW,
    "diffusion_kto": _NO_ROW,
    "dspo": _NO_ROW,
    "dspo+sdpo": _NO_ROW,
    "dmpo": _NO_ROW,
    "dmpo+sdpo": _NO_ROW,
    "diffusion_nft": _ONLINE,
    "spo": _ONLINE,
}
