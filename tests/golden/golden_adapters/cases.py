"""Golden vectors: from a file's ``inputs`` and ``params`` to calls of ours.

Which adapter serves a file is decided by the file's name: ``vectors/NAME.json`` by ``golden_adapters/NAME.py``, which has
``METHODS`` (method -> check of one case) and ``NOT_IN_PLACE`` (method -> why it waits). So another set of vectors with the same
structure runs unchanged.
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
            method = content["params"].get("method", path.stem)
            check = adapter.METHODS.get(method)
            missing = None
            if check is None:
                waits = adapter.NOT_IN_PLACE.get(method, "the adapter of its file does not know this method")
                missing = f"not in place yet: {method} ({waits})"
            name = "-".join([path.stem, f"{number:02d}", method, *_details(content["params"])])
            cases.append(Case(name, content["inputs"], content["params"], content["outputs"], check, missing))
    return cases


def unknown_files(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.glob("*.json")) if _adapter(path.stem) is None]


def _details(params: dict[str, Any]) -> list[str]:
    named = ("loss_type", "norm_type", "halo", "adv_mode", "model", "beta", "beta_dpo", "winner_preserving_mu")
    return [str(params[name]).rsplit("/", 1)[-1] for name in named if params.get(name) is not None]


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
