"""ches.json: CHES scores of the authors' code, from left-padded hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_adapters.cases import Case, agree, tensor
from torch import Tensor

from polyalign.core.diagnostics import ches


def _check(case: Case) -> None:
    states: list[Tensor] = []
    masks: list[Tensor] = []
    for side in ("preferred", "dispreferred"):
        hidden = tensor(case.inputs[f"{side}_hidden"])
        first = torch.tensor(case.inputs[f"{side}_last_prompt_idx"]).unsqueeze(1)
        places = torch.arange(hidden.shape[1]).unsqueeze(0)
        states.append(hidden)
        masks.append((places >= first) & (places < hidden.shape[1] - 1))
    ours = ches(*states, *masks, normalised=case.params["length_normalize"])
    agree("ches", ours, case.outputs["ches"])


METHODS: dict[str, Callable[[Case], None]] = {"ches": _check}
NOT_IN_PLACE: dict[str, str] = {}
