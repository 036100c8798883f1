"""ld_dpo.json: TRL's ld_alpha with the sigmoid, hinge and IPO losses."""

from __future__ import annotations

from collections.abc import Callable

from golden_adapters.cases import Case
from golden_adapters.trl_losses import check_dpo_trainer, check_rows, from_table


def _check(case: Case) -> None:
    check_dpo_trainer(case)
    if case.params["loss_type"] == ["sigmoid"]:
        check_rows(case, from_table("ld_dpo", alpha=case.params["ld_alpha"]), case.params["beta"])


METHODS: dict[str, Callable[[Case], None]] = {"ld_dpo": _check}
NOT_IN_PLACE: dict[str, str] = {}
