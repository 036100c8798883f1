"""rdpo.json: Re-Align's loss, its label log-probabilities and the noise of its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.mcm_dpo import agree_diffused
from golden_adapters.sequences import agree_label_sums, columns, evaluate, soft_batch, token_scores

from polyalign.core.objectives import build
from polyalign.core.objectives.table_visual import RDPO

CANDIDATES = ("chosen", "rejected", "imageless_chosen")


def method_of(content: Mapping[str, Any]) -> str:
    return content["params"]["fn"]


def _check(case: Case) -> None:
    sides = ("policy", "reference")
    policy, reference = (columns(case.inputs, [f"{side}_{name}_logps" for name in CANDIDATES]) for side in sides)
    free = case.params["reference_free"]
    result = evaluate(build(RDPO()), policy, None if free else reference, beta=case.params["beta"])
    agree("losses", result.outcome.loss, case.outputs["losses"])
    for place, name in enumerate(("chosen", "rejected", "imageless")):
        agree(f"grad_policy_{name}", result.summed[:, place], case.outputs[f"grad_policy_{name}"])
    if not free:  # the original's rewards subtract the reference even where its loss does not
        _check_hardest(case, policy, reference)
        for place, name in enumerate(("chosen_rewards", "rejected_rewards")):
            agree(name, result.outcome.statistics["reward"][:, place], case.outputs[name])


def _check_hardest(case: Case, policy: torch.Tensor, reference: torch.Tensor) -> None:
    """The same numbers, with those of the losers (which in the original's run are of the likeliest other tokens) where
    ``runner_up`` stands, and their labels' as something else."""
    values, runner_up = policy.clone().requires_grad_(True), policy.clone().requires_grad_(True)
    losers = torch.tensor([0.0, -3.0, 5.0], dtype=policy.dtype)
    scores = {
        "policy": token_scores(values + losers, runner_up=(runner_up - losers.eq(0) * 2.0).unsqueeze(-1)),
        "reference": token_scores(reference - losers, runner_up=reference.unsqueeze(-1)),
    }
    objective = build(RDPO(loser_logp="hardest_negative"))
    outcome = objective(scores, soft_batch(torch.tensor([[1.0, 0.0, 0.0]]).expand(len(policy), 3)), beta=case.params["beta"])
    agree("losses", outcome.loss, case.outputs["losses"])
    own, others = torch.autograd.grad(outcome.loss.sum(), [values, runner_up])
    agree("grad_policy_chosen", own[:, 0], case.outputs["grad_policy_chosen"])
    for place, name in ((1, "rejected"), (2, "imageless")):
        agree(f"grad_policy_{name}", others[:, place], case.outputs[f"grad_policy_{name}"])
    assert not own[:, 1:].any() and not others[:, 0].any()


def _label_sums(case: Case) -> None:
    logits, labels = tensor(case.inputs["logits"]), torch.tensor(case.inputs["labels"])
    agree_label_sums(case.outputs, "logps", logits, labels)
    agree_label_sums(case.outputs, "noisy_logps", logits, labels, hardest=True)


METHODS: dict[str, Callable[[Case], None]] = {
    "rDPOTrainer.dpo_loss": _check,
    "_get_batch_logps/_get_noisy_batch_logps": _label_sums,
    "add_diffusion_noise": agree_diffused,
}
NOT_IN_PLACE: dict[str, str] = {}
