"""Where a judge's weights are, and how they are read: a local path first, else a repository of the model hub.

``where`` is what a recipe says: a folder, a file, a hub id (``owner/name``) or a file in a hub repository
(``owner/name/file.pt``). Weights are read from safetensors, or from pickles with ``weights_only``; no code from a model's
repository is ever run. Only the recipe's author names these places: nothing here is taken from data.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from polyalign.core.errors import UserError, reason_of

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)/([\w.+/ -]+)")
SETTINGS = ("*.json", "*.txt")
"""Of a hub repository: configurations and vocabularies."""
KINDS = frozenset({".json", ".txt", ".safetensors", ".bin", ".pt", ".pth"})
SAFE, PICKLED = ("model*.safetensors",), ("pytorch_model*.bin",)
"""Of a hub repository: the weights transformers reads, first choice and second."""


def check(where: str, option: str) -> None:
    """Raise UserError unless ``where`` is on this machine or could be on the hub; nothing is downloaded or read."""
    if not isinstance(where, str) or not where:
        raise UserError(f"{option} is {where!r}; give a folder, a file, or a hub id (owner/name or owner/name/file)")
    if Path(where).expanduser().exists():
        return
    parts = where.split("/")
    if HUB_ID.fullmatch(where) or (HUB_FILE.fullmatch(where) and ".." not in parts and "" not in parts):
        return
    raise UserError(
        f"{option} is {where!r}: there is no such file or folder, and it is no hub id (owner/name, or owner/name/file for one "
        "file of a repository)"
    )


def folder(where: str, option: str, *, weights: bool, revision: str | None = None) -> Path:
    """A folder in transformers' layout: the local one, or a snapshot of the hub repository (without weights unless asked).

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    check(where, option)
    local = Path(where).expanduser()
    if local.is_dir():
        return local
    if local.exists() or not HUB_ID.fullmatch(where):
        raise UserError(
            f"{option} is {where!r}: a folder (or a hub id owner/name) is needed here, with config.json and weights"
        )
    found = _fetched(where, option, revision, patterns=[*SETTINGS, *(SAFE if weights else ())])
    if weights and not any(found.glob(SAFE[0])):
        found = _fetched(where, option, revision, patterns=[*SETTINGS, *PICKLED])
    return found


def file(where: str, option: str, *, published: str | None = None, revision: str | None = None) -> Path:
    """One file: the local one, ``published`` (a file name) in a local folder or hub repository, or the file of a hub repository
    that ``where`` names.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    check(where, option)
    local = Path(where).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if published is not None and (local / published).is_file():
            return local / published
        expected = f"there is no {published} in it" if published else "give the file itself"
        raise UserError(f"{option} is {where!r}, a folder: {expected}")
    if HUB_ID.fullmatch(where):
        if published is None:
            raise UserError(f"{option} is {where!r}: say which file of that repository, as {where}/FILE")
        return _fetched(where, option, revision, name=published)
    named = HUB_FILE.fullmatch(where)
    assert named is not None  # check() let it through
    return _fetched(named[1], option, revision, name=named[2])


def local(where: str) -> list[Path]:
    """The files that a place on this machine has for a judge, in a fixed order; none if it is on the hub."""
    place = Path(where).expanduser()
    if place.is_file():
        return [place]
    return sorted(path for path in place.glob("*") if path.suffix in KINDS and path.is_file())


def weight_files(where: Path, *, safetensors: bool = False) -> list[Path]:
    """What transformers would read of a folder: its safetensors, else its pickles (unless ``safetensors`` alone are taken); of
    a file, the file.

    Raises:
        UserError: the folder has neither.
    """
    if where.is_file():
        return [where]
    for patterns in (SAFE,) if safetensors else (SAFE, PICKLED):
        if found := sorted(path for pattern in patterns for path in where.glob(pattern)):
            return found
    expected = SAFE[0] if safetensors else f"{SAFE[0]} or {PICKLED[0]}"
    raise UserError(f"{where} has no weights: {expected} is expected there, beside config.json")


def digest(paths: Sequence[Path]) -> str:
    """First 16 hexadecimal digits of SHA-256 over the files' names and bytes."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


def identity(where: str, paths: Sequence[Path]) -> str:
    """What a run records of weights: their name without folders of this machine, and their hash."""
    name = Path(where).expanduser().resolve().name if Path(where).expanduser().exists() else where
    return f"{name}@sha256:{digest(paths)}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, or of a pickle read with ``weights_only``; those under ``state_dict`` or ``model`` if it
    has such a key, as training checkpoints do. Names lose the ``module.`` of data-parallel training.

    Raises:
        UserError: unreadable, cut short, more than weights, or no weights at all.
    """
    try:
        content: Any = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is refused: it is damaged, or a pickle that holds more than weights, and reading that could run code "
            f"({reason_of(error)})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights: a dictionary of tensors, or one under 'state_dict', is expected")
    return {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def fill(network: nn.Module, weights: Mapping[str, torch.Tensor], what: str, *, extras: bool = False) -> None:
    """Put weights into a network in place; all of its tensors must be there, in their shapes, and none may be left over
    unless ``extras`` are passed over, as the published code of some judges does.
    ``position_ids`` are passed over: a constant that old checkpoints carry and transformers 5 no longer lists.

    Raises:
        UserError: names the first few tensors that are absent, left over or of another shape.
    """
    own, weights = (
        {name: value for name, value in side.items() if not name.endswith("position_ids")}
        for side in (network.state_dict(), weights)
    )
    absent, strange = sorted(own.keys() - weights.keys()), sorted(() if extras else weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    for problem, names in (("lacks", absent), ("has besides", strange), ("has another shape of", shapes)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{what} is not in the published layout: it {problem} {', '.join(names[:3])}{rest}")
    network.load_state_dict(weights, strict=False)


def settings(path: Path) -> dict[str, Any]:
    """A JSON file as a dictionary.

    Raises:
        UserError: it is absent or unreadable.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def _fetched(
    repository: str, option: str, revision: str | None, *, patterns: list[str] | None = None, name: str | None = None
) -> Path:
    try:
        if name is not None:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        what = repository if name is None else f"{name} of {repository}"
        raise UserError(
            f"{option}: {what} could not be fetched from the model hub ({reason_of(error)}). Check the name and the network, "
            "or give a folder or file that is on this machine."
        ) from error
