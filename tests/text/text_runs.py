"""Whole runs of the text modality on an untrained Llama in small: what tests of stages share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.cli import main

LORA = "adapter/adapter_model.safetensors"
RULES = [
    {"rule": "present", "pattern": "[aeiou]", "weight": 2},
    {"rule": "length", "most": 6, "unit": "characters"},
    {"rule": "absent", "pattern": "[A-Z]", "weight": 0.3},
]
JUDGE = {"name": "text_rules", "options": {"rules": RULES}}


def prompts_file(folder: Path, name: str, count: int) -> Path:
    """A prompts file with a task beside every prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": f"{name} {index}: what is it?", "task": ("short", "long")[index % 2]} for index in range(count)]
    return write_lines(folder / f"{name}.jsonl", lines)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def preferences(count: int) -> list[dict[str, Any]]:
    """Rows with an explicit prompt."""
    return [
        {"prompt": f"Question {index}: is it good?", "chosen": f" yes, it is {index}", "rejected": f" no {index} news"}
        for index in range(count)
    ]


def recipe(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Six prompts, three samples of each, three steps; random letters, of which the judge likes vowels."""
    return {
        "modality": "text",
        "seed": 3,
        "model": {"base": str(base), "lora": {"rank": 2}},
        "sampler": {"max_new_tokens": 6, "batch_size": 4},
        "pairs": {
            "prompts": {"file": str(prompts_file(folder, "train", 6))},
            "samples_per_prompt": 3,
            "prompts_per_shard": 4,
            "judges": [JUDGE],
        },
        "objective": {"name": "dpo"},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"learning_rate": 1e-2},
            "save_every": 2,
            "threads": 1,
        },
        "evaluate": {"prompts": {"file": str(prompts_file(folder, "heldout", 5))}, "judges": [JUDGE]},
        **changes,
    }


def of_rows(base: Path, folder: Path, rows: list[Any], **changes: Any) -> dict[str, Any]:
    """A recipe that reads preferences and keeps a third of the prompts aside."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_lines(folder / "rows.jsonl", rows)
    pairs = {"source": "jsonl", "path": str(path), **changes.pop("pairs", {})}
    evaluate = {"held_out": 0.35, "judges": [JUDGE], **changes.pop("evaluate", {})}
    return recipe(base, folder, pairs=pairs, evaluate=evaluate, **changes)


def write_recipe(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def polyalign(verb: str, config: Path, run: Path, *overrides: str) -> int:
    """A command in this process; returns its exit code."""
    return main([verb, str(config), *overrides, "--run", str(run)])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
