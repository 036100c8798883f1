"""What a run ran on: versions, devices, commit. Goes into the run folder's ``environment.json``, so it names no host."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import polyalign

REQUIRED = (
    "torch",
    "numpy",
    "scipy",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "pillow",
    "pyyaml",
    "pydantic",
    "rich",
    "soundfile",
)
"""The packages polyalign does not work without; a test holds them to pyproject.toml."""


def version(distribution: str) -> str | None:
    """The installed version, from the package's metadata and without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions(distributions: Sequence[str] = REQUIRED) -> dict[str, str | None]:
    return {name: version(name) for name in distributions}


def checkout() -> Path | None:
    """The repository's root if polyalign runs from a checkout, None if it runs from an installed wheel."""
    root = Path(polyalign.__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "modalities").is_dir() else None


def git_commit() -> dict[str, Any] | None:
    """``{"commit": SHA, "modified": bool}`` of the checkout; None in a wheel, without git or before the first commit."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return {"commit": commit.strip(), "modified": bool(status.strip())}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def cpu_count() -> int:
    """The cores this process may use, which a container often sets below what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[dict[str, Any]]:
    """What torch can compute on, best first: ``{"kind", "name", "memory_bytes"}``; only the CPU if torch does not import."""
    cpu = {"kind": "cpu", "name": f"{platform.machine()}, {cpu_count()} cores", "memory_bytes": _physical_memory()}
    if version("torch") is None:
        return [cpu]
    torch = importlib.import_module("torch")
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append({"kind": "cuda", "name": properties.name, "memory_bytes": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": "Apple GPU", "memory_bytes": None})
    return [*found, cpu]


def _physical_memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def without_folders(argument: str) -> str:
    """A command-line argument with the folders of absolute paths cut off: 'a=/home/me/x.txt' -> 'a=x.txt'."""

    def last_part(match: re.Match[str]) -> str:
        path = match.group()
        return (PurePosixPath(path) if path[0] in "/~" else PureWindowsPath(path)).name

    return re.sub(r"(?:(?<=[\s=,\[\"'])|^)(?:[A-Za-z]:[\\/]|[/~])[^,\]\"'=]*", last_part, argument)


def snapshot() -> dict[str, Any]:
    """Everything that may explain a difference between two runs; names of hosts and users and absolute paths are left out."""
    torch = importlib.import_module("torch")
    return {
        "polyalign": polyalign.__version__,
        "python": platform.python_version(),
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "packages": versions(),
        "cuda": torch.version.cuda,
        "cpu_count": cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices(),
        "git": git_commit(),
        "argv": [PurePosixPath(sys.argv[0].replace("\\", "/")).name, *map(without_folders, sys.argv[1:])],
    }
