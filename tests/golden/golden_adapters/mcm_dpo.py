"""mcm_dpo.json: MCM-DPO's loss over eight combinations of context, image and text, what it sets beside them, and CIDEr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.sequences import FLOAT32, agree_label_sums, columns, evaluate

from polyalign.core.objectives import build
from polyalign.core.objectives.table_visual import MCMDPO
from polyalign.evaluation.vlm.cider import cider
from polyalign.modalities.vlm.negatives import diffused, official_other

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


def _captions(case: Case) -> None:
    """The original's scorer goes by the name of CIDEr and is coco-caption's, which computes CIDEr-D."""
    references = [[text.split() for text in known] for known in case.inputs["references"]]
    scores = cider([text.split() for text in case.inputs["candidates"]], references).d
    agree("per item", torch.tensor(scores, dtype=torch.float64), case.outputs["per_item"])
    agree("cider", torch.tensor(scores, dtype=torch.float64).mean(), case.outputs["cider"])


def agree_diffused(case: Case) -> None:
    """Noised pixels in float32; Re-Align's file has the same function."""
    pixels, noise = (tensor(case.inputs[name], torch.float32) for name in ("image", "eps"))
    agree("noisy", diffused(pixels, noise, case.params["noise_step"]), case.outputs["noisy"], **FLOAT32)


def _other_contexts(case: Case) -> None:
    count = case.inputs["n_items"]
    assert [official_other(index, count) for index in range(count)] == case.outputs["neg_index"]


METHODS: dict[str, Callable[[Case], None]] = {
    "LLAVADPOTrainer.mcmdpo_loss": _check,
    "mcmdpo_get_batch_logps": _label_sums,
    "cider.CiderScorer": _captions,
    "add_diffusion_noise": agree_diffused,
    "DPODataset.__getitem__": _other_contexts,
}
NOT_IN_PLACE: dict[str, str] = {}
