"""Folders of diffusers' audio pipelines, read part by part and written back.

The pipelines themselves are not built: Stable Audio's scheduler needs a further package, and AudioLDM2's text branch helpers
that transformers 5 no longer has. Parts come from safetensors, or from pickles of weights only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from polyalign.core.errors import UserError
from polyalign.modalities.checkpoint_files import PICKLES, refuse_code


def described_class(folder: Path) -> str | None:
    """The pipeline that ``model_index.json`` names; None if there is no such file.

    Raises:
        UserError: it names none.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} names no pipeline ({error})") from error


def component(kind: Any, folder: Path, name: str) -> Any:
    """The part ``name`` of a folder, a class of diffusers or transformers, in float32, frozen, in evaluation mode.

    Raises:
        UserError: it is not there, cannot be read, lacks tensors, or its only weights are a dangerous pickle.
    """
    inner = folder / name
    if not inner.is_dir():
        raise UserError(f"{folder} lacks {name}/, its {kind.__name__}")
    weights = [file for file in inner.iterdir() if file.suffix in (".safetensors", *PICKLES)]
    if not any(file.suffix == ".safetensors" for file in weights):
        for file in weights:
            refuse_code(file)
    options: dict[str, Any] = {"torch_dtype": torch.float32} if issubclass(kind, nn.Module) else {}
    try:
        found = kind.from_pretrained(inner, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{inner} cannot be read as a {kind.__name__}: {str(error).strip().splitlines()[0]}") from error
    return found.requires_grad_(False).eval() if isinstance(found, nn.Module) else found


def scheduler_config(folder: Path) -> dict[str, Any]:
    """``scheduler/scheduler_config.json``.

    Raises:
        UserError: it is not there, or no JSON.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} lacks a readable scheduler/scheduler_config.json ({error})") from error


def write(source: Path, denoiser: Any, name: str, target: Path) -> None:
    """The folder ``source`` with another denoiser in ``name/``: everything else is copied as it is."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = file.relative_to(source)
        if place.parts[0] == name or any(part.startswith(".") for part in place.parts) or place.name == "README.md":
            continue
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / place)
    denoiser.save_pretrained(target / name, safe_serialization=True)
