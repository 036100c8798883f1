"""trl_losses.json: the losses of TRL's DPOTrainer, and of its CPO, ORPO and KTO trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import pair_batch, ungrouped
from golden_adapters.sequences import FLOAT32, agree_pairs, columns, evaluate, token_scores, trl_rows
from torch import Tensor

from polyalign.core.objectives import Objective, Term, build
from polyalign.core.objectives.links import PowerReward
from polyalign.core.objectives.losses import Hinge, Logistic, PreferenceLoss, Square
from polyalign.core.objectives.numerics import exponent_cap
from polyalign.core.objectives.objective import PolicyConfidence
from polyalign.core.objectives.regularisers import BatchTokenSFT
from polyalign.core.objectives.table import SPEC
from polyalign.core.objectives.weights_tokens import LengthDesensitised

NORMALISED_LINK = (
    "TRL divides the link of a sum by the length, which leaves an unknown constant: refused, or the mean is linked"
)
OUTSIDE = "TRL's coefficient 2 is alpha = -1, where f-DPO's condition 0 < alpha <= 1 does not hold; ours refuses it"
F_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}


def method_of(content: Mapping[str, Any]) -> str:
    params, inputs = content["params"], content["inputs"]
    trainers = ("CPOTrainer", "ORPOTrainer", "KTOTrainer")
    for trainer in trainers:
        if trainer in params.get("source", ""):
            return trainer
    if "policy_chosen_logps" in inputs:
        return "CPOTrainer"
    if "f_divergence_type" in params:
        if params["loss_type"] == ["sigmoid_norm"]:
            return "sigmoid_norm of an f-divergence"
        if params["f_divergence_type"] == "alpha_divergence" and params["f_alpha_divergence_coef"] > 1.0:
            return "alpha below 0"
        return "f-divergence"
    return "DPOTrainer"


def from_table(name: str, **options: Any) -> Objective:
    return build(SPEC.validate_python({"name": name, **options}))


def _objective(params: Mapping[str, Any]) -> tuple[Objective, float]:
    """(objective, beta) for a case of DPOTrainer. beta is 1 where TRL uses its own as a target."""
    beta, smoothing = params["beta"], params.get("label_smoothing", 0.0)
    names: list[str] = params["loss_type"]
    weighting, alpha = params.get("use_weighting", False), params.get("ld_alpha")
    if weighting or alpha is not None:
        loss = {"sigmoid": Logistic(), "hinge": Hinge(), "ipo": Square(1.0 / (2.0 * beta))}[names[0]]
        ipo = names[0] == "ipo"
        weights = LengthDesensitised(1.0 if alpha is None else alpha, averages=ipo)
        confidence = PolicyConfidence() if weighting else None
        term = Term(loss, weights=weights, sample_weight=confidence)
        return Objective("by hand", terms=(term,)), 1.0 if ipo else beta
    if names == ["sigmoid", "bco_pair", "sft"]:
        preferred, quality, sft = params["loss_weights"]
        return from_table("mpo", preference=preferred, quality=quality, sft=sft, sft_over="batch"), beta
    if names == ["hinge", "sft"]:
        first, second = params["loss_weights"]
        return Objective("by hand", terms=(Term(Hinge(), coefficient=first),), regularisers=(BatchTokenSFT(second),)), beta
    if names == ["sft"]:
        return Objective("by hand", regularisers=(BatchTokenSFT(1.0),)), beta
    (name,) = names
    rows: dict[str, tuple[str, dict[str, Any], float]] = {
        "sigmoid": ("dpo", {}, beta),
        "hinge": ("hinge", {}, beta),
        "ipo": ("ipo", {"tau": beta, "reduction": "mean"}, 1.0),
        "exo_pair": ("exo", {"label_smoothing": smoothing}, beta),
        "nca_pair": ("nca", {}, beta),
        "robust": ("robust", {"label_smoothing": smoothing}, beta),
        "bco_pair": ("bco", {}, beta),
        "sppo_hard": ("sppo", {"eta": 1.0 / beta}, 1.0),
        "aot": ("aot", {"label_smoothing": smoothing}, beta),
        "aot_unpaired": ("aot_unpaired", {"label_smoothing": smoothing}, beta),
        "apo_zero": ("apo_zero", {}, beta),
        "apo_down": ("apo_down", {}, beta),
        "discopop": ("discopop", {"tau": params.get("discopop_tau", 0.05)}, beta),
        "sigmoid_norm": ("sigmoid_norm", {}, beta),
    }
    row, options, factor = rows[name]
    return from_table(row, **options), factor


def check_rows(
    case: Case, objective: Objective, beta: float, dtype: torch.dtype = torch.float64, steepest: float | None = None
) -> None:
    """Batch loss, losses of each pair alone, and gradients by the log-probabilities of completion tokens.

    Pairs with a log-ratio of the size ``steepest`` or more are only asked to be finite: TRL clamps its exponents there, without
    a gradient, where ours go on as straight lines.
    """
    policy, reference, sharpness, mask = trl_rows(case.inputs, dtype)
    log_ratio = ((policy - reference) * mask).sum(-1).abs().amax(1)
    compared = torch.ones(len(policy), dtype=torch.bool) if steepest is None else log_ratio < steepest
    tolerance = FLOAT32 if dtype == torch.float32 else {}
    confidence = torch.where(mask, policy - sharpness, 0.0)
    result = evaluate(objective, policy, reference, beta=beta, mask=mask, confidence=confidence)
    if bool(compared.all()):
        agree("loss", result.outcome.loss.mean(), case.outputs["loss"], **tolerance)
    counted = mask & compared.reshape(-1, 1, 1)
    expected = torch.where(ungrouped(counted), tensor(case.outputs["grad_per_token_policy_logps"]), 0.0)
    agree("gradient", ungrouped(result.averaged * counted), expected.tolist(), **tolerance)
    alone = case.outputs.get("per_pair_loss_when_batch_of_one")
    if alone is not None:
        for pair, loss in enumerate(alone):
            part = slice(pair, pair + 1)
            one = evaluate(objective, policy[part], reference[part], beta=beta, mask=mask[part], confidence=confidence[part])
            if not compared[pair]:
                continue
            agree(f"pair {pair}", one.outcome.loss.mean(), loss, **tolerance)


def check_dpo_trainer(case: Case) -> None:
    check_rows(case, *_objective(case.params))


def _f_divergence(case: Case) -> None:
    """Both conventions: TRL's coefficient is 1 - alpha, so that 1 is the reverse KL."""
    params = case.params
    alpha = 1.0 - params["f_alpha_divergence_coef"]
    divergence = F_DIVERGENCES[params["f_divergence_type"]]
    if divergence == "alpha" and alpha == 0.0:
        divergence = "reverse_kl"
    options = {"divergence": divergence, **({"alpha": alpha} if divergence == "alpha" else {})}
    objective = from_table("f_dpo", **options)
    if params["loss_type"] == ["hinge"]:
        objective = Objective("by hand", terms=(replace(objective.terms[0], loss=Hinge()),))
    dtype = torch.float32 if params["dtype"] == "torch.float32" else torch.float64
    steepest = exponent_cap(dtype) / alpha if divergence == "alpha" else None
    check_rows(case, objective, params["beta"], dtype, steepest)


