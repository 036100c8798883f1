"""Checkpoints that are there whole or not at all.

    checkpoints/step-000100/
        state.json               step, what the algorithm keeps, the settings it was made with, size and hash of the other files
        <network>.safetensors    trainable weights only
        <network>.optimizer.pt   optimiser state, tensors and plain numbers (loads with ``weights_only=True``)
        algorithm.safetensors    tensors that the algorithm keeps, for instance an averaged reference

A folder is written under a temporary name, every file fsynced, and renamed; so a kill or a power cut at any moment leaves
either the whole checkpoint or the one before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
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
from polyalign.core.files import Manifest, disk_full_explained, sha256_of

PARTIAL = ".partial"
REMOVED = ".removed"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on the disk."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    def weights(self, name: str) -> dict[str, Tensor]:
        with self._sound(f"{name}.safetensors") as path:
            return load_file(path)

    def optimizer(self, name: str) -> dict[str, Any]:
        with self._sound(f"{name}.optimizer.pt") as path:
            return torch.load(path, map_location="cpu", weights_only=True)

    def algorithm(self) -> dict[str, Any]:
        """What ``Algorithm.state_dict`` gave, tensors and all."""
        tensors: dict[str, Tensor] = {}
        if "algorithm.safetensors" in self.state["files"]:
            with self._sound("algorithm.safetensors") as path:
                tensors = load_file(path)
        return join_tensors(self.state["algorithm"], tensors)

    @contextlib.contextmanager
    def _sound(self, name: str) -> Iterator[Path]:
        """Yields the path of a file to be read.

        Raises:
            UserError: it is not what was written, or cannot be read. A pickle with code in it is such a file; nothing is run.
        """
        path = self.folder / name
        remedy = (
            f"Move {self.folder} away and run the same command again: training goes on from the checkpoint before it, or "
            "starts anew where there is none."
        )
        written = self.state.get("sha256", {}).get(name)
        if written is not None and sha256_of(path) != written:
            raise UserError(f"{path}: is damaged; its content is not what was written. {remedy}")
        try:
            yield path
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}). {remedy}") from error


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
    final = root / f"step-{step:06d}"
    with disk_full_explained(f"the checkpoint {final}"), whole_folder(final) as folder:
        for name, tensors in weights.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        for name, state in optimizers.items():
            with open(folder / f"{name}.optimizer.pt", "wb") as file:
                torch.save(dict(state), file)
        plain, tensors = split_tensors(algorithm)
        if tensors:
            save_file(tensors, folder / "algorithm.safetensors")
        written = sorted(folder.iterdir())
        state = {
            "step": step,
            "files": {path.name: path.stat().st_size for path in written},
            "sha256": {path.name: sha256_of(path) for path in written},
            "algorithm": plain,
            "identity": dict(identity),
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
    for left in root.glob(f".step-*{REMOVED}"):  # by a kill
        shutil.rmtree(left)
    for old in complete(root)[:-keep]:
        aside = old.folder.with_name(f".{old.folder.name}{REMOVED}")
        old.folder.rename(aside)  # at once, so that a kill leaves no half of a checkpoint under its name
        shutil.rmtree(aside)
    return final


def complete(root: Path) -> list[Checkpoint]:
    """The whole checkpoints under ``root``, oldest first. A folder with a missing or short file is passed over."""
    found = [checkpoint for checkpoint in _found(root).values() if isinstance(checkpoint, Checkpoint)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    found = complete(root)
    return found[-1] if found else None


def damaged(root: Path) -> dict[Path, str]:
    """The folders under ``root`` that :func:`complete` passes over, and what is wrong with each. One whose writing was broken
    off is not among them: it never was a checkpoint."""
    return {folder: found for folder, found in _found(root).items() if isinstance(found, str)}


def _found(root: Path) -> dict[Path, Checkpoint | str]:
    folders = sorted(root.glob("step-*")) if root.is_dir() else []
    return {folder: _read(folder) for folder in folders if re.fullmatch(r"step-\d{6,}", folder.name)}


def _read(folder: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        sizes, step, _ = state["files"], int(state["step"]), (state["algorithm"], state["identity"])
    except FileNotFoundError:
        return "state.json is missing"
    except (ValueError, KeyError, TypeError):
        return "state.json is damaged"
    wrong = Manifest({name: {"bytes": size} for name, size in sizes.items()}).damage(folder)
    return next((f"{name} {what}" for name, what in wrong.items()), Checkpoint(folder, step, state))


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
