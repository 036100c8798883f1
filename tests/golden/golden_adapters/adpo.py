"""adpo.json: three versions of the ADPO author's loss, which differ in how they make the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.sequences import Result, evaluate, soft_batch
from torch import Tensor

from polyalign.core.objectives import build
from polyalign.core.objectives.table_groups import ADPO
from polyalign.core.objectives.table_pairs import CDPO


def method_of(content: Mapping[str, Any]) -> str:
    variant = content["params"]["variant"]
    if variant.startswith("e4883c99"):
        return "e4883c99"
    if "q_pairs" in content["inputs"]:
        return "9b2152ae pairs"
    return variant


def _evaluate(case: Case, spec: ADPO, target: Tensor, beta: float | Tensor) -> Result:
    """Rows are groups of num_generations answers."""
    size = case.params["num_generations"]
    policy, anchor = (tensor(case.inputs[name]).unflatten(0, (-1, size)) for name in ("log_prob", "anchor_log_prob"))
    mask = tensor(case.inputs["response_mask"]).unflatten(0, (-1, size)) if "response_mask" in case.inputs else None
    return evaluate(build(spec), policy, anchor, beta=beta, mask=mask, batch=soft_batch(target))


def _advantages(case: Case) -> Tensor:
    return tensor(case.inputs["advantages"]).unflatten(0, (-1, case.params["num_generations"]))


def _agree(case: Case, result: Result) -> None:
    agree("loss", result.outcome.loss.mean(), case.outputs["loss"])
    agree("gradient", result.averaged.flatten(0, 1), case.outputs["grad_log_prob"])


def _standardised(case: Case) -> None:
    """This version standardises rewards once more, and lets the temperature fall with the target's entropy if asked to."""
    params, advantages = case.params, _advantages(case)
    spread = advantages.std(1, keepdim=True) + 1e-8
    target = ((advantages - advantages.mean(1, keepdim=True)) / spread / params["beta_reward"]).softmax(1)
    tau = torch.full((len(target),), params["tau"], dtype=torch.float64)
    if params["use_adaptive_tau"]:
        entropy = -(target * (target + 1e-8).log()).sum(1) / math.log(params["num_generations"])
        tau = (tau * (1.0 - params["adaptive_tau_alpha"] * entropy)).clamp(min=params["adaptive_tau_min"])
    agree("mean_tau", tau.mean(), case.outputs["mean_tau"])
    _agree(case, _evaluate(case, ADPO(reference_kl=params["beta_anchor_kl"]), target, 1.0 / tau))


def _pairs(case: Case) -> None:
    """Two candidates with target (1-e, e), which is cDPO with beta 1/tau and label smoothing e."""
    beta = 1.0 / case.params["tau"]
    q = tensor(case.inputs["q_pairs"])
    target = (_advantages(case) / case.params["beta_reward"]).softmax(1)
    agree("target", target, [q.tolist()] * len(target))
    result = _evaluate(case, ADPO(), target, beta)
    _agree(case, result)
    agree("cdpo", result.outcome.loss.mean(), case.outputs["cdpo_equivalent_mean_loss_beta_1_over_tau"])
    smoothing = float(q.min())
    if smoothing < 0.5:
        policy, anchor = (tensor(case.inputs[name]).unflatten(0, (-1, 2)) for name in ("log_prob", "anchor_log_prob"))
        order = [int(q.argmax()), 1 - int(q.argmax())]
        cdpo = evaluate(build(CDPO(label_smoothing=smoothing)), policy[:, order], anchor[:, order], beta=beta)
        agree("cdpo row", cdpo.outcome.loss.mean(), case.outputs["loss"])


def _softmax(case: Case) -> None:
    target = (_advantages(case) / case.params["beta_reward"]).softmax(1)
    reduction = "mean" if case.params["length_normalise"] else "sum"
    _agree(case, _evaluate(case, ADPO(reduction=reduction), target, 1.0 / case.params["tau"]))


def _plackett_luce(case: Case) -> None:
    """The original's value is wrong; the file has the right one, but no right gradient."""
    target = (_advantages(case) / case.params["beta_reward"]).softmax(1)
    result = _evaluate(case, ADPO(loss="plackett_luce"), target, 1.0 / case.params["tau"])
    agree("loss", result.outcome.loss.mean(), case.outputs["correct_listmle_mean_over_positions"])
    per_candidate = result.summed[:, :, 0]  # the first token counts in every answer
    agree("gradients of a group add up to 0", per_candidate.sum(1), [0.0] * len(per_candidate), atol=1e-9)


METHODS: dict[str, Callable[[Case], None]] = {
    "e4883c99": _standardised,
    "9b2152ae pairs": _pairs,
    "9b2152ae softmax": _softmax,
    "9b2152ae plackett_luce": _plackett_luce,
}
NOT_IN_PLACE: dict[str, str] = {}
NOT_COMPARED = {
    "9b2152ae plackett_luce_defaults": "marked as wrong in the file, which has no right value; not the paper's loss either"
}