def check_cpo_trainer(case: Case) -> None:
    """cpo_loss on log-likelihoods without a reference: sums, or means for simpo."""
    params = case.params
    beta, name = params["beta"], params.get("loss_type", "hinge")
    policy = columns(case.inputs, ("policy_chosen_logps", "policy_rejected_logps"))
    alpha = params.get("alphapo_alpha", 0.0)
    if name == "simpo":
        objective = from_table("alphapo", alpha=alpha, gamma=params["simpo_gamma"])
    else:
        losses: dict[str, PreferenceLoss] = {"sigmoid": Logistic(), "hinge": Hinge(), "ipo": Square(1.0 / (2.0 * beta))}
        objective = Objective("cpo", terms=(Term(losses[name], link=PowerReward(alpha), reference=None),))
    result = evaluate(objective, policy, None, beta=1.0 if name == "ipo" else beta)
    agree_pairs({name: value for name, value in case.outputs.items() if not name.endswith("_rewards")}, result)
    if name in ("sigmoid", "hinge") and alpha == 0.0:
        same = from_table("cpo", loss="hinge" if name == "hinge" else "logistic", sft=0.0)
        assert torch.equal(evaluate(same, policy, None, beta=beta).outcome.loss, result.outcome.loss)


def _orpo(case: Case) -> None:
    """float32 inside; the original returns + weight logsigmoid, which its trainer subtracts."""
    policy = columns(case.inputs, ("policy_chosen_avg_logps", "policy_rejected_avg_logps"))
    result = evaluate(from_table("orpo", weight=case.params["beta"], sft=0.0), policy, None, beta=1.0)
    agree("losses", -result.outcome.loss, case.outputs["losses"], **FLOAT32)
    margin = result.outcome.statistics["margin"]
    agree("mean_log_odds", margin.mean(), case.outputs["mean_log_odds"], **FLOAT32)
    agree("mean_ratio", torch.nn.functional.logsigmoid(margin).mean(), case.outputs["mean_ratio"], **FLOAT32)


def _kto(case: Case) -> None:
    """Single candidates with labels; z from mismatched completions, or none."""
    params, inputs = case.params, case.inputs
    mismatched = params["loss_type"] == "kto"
    objective = from_table(
        "kto",
        baseline="mismatched" if mismatched else "none",
        desirable_weight=params["desirable_weight"],
        undesirable_weight=params["undesirable_weight"],
    )
    mask = tensor(inputs["completion_mask"])[:, 1:].bool().unsqueeze(1)
    policy, reference = (tensor(inputs[f"{side}_per_token_logps"]).unsqueeze(1) for side in ("policy", "reference"))
    names = {"mismatched": "kl_policy_logps", "mismatched_reference": "kl_reference_logps"}
    others: dict[str, Tensor] = {seat: tensor(inputs[name]).unsqueeze(1) for seat, name in names.items()}
    batch = replace(pair_batch(len(policy), 1), desirable=torch.tensor(inputs["labels"]).unsqueeze(1))
    further = {seat: token_scores(values) for seat, values in others.items()}
    result = evaluate(objective, policy, reference, beta=params["beta"], mask=mask, batch=batch, further=further)
    agree("loss", result.outcome.loss.mean(), case.outputs["loss"])
    expected = torch.where(mask[:, 0], tensor(case.outputs["grad_per_token"]), 0.0)
    agree("gradient", (result.averaged * mask)[:, 0], expected.tolist())
    z = (others["mismatched"] - others["mismatched_reference"]).mean().clamp(min=0.0)
    agree("kl", z, case.outputs["kl"])


METHODS: dict[str, Callable[[Case], None]] = {
    "DPOTrainer": check_dpo_trainer,
    "f-divergence": _f_divergence,
    "CPOTrainer": check_cpo_trainer,
    "ORPOTrainer": _orpo,
    "KTOTrainer": _kto,
}
NOT_IN_PLACE: dict[str, str] = {}
NOT_COMPARED = {"sigmoid_norm of an f-divergence": NORMALISED_LINK, "alpha below 0": OUTSIDE}
