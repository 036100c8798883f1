"""ipo.json: IPO by the DPO authors' code, its online form composed from it, and IPO-MD's mixture from TRL 0.24."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.dpo import POLICY, REFERENCE, check_logits
from golden_adapters.sequences import agree_pairs, columns, evaluate, soft_batch

from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.core.objectives import build
from polyalign.core.objectives.table import IPO
from polyalign.core.objectives.table_pairs import OnlineIPO


def method_of(content: Mapping[str, Any]) -> str:
    if "mixture_coef" in content["params"]:
        return "mixture"
    if "pref_prob_1_over_2" in content["inputs"]:
        return "online"
    return "logits" if "policy_logits" in content["inputs"] else "log-probabilities"


def _without_rewards(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The original reports tau times the log-ratio as a reward, which is not what it trains."""
    return {name: value for name, value in outputs.items() if not name.endswith("_rewards")}


def _from_sums(case: Case) -> None:
    objective = build(IPO(tau=case.params["beta"], reduction="sum"))
    result = evaluate(objective, columns(case.inputs, POLICY), columns(case.inputs, REFERENCE), beta=1.0)
    agree_pairs(_without_rewards(case.outputs), result)
    agree("chosen_rewards", case.params["beta"] * result.outcome.statistics["reward"][:, 0], case.outputs["chosen_rewards"])


def _from_logits(case: Case) -> None:
    reduction = "mean" if case.params["average_log_prob"] else "sum"
    check_logits(case, build(IPO(tau=case.params["beta"], reduction=reduction)), 1.0)


def _online(case: Case) -> None:
    tau, p = case.params["beta"], tensor(case.inputs["pref_prob_1_over_2"])
    objective = build(OnlineIPO(tau=tau))
    policy = columns(case.inputs, ("policy_logps_1", "policy_logps_2"))
    reference = columns(case.inputs, ("reference_logps_1", "reference_logps_2"))
    result = evaluate(objective, policy, reference, beta=1.0, batch=soft_batch(torch.stack([p, 1.0 - p], 1)))
    agree("losses", result.outcome.loss + p * (1.0 - p) / tau**2, case.outputs["losses"])
    agree("grad_1", result.summed[:, 0], case.outputs["grad_1"])
    agree("grad_2", result.summed[:, 1], case.outputs["grad_2"])
    for name, order in (("ipo_12", (0, 1)), ("ipo_21", (1, 0))):
        one_way = evaluate(objective, policy[:, list(order)], reference[:, list(order)], beta=1.0)
        agree(name, one_way.outcome.loss, case.outputs[name])


def _mixture(case: Case) -> None:
    policy, reference = tensor(case.inputs["policy_logits"]), tensor(case.inputs["reference_logits"])
    ours = geometric_mixture(policy, reference, reference_share=case.params["mixture_coef"])
    agree("mixture_logprobs", ours, case.outputs["mixture_logprobs"])


METHODS: dict[str, Callable[[Case], None]] = {
    "log-probabilities": _from_sums,
    "logits": _from_logits,
    "online": _online,
    "mixture": _mixture,
}
NOT_IN_PLACE: dict[str, str] = {}
