"""Folders of diffusers' audio pipelines, read part by part and written back.

The pipelines themselves are not built: Stable Audio's scheduler needs a further package, and AudioLDM2's text branch helpers
that GPT2Model no longer has. Parts come from safetensors, or from pickles of weights only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

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
    """The network ``name/`` of a folder, a class of diffusers or transformers, in float32, frozen, in evaluation mode.

    Raises:
        UserError: it is not there, cannot be read, has not the tensors of its configuration, or has no weights but a dangerous
            pickle.
    """
    inner = folder / name
    if not inner.is_dir():
        raise UserError(f"{folder} lacks {name}/, its {kind.__name__}")
    if not (inner / "config.json").is_file():
        raise UserError(f"{inner} lacks config.json, which describes its {kind.__name__}")
    _refuse_weights(inner, kind)
    options = {"torch_dtype": torch.float32, "local_files_only": True}
    try:
        found, report = kind.from_pretrained(inner, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{inner} cannot be read as a {kind.__name__}: {said[:300]}. Is its config.json of another model?"
        ) from error
    _refuse_difference(inner, kind, report)
    return found.requires_grad_(False).eval()


def tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer ``name/`` of a folder.

    Raises:
        UserError: it is not there, or is none.
    """
    inner = folder / name
    if not inner.is_dir():
        raise UserError(f"{folder} lacks {name}/, a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(inner, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{inner} cannot be read as a tokenizer: {str(error).strip().splitlines()[0]}") from error


def _refuse_weights(inner: Path, kind: Any) -> None:
    """Refuse what is no file of weights before a library reads it, since few of their messages name the file."""
    tensors = sorted(inner.glob("*.safetensors"))
    pickles = sorted(file for file in inner.iterdir() if file.suffix in PICKLES)
    if not tensors and not pickles:
        raise UserError(f"{inner} lacks weights (a .safetensors file), those of its {kind.__name__}")
    for file in tensors:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from error
    if not tensors:
        for file in pickles:
            refuse_code(file)


def _refuse_difference(inner: Path, kind: Any, report: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the configuration: libraries fill what is missing with noise, or with nothing.
    What transformers finds beyond its class is left out, as a language model's head is where only its states are asked for."""
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{inner}: {tensor} has the shape {tuple(found)}, and its config.json asks for {tuple(wanted)}; is it the "
            "configuration of another model?"
        )
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("position_ids"))
    odd = sorted(report["unexpected_keys"]) if issubclass(kind, ModelMixin) else []
    lacks = f"lacks {len(missing)} tensors of a {kind.__name__}, first {missing[0]}" if missing else ""
    has = f"has {len(odd)} tensors that no {kind.__name__} of its config.json has, first {odd[0]}" if odd else ""
    if missing or odd:
        raise UserError(f"{inner} {' and '.join(part for part in (lacks, has) if part)}")


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
