"""Checkpoints that are there whole or not at all.

    checkpoints/step-000100/
        state.json               step, what the algorithm keeps, the settings it was made with, size of every other file
        <network>.safetensors    trainable weights only
        <network>.optimizer.pt   optimiser state, tensors and plain numbers (loads with ``weights_only=True``)
        algorithm.safetensors    tensors that the algorithm keeps, for instance an averaged reference

A folder is written under a temporary name, every file fsynced, and renamed; so a kill or a power cut at any moment leaves
either the whole checkpoint or the one before it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyalign.core.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PARTIAL = ".partial"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on the disk."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def optimizer(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}.optimizer.pt", map_location="cpu", weights_only=True)

    def algorithm(self) -> dict[str, Any]:
        """What ``Algorithm.state_dict`` gave, tensors and all."""
        path = self.folder / "algorithm.safetensors"
        tensors = load_file(path) if path.exists() else {}
        return join_tensors(self.state["algorithm"], tensors)


def save(
    root: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
    algorithm: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``root/step-NNNNNN`` and remove all but the newest ``keep`` checkpoints.

    Args:
        weights: trainable tensors of each network, on the CPU.
        optimizers: ``state_dict`` of each network's optimiser.
        algorithm: nested dict of numbers, strings, lists and tensors.
        identity: the settings that a resumed run must share.

    Raises:
        UserError: the disk is full; the checkpoints that were there are untouched.
    """
    with disk_errors(root), whole_folder(root / f"step-{step:06d}") as folder:
        for name, tensors in weights.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        for name, state in optimizers.items():
            with open(folder / f"{name}.optimizer.pt", "wb") as file:
                torch.save(dict(state), file)
        plain, tensors = split_tensors(algorithm)
        if tensors:
            save_file(tensors, folder / "algorithm.safetensors")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        state = {"step": step, "files": files, "algorithm": plain, "identity": dict(identity)}
        (folder / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
    for old in complete(root)[:-keep]:
        shutil.rmtree(old.folder)
    return root / f"step-{step:06d}"


def complete(root: Path) -> list[Checkpoint]:
    """The whole checkpoints under ``root``, oldest first. A folder with a missing or short file is passed over."""
    found = []
    for folder in sorted(root.glob("step-*")) if root.is_dir() else []:
        checkpoint = _read(folder)
        if checkpoint is not None:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    found = complete(root)
    return found[-1] if found else None


def _read(folder: Path) -> Checkpoint | None:
    if not re.fullmatch(r"step-\d{6,}", folder.name) or not (folder / "state.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files, step = state["files"], int(state["step"])
    except (ValueError, KeyError, TypeError):
        return None
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())
    return Checkpoint(folder, step, state) if whole else None


def refuse_other_settings(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the checkpoint was made with other settings; the keys and both values are named.
    """
    differing = differences(checkpoint.state["identity"], identity)
    if differing:
        raise UserError(
            f"{checkpoint.folder} was made with other settings, so training cannot go on from it:\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nPut the old values back to go on, choose another run folder, or start this one anew (the old checkpoints "
            "are then moved aside, not deleted)."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every leaf that differs between two nested dicts."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def set_aside(path: Path) -> None:
    """Rename ``path`` to the first free ``NAME.before-N``, so that starting anew loses nothing."""
    if path.exists():
        number = 1
        while path.with_name(f"{path.name}.before-{number}").exists():
            number += 1
        path.rename(path.with_name(f"{path.name}.before-{number}"))


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``final`` when the block ends, and is removed when the block fails."""
    temporary = final.with_name(final.name + PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            fsync(path)
        fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(final.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened for it on Windows, where the rename is enough."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk into a :class:`UserError`, in each of the three forms in which libraries report it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_full_disk(error):
            raise
        free = shutil.disk_usage(where if where.exists() else where.parent).free
        raise UserError(
            f"there is no room to write under {where} ({free / 1e9:.2f} GB free, or a quota or file-size limit is reached). "
            "What was complete before is untouched. Free some space, or lower train.keep_checkpoints, and run the same "
            "command again: it goes on from the last checkpoint."
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    if isinstance(error, SafetensorError):  # carries the number in its text only
        number = re.search(r"os error (\d+)", str(error))
        return number is not None and int(number[1]) in FULL_DISK
    return error.__context__ is not None and _is_full_disk(error.__context__)  # torch.save hides the OSError behind its own


def split_tensors(nested: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A nested dict as (the same without its tensors, the tensors by their path joined with "/")."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in nested.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach().cpu().contiguous()
        elif isinstance(value, Mapping):
            plain[key], inner = split_tensors(value, f"{prefix}{key}/")
            tensors |= inner
        else:
            plain[key] = value
    return plain, tensors


def join_tensors(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The inverse of :func:`split_tensors`; sub-dicts are visited along ``plain``, which keeps them all."""
    joined: dict[str, Any] = {}
    for key, value in plain.items():
        joined[key] = join_tensors(value, tensors, f"{prefix}{key}/") if isinstance(value, Mapping) else value
    for path, tensor in tensors.items():
        rest = path.removeprefix(prefix)
        if path.startswith(prefix) and not any(rest.startswith(f"{key}/") for key in joined):
            joined[rest] = tensor
    return joined
