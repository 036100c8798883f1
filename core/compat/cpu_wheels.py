"""Make torchvision and torchaudio wheels that were built for CUDA importable next to a CPU torch.

Where no CPU build of the two is on offer, pip installs builds whose compiled extension asks for CUDA libraries. Their
Python code is whole, but it does not import: torchvision registers a fake kernel for an operator (``torchvision::nms``)
that its unloaded extension was to define, and torchaudio does not catch the failed load. Once such a package is
installed, transformers, diffusers and open_clip do not import either, since they import it as soon as they find it.

Nothing is imported and nothing is changed until somebody imports torchvision or torchaudio; the repair then takes place
only if torch has neither CUDA nor HIP and the extension really does not load. What a repaired package still lacks are the
compiled operators: ``torchvision.ops.nms``, ``torchvision.io`` decoders, ``torchaudio.load`` and ``rnnt_loss``.
``POLYALIGN_CPU_WHEELS=off`` in the environment turns all of it off.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SWITCH = "POLYALIGN_CPU_WHEELS"
PACKAGES = ("torchvision", "torchaudio")

_repaired: dict[str, str] = {}
_kept_alive: list[Any] = []  # a torch.library.Library undoes its definitions when it is collected


class _Finder:
    """Meta-path finder for exactly one module: lets the other finders find it and puts ``wrap`` around its execution."""

    def __init__(self, name: str, wrap: Callable[[ModuleSpec, Callable[[ModuleType], None]], Callable[[ModuleType], None]]):
        self.name = name
        self.wrap = wrap

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # the loader stays the same object, so resources and sources are still found
                    spec.loader.exec_module = self.wrap(spec, spec.loader.exec_module)
                return spec
        return None


def arm() -> tuple[str, ...]:
    """Put the finders in place; returns the packages that will be repaired if they are imported and turn out broken.

    Costs no import of the packages. A package that is already imported is left alone, as is everything when the
    switch is off; calling it twice changes nothing.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return ()
    wanted = {
        "torchvision": _Finder("torchvision", _wrap_torchvision),
        "torchaudio": _Finder("torchaudio._extension.utils", _wrap_torchaudio),
    }
    placed = {finder.name for finder in sys.meta_path if isinstance(finder, _Finder)}
    armed = [package for package in PACKAGES if package not in sys.modules]
    sys.meta_path[:0] = [wanted[package] for package in armed if wanted[package].name not in placed]
    return tuple(armed)


def repaired() -> dict[str, str]:
    """What was repaired so far in this process: package -> what was wrong with it."""
    return dict(_repaired)


def _torch_is_cpu_only() -> bool:
    torch = importlib.import_module("torch")
    return torch.version.cuda is None and torch.version.hip is None


def _wrap_torchvision(spec: ModuleSpec, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        if _torch_is_cpu_only():
            fault = _torchvision_fault(spec.submodule_search_locations or ())
            if fault is not None:
                define_torchvision_operators()
                _repaired["torchvision"] = fault
        execute(module)

    return exec_module


def _torchvision_fault(folders: Sequence[str]) -> str | None:
    """Why torchvision's extension does not load, or None if it does (torch must be imported: it links to its libraries)."""
    import ctypes

    names = [
        os.path.join(folder, name)
        for folder in folders
        for name in sorted(os.listdir(folder))
        if name.startswith("_C") and name.endswith((".so", ".pyd"))
    ]
    if not names:
        return "its compiled operators are not in the package"
    try:
        ctypes.CDLL(names[0])
    except OSError as error:
        return f"its compiled operators do not load ({_without_path(error)})"
    return None


def define_torchvision_operators() -> None:
    """Define ``torchvision::nms`` and ``torchvision::qnms``, and a CPU kernel for the first, if nobody has."""
    torch = importlib.import_module("torch")
    if _kept_alive or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", suppress_overlapping, "CPU")
    _kept_alive.append(library)


def suppress_overlapping(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Greedy non-maximum suppression in plain torch.

    Boxes are visited by falling score; one is kept if its intersection over union with every kept box is at most
    ``iou_threshold``.

    Args:
        dets: (N, 4) corners x1, y1, x2, y2 in pixels.
        scores: (N,).

    Returns:
        (M,) int64 indices of the kept boxes, by falling score.
    """
    torch = importlib.import_module("torch")
    area = (dets[:, 2:] - dets[:, :2]).prod(dim=1)
    order = scores.sort(descending=True, stable=True).indices
    kept = []
    while order.numel():
        first, rest = order[0], order[1:]
        kept.append(first)
        low = torch.maximum(dets[first, :2], dets[rest, :2])
        high = torch.minimum(dets[first, 2:], dets[rest, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        order = rest[shared <= iou_threshold * (area[first] + area[rest] - shared)]
    return torch.stack(kept) if kept else order


def _wrap_torchaudio(spec: ModuleSpec, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        if not _torch_is_cpu_only():
            return
        load: Callable[[str], bool] = module.__dict__["_load_lib"]

        def load_or_do_without(library: str) -> bool:
            try:
                return load(library)
            except OSError as error:
                _repaired["torchaudio"] = f"its compiled operators do not load ({_without_path(error.__cause__ or error)})"
                return False

        module.__dict__["_load_lib"] = load_or_do_without

    return exec_module


def _without_path(error: BaseException) -> str:
    """The loader's message with the folders cut off: 'libcudart.so.13: cannot open shared object file: ...'."""
    return " ".join(os.path.basename(word) if os.sep in word else word for word in str(error).split())
