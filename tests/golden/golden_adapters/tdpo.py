"""tdpo.json: the TDPO authors' loss, from logits and from sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import pair_batch, ungrouped
from golden_adapters.sequences import Labelled, columns, divergence, token_scores

from polyalign.core.objectives import Objective, build
from polyalign.core.objectives.table_tokens import TDPO1, TDPO2


def method_of(content: Mapping[str, Any]) -> str:
    if "policy_logits" not in content["inputs"]:
        return "sums"
    return "logits" if "if_tdpo2" in content["params"] else "underflow"


def _objective(case: Case) -> Objective:
    return build(TDPO2(alpha=case.params["alpha"]) if case.params["if_tdpo2"] else TDPO1())


def _from_sums(case: Case) -> None:
    """The original reports beta (r + K) as a reward whatever it trains, so rewards are not compared."""
    ratios = columns(case.inputs, ("chosen_logps_margin", "rejected_logps_margin")).requires_grad_(True)
    divergences = columns(case.inputs, ("chosen_position_kl", "rejected_position_kl")).requires_grad_(True)
    scores = {"policy": token_scores(ratios, kl=divergences.unsqueeze(-1))}
    outcome = _objective(case)(scores, pair_batch(len(ratios)), beta=case.params["beta"])
    outcome.loss.sum().backward()
    agree("losses", outcome.loss, case.outputs["losses"])
    assert ratios.grad is not None and divergences.grad is not None
    for name, gradient in (("margin", ratios.grad), ("kl", divergences.grad)):
        agree(f"chosen_{name}", gradient[:, 0], case.outputs["grads"][f"chosen_{name}"])
        agree(f"rejected_{name}", gradient[:, 1], case.outputs["grads"][f"rejected_{name}"])


def _from_logits(case: Case) -> None:
    labels = torch.tensor(case.inputs["labels"])
    logits = tensor(case.inputs["policy_logits"]).requires_grad_(True)
    policy, reference = Labelled.of(logits, labels), Labelled.of(tensor(case.inputs["reference_logits"]), labels)
    mask, kl = policy.mask, divergence(reference.logits, policy.logits)
    scores = {
        "policy": token_scores(policy.log_probabilities(), mask, kl=kl),
        "reference": token_scores(reference.log_probabilities(), mask),
    }
    outcome = _objective(case)(scores, pair_batch(len(mask)), beta=case.params["beta"])
    outcome.loss.mean().backward()
    agree("losses", outcome.loss, case.outputs["losses"])
    agree("policy_logps", ungrouped(outcome.statistics["policy_value"]), case.outputs["policy_logps"])
    agree("logps_margin", ungrouped(outcome.statistics["logratio"]), case.outputs["logps_margin"])
    agree("position_kl", ungrouped((kl * mask).sum(-1)), case.outputs["position_kl"])
    assert logits.grad is not None
    agree("gradient", logits.grad, case.outputs["grad_policy_logits_of_mean_loss"])


def _underflow(case: Case) -> None:
    """A reference that gives some tokens no probability: the original is nan and inf, ours is a number with a gradient."""
    labels = torch.tensor(case.inputs["labels"])
    logits = tensor(case.inputs["policy_logits"]).requires_grad_(True)
    policy = Labelled.of(logits, labels, candidates=1)
    reference = Labelled.of(tensor(case.inputs["reference_logits"]), labels, candidates=1)
    mask, kl = policy.mask, divergence(reference.logits, policy.logits)
    agree("position_kl", (kl * mask).sum(-1)[:, 0], case.outputs["position_kl"])
    margin = ((policy.log_probabilities() - reference.log_probabilities()) * mask).sum(-1)[:, 0]
    agree("logps_margin", margin, case.outputs["logps_margin"])
    assert bool(margin.isfinite().all()) and bool(kl.isfinite().all())
    (gradient,) = torch.autograd.grad((kl * mask).sum() + margin.sum(), logits)
    assert bool(gradient.isfinite().all())


METHODS: dict[str, Callable[[Case], None]] = {"sums": _from_sums, "logits": _from_logits, "underflow": _underflow}
NOT_IN_PLACE: dict[str, str] = {}
