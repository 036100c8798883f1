"""rdpo.json: Re-Align's loss, its label log-probabilities and the noise of its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.mcm_dpo import agree_diffused
from golden_adapters.sequences import agree_label_sums, columns, evaluate

from polyalign.core.objectives import build
from polyalign.core.objectives.table_groups import RDPO

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
        for place, name in enumerate(("chosen_rewards", "rejected_rewards")):
            agree(name, result.outcome.statistics["reward"][:, place], case.outputs[name])


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
