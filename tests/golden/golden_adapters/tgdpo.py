"""tgdpo.json: the TGDPO authors' loss, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.sequences import columns, evaluate, token_scores

from polyalign.core.objectives import build
from polyalign.core.objectives.table_tokens import TGDPO


def _check(case: Case) -> None:
    """The original has a gradient by padding too, which ours masks."""
    inputs, beta = case.inputs, case.params["beta"]
    policy, reference, guide = (
        columns(inputs, (f"{model}_chosen_per_token_logps", f"{model}_rejected_per_token_logps"))
        for model in ("policy", "reference", "reward_model")
    )
    mask = columns(inputs, ("chosen_mask", "rejected_mask")).bool()
    further = {"guide": token_scores(guide, mask)}
    objective = build(TGDPO(alpha=case.params["tgdpo_alpha"]))
    result = evaluate(objective, policy, reference, beta=beta, mask=mask, further=further)
    agree("losses", result.outcome.loss, case.outputs["losses"])
    for place, name in enumerate(("chosen", "rejected")):
        expected = torch.where(mask[:, place], tensor(case.outputs[f"grad_policy_{name}"]), 0.0)
        agree(f"grad_policy_{name}", result.summed[:, place] * mask[:, place], expected.tolist())
        rewards = beta * (policy - reference)[:, place] * mask[:, place]
        agree(f"{name}_rewards_per_token", rewards, case.outputs[f"{name}_rewards_per_token"])


METHODS: dict[str, Callable[[Case], None]] = {"tgdpo": _check}
NOT_IN_PLACE: dict[str, str] = {}
