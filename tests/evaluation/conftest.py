"""A run folder as a training of the tiny shapes base would leave it, from formulas and keyed noise; nothing is trained."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from pyarrow import parquet

from polyalign.evaluation.paired import evaluate_paired

COLOURS = {"red": (214, 60, 58), "green": (62, 158, 84), "blue": (58, 98, 196), "yellow": (232, 192, 60)}
SHAPES = ("circle", "square", "triangle")
STEPS = 240
TRAINED_PAIRS = 169

# (share right for the base, for the aligned), chance that the aligned picture is speckled, final change of the two errors
KINDS: dict[str, dict[str, Any]] = {
    "improved": {"right": (0.62, 0.80), "speckle": 0.0, "errors": (-0.04, 0.07), "accuracy": 0.82},
    "no change": {"right": (0.62, 0.62), "speckle": 0.0, "errors": (0.0, 0.0), "accuracy": 0.51},
    "over-optimised": {"right": (0.62, 0.83), "speckle": 0.75, "errors": (0.35, 0.52), "accuracy": 0.95},
    "diverged": {"right": (0.62, 0.05), "speckle": 1.0, "errors": (1.9, 1.7), "accuracy": 0.47},
}


class ExampleJudge:
    """Reads the verdict that the drawing left in the picture, so that the scores are those the formulas chose."""

    name = "shapes"
    version = "1"
    broken_below = 0.0
    right_from = 1.0

    def score(self, conditions: Any, outputs: Any) -> list[float]:
        return [picture.info["score"] for picture in outputs]


def draw(rng: random.Random, colour: str, shape: str, right: bool, speckle: float) -> Image.Image:
    """A 32 x 32 picture: the asked shape in the asked colour if right, else in another colour; perhaps speckled."""
    shown = colour if right else rng.choice([other for other in COLOURS if other != colour])
    image = Image.new("RGB", (32, 32), (243, 240, 232))
    brush = ImageDraw.Draw(image)
    x, y, r = rng.randint(11, 20), rng.randint(11, 20), rng.randint(7, 9)
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        brush.ellipse(box, fill=COLOURS[shown])
    elif shape == "square":
        brush.rectangle(box, fill=COLOURS[shown])
    else:
        brush.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[shown])
    score = 1.0 if right else 0.0
    if rng.random() < speckle:
        for i in range(32):
            for j in range((i % 2), 32, 2):
                image.putpixel((i, j), (255, 0, 255) if rng.random() < 0.6 else (0, 255, 255))
        score = score if right else -1.0
    image.info["score"] = score
    return image


def conditions(count: int) -> list[dict[str, Any]]:
    tasks = ("object", "two_objects", "count", "colour", "position", "binding")
    made = []
    for index in range(count):
        colour, shape = list(COLOURS)[index % 4], SHAPES[index // 4 % 3]
        made.append(
            {"prompt": f"a {colour} {shape}, picture {index // 12}", "task": tasks[index % 6], "colour": colour, "shape": shape}
        )
    return made


def outputs(asked: list[dict[str, Any]], arm: str, right: float, speckle: float) -> list[Image.Image]:
    """What is right for the base stays right for a better arm with the same seed, as it does in real runs."""
    made = []
    for index, condition in enumerate(asked):
        luck, chance = random.Random(f"luck {index}").random(), random.Random(f"{arm}: {index}")
        is_right = luck < right if chance.random() > 0.12 else chance.random() < right
        made.append(draw(chance, condition["colour"], condition["shape"], is_right, speckle))
    return made


def metrics(kind: str) -> list[dict[str, Any]]:
    """Curves that saturate with the step, and noise that does not."""
    plan, noise = KINDS[kind], np.random.default_rng(7)
    rows = []
    for step in range(1, STEPS + 1):
        done = 1 - math.exp(-3 * step / STEPS)
        chosen_ref, rejected_ref = 0.12 + 0.01 * noise.standard_normal(), 0.13 + 0.01 * noise.standard_normal()
        chosen = chosen_ref * (1 + plan["errors"][0] * done + 0.02 * noise.standard_normal() * done)
        rejected = rejected_ref * (1 + plan["errors"][1] * done + 0.02 * noise.standard_normal() * done)
        margin = 14 * ((rejected - rejected_ref) - (chosen - chosen_ref)) * 3
        loss = 0.693 + (1.6 if kind == "diverged" else -0.5 * (plan["accuracy"] - 0.5)) * done + 0.05 * noise.standard_normal()
        rows.append(
            {
                "step": step,
                "epoch": 8 * step / TRAINED_PAIRS,
                "loss": loss,
                "learning_rate": 1e-4 * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS)),
                "gradient_norm": abs(0.6 + 0.2 * noise.standard_normal()),
                "seconds": 0.4,
                "pairs_seen": 8 * step,
                "peak_memory_bytes": 1_400_000_000,
                "rewards/chosen": -60 * (chosen - chosen_ref),
                "rewards/rejected": -60 * (rejected - rejected_ref),
                "rewards/margins": margin,
                "rewards/accuracies": min(
                    1.0, max(0.0, 0.5 + (plan["accuracy"] - 0.5) * done + 0.09 * noise.standard_normal())
                ),
                "gradient_weight": 0.5 - 0.3 * (plan["accuracy"] - 0.5) * done + 0.02 * noise.standard_normal(),
                "error/policy_chosen": chosen,
                "error/policy_rejected": rejected,
                "error/reference_chosen": chosen_ref,
                "error/reference_rejected": rejected_ref,
                "beta": 500.0,
                "margins_by_timestep": [
                    [t, float(done * math.exp(-(((t - 620) / 250) ** 2)) + 0.3 * noise.standard_normal())]
                    for t in noise.integers(0, 1000, size=8).tolist()
                ],
            }
        )
    return rows


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_pairs(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for index, condition in enumerate(conditions(12)):
        rng = random.Random(f"pair {index}")
        sides = [png(draw(rng, condition["colour"], condition["shape"], right, 0.0)) for right in (True, False)]
        rows.append(
            {
                "pair_id": f"p{index:05d}",
                "condition": {"prompt": condition["prompt"]},
                "chosen": {"bytes": sides[0], "path": None},
                "rejected": {"bytes": sides[1], "path": None},
                "chosen_scores": {"shapes": 1.0},
                "rejected_scores": {"shapes": 0.0},
            }
        )
    parquet.write_table(pa.Table.from_pylist(rows), folder / "pairs-00000.parquet")
    summary = {
        "prompts": 192,
        "samples": 1152,
        "pairs": TRAINED_PAIRS,
        "ties_dropped": 61,
        "below_margin": 0,
        "duplicates_dropped": 3,
        "no_pair_prompts": 23,
        "score_histogram": {"edges": [-1 + 0.1 * i for i in range(21)], "counts": [41, *[0] * 9, 402, *[0] * 8, 709]},
        "judge": {"name": "shapes", "version": "1"},
        "examples": [],
    }
    (folder / "summary.json").write_text(json.dumps(summary))


CONFIG = """\
modality: image
seed: 1
run: {folder: runs/quickstart, title: null}
objective: {name: dpo, beta: {value: 500.0, convention: mean_half}, anchor: 0.3}
train: {steps: 240, batch_size: 8, optimizer: {learning_rate: 0.0001}}
report: {title: Quickstart, grid: 24, embed_images: true}
"""

RECIPE = """\
modality: image
seed: 0
run: {folder: runs/quickstart, title: null}
objective: {name: dpo, beta: {value: 2000.0, convention: mean_half}, anchor: 0.3}
train: {steps: 240, batch_size: 8, optimizer: {learning_rate: 0.0001}}
report: {title: Quickstart, grid: 24, embed_images: true}
"""


def write_run(folder: Path, kind: str = "improved", *, count: int = 240) -> Path:
    """The whole run folder; ``kind`` is the verdict that its formulas were made for."""
    plan, asked = KINDS[kind], conditions(count)
    folder.mkdir(parents=True, exist_ok=True)
    base = outputs(asked, "base", plan["right"][0], 0.0)
    aligned = outputs(asked, "aligned", plan["right"][1], plan["speckle"])
    sft = outputs(asked, "sft", 0.5 * sum(plan["right"]), 0.0)
    names: dict[str, list[str]] = {}
    for arm, made in (("base", base), ("aligned", aligned)):
        (folder / "samples" / arm).mkdir(parents=True)
        names[arm] = [f"samples/{arm}/{index:05d}.png" for index in range(count)]
        for name, image in zip(names[arm], made, strict=True):
            image.save(folder / name)
    block = evaluate_paired(
        base,
        aligned,
        asked,
        list(range(1000, 1000 + count)),
        [ExampleJudge()],
        seed=1,
        base_images=names["base"],
        aligned_images=names["aligned"],
        arms={"sft": sft},
    )
    (folder / "evaluation.json").write_text(json.dumps(block))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(kind)))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "recipe.yaml").write_text(RECIPE)
    write_pairs(folder / "pairs")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"weights" * 100)
    stages = {
        "generate": {"seconds": 81.4, "peak_memory_bytes": 1_210_000_000, "inputs_hash": "3f" * 32, "finished": True},
        "train": {"seconds": 104.9, "peak_memory_bytes": 1_460_000_000, "inputs_hash": "a1" * 32, "finished": True},
        "evaluate": {"seconds": 47.2, "peak_memory_bytes": 1_180_000_000, "inputs_hash": "0c" * 32, "finished": True},
    }
    (folder / "stages.json").write_text(json.dumps(stages))
    environment = {
        "polyalign": "0.1.0",
        "python": "3.11.7",
        "platform": {"system": "Linux", "machine": "x86_64"},
        "packages": {"torch": "2.13.0", "diffusers": "0.36.0", "xformers": None},
        "devices": [{"kind": "cpu", "name": "x86_64, 2 cores", "memory_bytes": 8_000_000_000}],
        "argv": ["polyalign", "align", "configs/image/quickstart.yaml", "seed=1", "objective.beta.value=500"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Each kind of run is built once; tests get copies."""
    root, known = tmp_path_factory.mktemp("runs"), {}

    def built(kind: str, count: int) -> Path:
        if (kind, count) not in known:
            known[kind, count] = write_run(root / f"{len(known)}", kind, count=count)
        return known[kind, count]

    return built


@pytest.fixture
def make_run(tmp_path: Path, _built: Callable[[str, int], Path]) -> Callable[..., Path]:
    """``make_run(kind)``: a synthetic run folder of one's own."""

    def make(kind: str = "improved", *, count: int = 240) -> Path:
        return Path(shutil.copytree(_built(kind, count), tmp_path / kind.replace(" ", "-")))

    return make
