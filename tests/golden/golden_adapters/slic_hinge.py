"""slic_hinge.json: TRL's hinge with a reference, alone and with its sft loss, and CPOTrainer's without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from golden_adapters.cases import Case
from golden_adapters.sequences import agree_pairs, columns, evaluate
from golden_adapters.trl_losses import check_cpo_trainer, check_dpo_trainer, from_table


def method_of(content: Mapping[str, Any]) -> str:
    return "CPOTrainer" if "policy_chosen_logps" in content["inputs"] else "DPOTrainer"


def _without_reference(case: Case) -> None:
    check_cpo_trainer(case)
    policy = columns(case.inputs, ("policy_chosen_logps", "policy_rejected_logps"))
    row = from_table("slic_hf", reduction="sum", margin=1.0)
    agree_pairs(case.outputs, evaluate(row, policy, None, beta=case.params["beta"]))


METHODS: dict[str, Callable[[Case], None]] = {"DPOTrainer": check_dpo_trainer, "CPOTrainer": _without_reference}
NOT_IN_PLACE: dict[str, str] = {}
