"""dpo.json: the DPO authors' preference_loss on log-probabilities, and on logits with its reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import ungrouped
from golden_adapters.sequences import Labelled, agree_pairs, columns, evaluate

from polyalign.core.objectives import Objective, Term, build
from polyalign.core.objectives.losses import Logistic
from polyalign.core.objectives.table import DPO
from polyalign.core.objectives.weights import Mean, Sum

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")


def method_of(content: Mapping[str, Any]) -> str:
    return "logits" if "policy_logits" in content["inputs"] else "log-probabilities"


def _from_sums(case: Case) -> None:
    """Without a reference the original still subtracts it from the rewards it reports, which ours does not."""
    free = case.params.get("reference_free", False)
    objective = build(DPO(label_smoothing=case.params.get("label_smoothing", 0.0)))
    reference = None if free else columns(case.inputs, REFERENCE)
    result = evaluate(objective, columns(case.inputs, POLICY), reference, beta=case.params["beta"])
    outputs = {name: value for name, value in case.outputs.items() if not (free and name.endswith("_rewards"))}
    agree_pairs(outputs, result)


def check_logits(case: Case, objective: Objective, beta: float) -> None:
    """From logits to the gradient by them, sums and means."""
    averaged = case.params["average_log_prob"]
    labels = torch.tensor(case.inputs["labels"])
    logits = tensor(case.inputs["policy_logits"]).requires_grad_(True)
    policy, reference = Labelled.of(logits, labels), Labelled.of(tensor(case.inputs["reference_logits"]), labels)
    values = policy.log_probabilities()
    result = evaluate(objective, values, reference.log_probabilities(), mask=policy.mask, beta=beta)
    statistics = result.outcome.statistics
    agree("policy_logps", ungrouped(statistics["policy_value"]), case.outputs["policy_logps"])
    agree("reference_logps", ungrouped(statistics["reference_value"]), case.outputs["reference_logps"])
    rewards = {name for name in case.outputs if not averaged or not name.endswith("_rewards")}
    agree_pairs({name: case.outputs[name] for name in rewards}, result)
    values.backward(result.averaged)
    assert logits.grad is not None
    agree("gradient", logits.grad, case.outputs["grad_policy_logits_of_mean_loss"])


def _from_logits(case: Case) -> None:
    weights = Mean() if case.params["average_log_prob"] else Sum()
    objective = Objective("dpo", terms=(Term(Logistic(), weights=weights),))
    check_logits(case, objective, case.params["beta"])


METHODS: dict[str, Callable[[Case], None]] = {"log-probabilities": _from_sums, "logits": _from_logits}
NOT_IN_PLACE: dict[str, str] = {}
