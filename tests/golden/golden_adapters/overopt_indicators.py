"""overopt_indicators.json: mass and entropy of the k likeliest next tokens, by an independent evaluation."""

from __future__ import annotations

from collections.abc import Callable

from golden_adapters.cases import Case, agree, tensor

from polyalign.core.diagnostics import top_k


def _check(case: Case) -> None:
    found = top_k(tensor(case.inputs["logits"]), tensor(case.inputs["mask"]).bool(), k=case.params["k"])
    named = {
        "topk_mass": found.mass,
        "topk_entropy_unnormalised": found.entropy,
        "topk_entropy_renormalised": found.renormalised,
    }
    for name, values in named.items():
        agree(f"{name}_per_token", values, case.outputs[f"{name}_per_token"])
        agree(f"{name}_mean", found.mean(values), case.outputs[f"{name}_mean"])
        if f"{name}_base2_mean" in case.outputs:
            agree(f"{name}_base2_mean", found.mean_bits(values), case.outputs[f"{name}_base2_mean"])


METHODS: dict[str, Callable[[Case], None]] = {"overopt_indicators": _check}
NOT_IN_PLACE: dict[str, str] = {}
