"""Files of weights: what counts as one, its hash, and pickles that are no weights."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from polyalign.core.errors import UserError, reason_of

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def weight_files(folder: Path) -> list[Path]:
    """The weights of a diffusers folder, in a fixed order."""
    return sorted(file for file in folder.glob("*/*") if file.suffix in (".safetensors", *PICKLES))


def refuse_code(file: Path) -> None:
    """Read a pickle with ``weights_only`` and drop it.

    Raises:
        UserError: it asks for anything but tensors, or cannot be read.
    """
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is refused: it is a pickle that holds more than weights, or it is damaged "
            f"({reason_of(error)}). Reading it could run code. Take the .safetensors version of this model."
        ) from error


def hash_of(files: Iterable[Path]) -> str:
    """First 16 hexadecimal digits of SHA-256 over the files' bytes and their place in the folder."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.parent.name}/{file.name}".encode())
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a pickle read with ``weights_only``; from one that wraps them under
    ``state_dict``, those.

    Raises:
        UserError: it asks for anything but tensors, is damaged, or holds no table of tensors.
    """
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is refused: it is a pickle that holds more than weights, or it is damaged ({str(error).splitlines()[0]}). "
            "Reading it could run code."
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{file} holds no table of named tensors")
    return dict(found)
