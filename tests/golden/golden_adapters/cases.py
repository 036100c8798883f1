"""Golden vectors: from a file's ``inputs`` and ``params`` to calls of ours.

Which adapter serves a file is decided by the file's name: ``vectors/NAME.json`` by ``golden_adapters/NAME.py``, which has
``METHODS`` (method -> check of one case), ``NOT_IN_PLACE`` (method -> why it waits) and, where needed, ``NOT_COMPARED``
(method -> why ours is meant to differ, or there is nothing right to compare with). A case's method stands in its ``params``,
or is what the adapter's ``method_of(content)`` says. So another set of vectors with the same structure runs unchanged.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
NUMBER_STRINGS = ("inf", "-inf", "nan")


@dataclass(frozen=True)
class Case:
    """One golden case; ``missing`` is why it cannot be checked yet, or None."""

    id: str
    inputs: dict[str, Any]
    params: dict[str, Any]
    outputs: dict[str, Any]
    check: Callable[[Case], None] | None
    missing: str | None


def _adapter(stem: str) -> ModuleType | None:
    if not (HERE / f"{stem}.py").is_file():
        return None
    return importlib.import_module(f"golden_adapters.{stem}")


def load_cases(folder: Path) -> list[Case]:
    """Every case of every known file in ``folder``, in order, with readable ids: file, method, number, description."""
    cases = []
    for path in sorted(folder.glob("*.json")):
        adapter = _adapter(path.stem)
        if adapter is None:
            continue
        for number, content in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"]):
            named = content["params"].get("method", path.stem)
            method = adapter.method_of(content) if hasattr(adapter, "method_of") else named
            check = adapter.METHODS.get(method)
            missing = None if check else _why_not(adapter, method)
            name = "-".join([path.stem, f"{number:02d}", method, *_details(content["params"])])
            cases.append(Case(name, content["inputs"], content["params"], content["outputs"], check, missing))
    return cases


def _why_not(adapter: ModuleType, method: str) -> str:
    differs = getattr(adapter, "NOT_COMPARED", {}).get(method)
    if differs is not None:
        return f"not compared: {method} ({differs})"
    waits = adapter.NOT_IN_PLACE.get(method, "the adapter of its file does not know this method")
    return f"not in place yet: {method} ({waits})"


def unknown_files(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.glob("*.json")) if _adapter(path.stem) is None]


def _details(params: dict[str, Any]) -> list[str]:
    named = ("loss_type", "divergence", "norm_type", "halo", "adv_mode", "model", "tag", "beta", "beta_dpo", "ld_alpha")
    shown = [params[name] for name in (*named, "winner_preserving_mu") if params.get(name) is not None]
    return ["+".join(value) if isinstance(value, list) else str(value).rsplit("/", 1)[-1] for value in shown]


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor from nested lists, with "inf", "-inf" and "nan" read as numbers."""

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [read(item) for item in value]
        return float(value) if isinstance(value, str) and value in NUMBER_STRINGS else value

    return torch.tensor(read(values), dtype=dtype)


def agree(name: str, ours: Tensor | float, golden: Any, *, rtol: float = 1e-6, atol: float = 1e-12) -> None:
    """Assert that ``ours`` equals ``golden`` wherever that is finite, and that it is a number where the original overflows."""
    actual = torch.as_tensor(ours, dtype=torch.float64).detach()
    expected = tensor(golden)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert not bool(actual.isnan().any()), f"{name}: nan"
    finite = expected.isfinite()
    off = (actual - expected)[finite].abs() - rtol * expected[finite].abs() - atol
    worst = float(off.max()) if off.numel() else -math.inf
    assert worst <= 0.0, f"{name}: {actual.tolist()} against {expected.tolist()}"
