"""Whole runs of the image modality on an untrained base of the embedded architecture: what tests of stages share."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.cli import main
from polyalign.datasets.worlds import shapes
from polyalign.modalities.image import tiny_architecture

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")
LORA = "adapter/pytorch_lora_weights.safetensors"


def save_base(folder: Path) -> Path:
    """A diffusers folder of a Stable Diffusion XL in small, with random weights."""
    words = {word for opening in shapes.OPENINGS for prompt in shapes.all_prompts() for word in (opening + prompt).split()}
    tiny_architecture.build(sorted(words), seed=7).save_pretrained(folder)
    return folder


def recipe(base: Path, **changes: Any) -> dict[str, Any]:
    """Six prompts, two samples of each, three steps. Random pictures have no right and wrong, so saturation is the judge."""
    return {
        "modality": "image",
        "seed": 3,
        "model": {"base": str(base), "lora": {"rank": 2}},
        "sampler": {"scheduler": "ddim", "steps": 2, "guidance": 1.5, "batch_size": 8, "vae_batch_size": 8},
        "pairs": {
            "prompts": {"world": "shapes", "split": "train", "count": 6},
            "samples_per_prompt": 2,
            "prompts_per_shard": 4,
            "judges": [{"name": "saturation"}],
        },
        "objective": {"name": "dpo", "beta": {"value": 500}},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"learning_rate": 1e-3},
            "save_every": 2,
            "threads": 1,
        },
        "evaluate": {
            "prompts": {"world": "shapes", "split": "heldout", "count": 4},
            "judges": [{"name": "saturation"}, {"name": "shapes"}],
        },
        **changes,
    }


def write_recipe(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def polyalign(verb: str, config: Path, run: Path, *overrides: str) -> int:
    """A command in this process; returns its exit code."""
    return main([verb, str(config), *overrides, "--run", str(run)])


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def only_generated(source: Path, run: Path) -> Path:
    """A new run folder that has the pairs of ``source``, and nothing else of it."""
    import shutil

    run.mkdir(parents=True)
    shutil.copytree(source / "pairs", run / "pairs")
    shutil.copy(source / "config.yaml", run / "config.yaml")
    ledger = json.loads((source / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({"generate": ledger["generate"]}))
    return run


def script(config: Path, run: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The training as a command of its own."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [*start, "polyalign.modalities.image.train", str(config), f"run={run}", *overrides]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
