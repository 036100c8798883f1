"""ofs_dpo.json: the two sides of OFS-DPO, composed from the DPO authors' function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.pairs import pair_batch
from golden_adapters.sequences import columns, token_scores

from polyalign.core.low_rank import combine_low_rank
from polyalign.core.objectives import build
from polyalign.core.objectives.table import DPO
from polyalign.core.objectives.table_groups import OFSDPO


def method_of(content: Mapping[str, Any]) -> str:
    return "combination of adapters" if "lora_A" in content["inputs"] else "two sides"


def _two_sides(case: Case) -> None:
    """Each side is trained by its own objective; the other one has no gradient from it."""
    beta, alpha = case.params["beta"], case.params["alpha"]
    names = {side: (f"{side}_chosen", f"{side}_rejected") for side in ("fast", "slow", "reference")}
    values = {side: columns(case.inputs, pair) for side, pair in names.items()}
    for side, other in (("fast", "slow"), ("slow", "fast")):
        trained, partner = (values[which].clone().requires_grad_(True) for which in (side, other))
        seats = {"policy": trained, "partner": partner, "reference": values["reference"]}
        scores = {seat: token_scores(sums) for seat, sums in seats.items()}
        spec = OFSDPO.model_validate({"name": "ofs_dpo", "side": side, "alpha": alpha})
        outcome = build(spec)(scores, pair_batch(len(trained)), beta=beta)
        outcome.loss.sum().backward()
        agree(f"total_{side}", outcome.loss, case.outputs[f"total_{side}"])
        assert trained.grad is not None and partner.grad is None
        agree(f"grad_{side}_chosen", trained.grad[:, 0], case.outputs[f"grad_{side}_chosen"])
        agree(f"grad_{side}_rejected", trained.grad[:, 1], case.outputs[f"grad_{side}_rejected"])
        alone = {"policy": token_scores(values[side]), "reference": token_scores(values["reference"])}
        agree(f"dpo_{side}", build(DPO())(alone, pair_batch(len(trained)), beta=beta).loss, case.outputs[f"dpo_{side}"])
    chase = {"policy": token_scores(values["fast"]), "reference": token_scores(values["slow"])}
    agree("dpo_fs", build(DPO())(chase, pair_batch(len(values["fast"])), beta=beta).loss, case.outputs["dpo_fs"])


def _combination(case: Case) -> None:
    """Products are combined, not factors, which the file shows to be something else."""
    down, up = tensor(case.inputs["lora_A"]), tensor(case.inputs["lora_B"])
    a, b = combine_low_rank(list(down), list(up), case.params["lambda"])
    agree("delta_W_linear_combination", b @ a, case.outputs["delta_W_linear_combination"])
    assert not torch.allclose(b @ a, tensor(case.outputs["delta_W_of_factor_combination"]))


METHODS: dict[str, Callable[[Case], None]] = {"two sides": _two_sides, "combination of adapters": _combination}
NOT_IN_PLACE: dict[str, str] = {}
