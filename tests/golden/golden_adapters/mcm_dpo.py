"""mcm_dpo.json: MCM-DPO's loss over eight combinations of context, image and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.sequences import agree_label_sums, columns, evaluate

from polyalign.core.objectives import build
from polyalign.core.objectives.table_groups import MCMDPO

CANDIDATES = tuple(f"{c}_{m}_{y}" for c in ("cw", "cl") for m in ("mw", "ml") for y in ("yw", "yl"))
PARAMETERS = dict(zip(CANDIDATES[1:], ("r3", "r2", "r5", "r1", "r4", "r6", "r7"), strict=True))
SWITCHED_ON = ("r2", "r1", "r4", "r5", "r6", "r7")
"""The order in which the original's number of terms takes them in; r3 is always there."""


def method_of(content: Mapping[str, Any]) -> str:
    return content["params"]["fn"].split(" ")[0]


def _check(case: Case) -> None:
    params = case.params
    terms = params["use_cl_reward_num"] - 1 if params["use_cross_modal_loss"] else 0
    used = {"r3", *SWITCHED_ON[:terms]}
    weights = tuple(params[f"para_{name}"] if name in used else 0.0 for name in PARAMETERS.values())
    spec = MCMDPO.model_validate({"name": "mcm_dpo", "weights": weights, "normaliser": params["para_norm"]})
    policy, reference = (columns(case.inputs[side], CANDIDATES) for side in ("policy", "reference"))
    result = evaluate(build(spec), policy, reference, beta=params["beta"])
    agree("losses", result.outcome.loss, case.outputs["losses"])
    for place, name in enumerate(CANDIDATES):
        unused = [0.0] * len(result.summed)  # the original has no gradient by a comparison that is switched off
        agree(f"gradient by {name}", result.summed[:, place], case.outputs["grad_policy"][name] or unused)
    for place, name in enumerate(("chosen_rewards", "rejected_rewards")):
        agree(name, result.outcome.statistics["reward"][:, place], case.outputs[name])


def _label_sums(case: Case) -> None:
    labels = torch.tensor(case.inputs["labels"])
    for side, name in (("policy", "logits"), ("reference", "reference_logits")):
        agree_label_sums(case.outputs, side, tensor(case.inputs[name]), labels)


METHODS: dict[str, Callable[[Case], None]] = {
    "LLAVADPOTrainer.mcmdpo_loss": _check,
    "mcmdpo_get_batch_logps": _label_sums,
}
NOT_IN_PLACE: dict[str, str] = {
    "add_diffusion_noise": "no objective: noisy pictures for a vision-language model, which is not here yet",
    "DPODataset.__getitem__": "no objective: how one data set draws its negative contexts",
    "cider.CiderScorer": "no objective: a metric of captions, which is not here yet",
}
