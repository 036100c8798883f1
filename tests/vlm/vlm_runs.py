"""Whole runs of the vision-language modality on the embedded base: what tests of stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polyalign.core.cli import main

WORLD = {"world": "scenes", "split": "train", "count": 12}
MULTI_IMAGE = {
    "source": "multi_image",
    "prompts_per_shard": 8,
    "multi_image": {
        "world": "scenes",
        "count": 20,
        "formats": {"sequence": {2: 1, 3: 1}},
        "single": 0.2,
        "filter": {"attention": None, "perplexity": None},
    },
}


def recipe(**changes: Any) -> dict[str, Any]:
    """Twenty questions, three steps."""
    return {
        "modality": "vlm",
        "seed": 3,
        "model": {"base": "tiny", "lora": {"rank": 2}},
        "sampler": {"max_new_tokens": 24, "temperature": 0.0, "batch_size": 8},
        "pairs": MULTI_IMAGE,
        "objective": {"name": "dpo"},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"learning_rate": 1e-3},
            "save_every": 2,
            "threads": 1,
        },
        "evaluate": {
            "prompts": {
                "world": "scenes",
                "split": "heldout",
                "count": 4,
                "pictures": {"sequence": [1, 2]},
                "tasks": ["colour"],
            },
            "judges": [{"name": "scenes"}],
            "attention": 1,
        },
        **changes,
    }


def run(folder: Path, verb: str, content: dict[str, Any], *more: str) -> int:
    """The command line on a recipe; returns its exit code. The run folder is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"run": str(folder / "run"), **content}))
    return main([verb, str(file), *more])
