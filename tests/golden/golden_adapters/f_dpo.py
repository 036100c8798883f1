"""f_dpo.json: the f-DPO authors' losses, in float64 and where they overflow in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_adapters.cases import Case
from golden_adapters.dpo import POLICY, REFERENCE
from golden_adapters.sequences import FLOAT32, agree_pairs, columns, evaluate

from polyalign.core.objectives import build
from polyalign.core.objectives.table_pairs import FDPO

DIVERGENCES: dict[str, Any] = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "jsd": "jensen_shannon",
    "alpha_divergence": "alpha",
}


def _check(case: Case) -> None:
    """Rewards are left out: the original's lack the constant that makes ours 0 at equal likelihoods."""
    dtype = torch.float32 if case.params["dtype"] == "torch.float32" else torch.float64
    objective = build(FDPO(divergence=DIVERGENCES[case.params["divergence"]], alpha=case.params.get("alpha", 0.5)))
    outputs = {name: value for name, value in case.outputs.items() if not name.endswith("_rewards")}
    policy, reference = (columns(case.inputs, names, dtype) for names in (POLICY, REFERENCE))
    result = evaluate(objective, policy, reference, beta=case.params["beta"])
    agree_pairs(outputs, result, **(FLOAT32 if dtype == torch.float32 else {}))


METHODS: dict[str, Callable[[Case], None]] = {"f_dpo": _check}
NOT_IN_PLACE: dict[str, str] = {}
