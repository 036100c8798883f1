"""modpo.json: the MODPO authors' loss with one and two margin rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from golden_adapters.cases import Case
from golden_adapters.dpo import POLICY, REFERENCE
from golden_adapters.pairs import pair_batch
from golden_adapters.sequences import agree_pairs, columns, evaluate

from polyalign.core.objectives import build
from polyalign.core.objectives.table_pairs import MODPO


def _check(case: Case) -> None:
    own, *others = case.params["w"]
    rewards = columns(case.inputs, ("chosen_margin_reward", "rejected_margin_reward"))  # (G, 2, R)
    margins = (rewards * rewards.new_tensor(others)).sum(-1)
    loss = {"sigmoid": "logistic", "hinge": "hinge"}[case.params["loss_type"]]
    result = evaluate(
        build(MODPO.model_validate({"name": "modpo", "weight": own, "loss": loss})),
        columns(case.inputs, POLICY),
        columns(case.inputs, REFERENCE),
        beta=case.params["beta"],
        batch=replace(pair_batch(len(margins)), margins=margins),
    )
    agree_pairs(case.outputs, result)


METHODS: dict[str, Callable[[Case], None]] = {"modpo": _check}
NOT_IN_PLACE: dict[str, str] = {}
