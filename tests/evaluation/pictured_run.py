"""A run folder about questions with pictures: rows of the world `scenes`, answers and attention that are made up, all written
by the code that writes them in real runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.files import atomic_write
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.worlds import scenes_rows
from polyalign.evaluation.groups import grouped
from polyalign.evaluation.judges import build
from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.pictured import attention_file, picture_file

SHARE_RIGHT = {"base": 0.35, "aligned": 0.75, "sft": 0.5}
EVIL = "<script>alert(1)</script>"
LOOKED_AT = 6
"""Questions whose attention is kept."""


def questions(split: str = "heldout", each: int = 8) -> list[dict[str, Any]]:
    """Questions about one picture, two and three in a row, and four in a collage."""
    made = [
        *scenes_rows.rows(split, each, 1, pictures=2, tasks=("colour", "what")),
        *scenes_rows.rows(split, each, 2, pictures=3, tasks=("exists", "count")),
        *scenes_rows.rows(split, each, 3, pictures=4, tasks=("colour",), format="grid"),
        *scenes_rows.rows(split, each, 4, pictures=1, tasks=("what", "alt")),
    ]
    for row in made:
        words = [part["text"] for part in row["condition"]["messages"][-1]["content"] if part["type"] == "text"]
        row["condition"]["prompt"] = words[-1].strip()
    return made


def answered(row: dict[str, Any], model: str, draws: random.Random) -> str:
    """Right as often as the model is; else the answer of another picture, or of a dream."""
    if draws.random() < SHARE_RIGHT[model]:
        return row["chosen"]
    return draws.choice([*row["confusions"], "There is a yellow circle and a green circle.", "yes, there is a green square"])


def attention(condition: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """Even noise, with a spot: of the base in the first picture's corner, of the aligned model in what is asked about."""
    place = condition["layout"]["places"][condition["layout"]["targets"][0]]
    drawn, maps = np.random.default_rng(3), []
    for number, picture in enumerate(condition["images"]):
        width, height = picture.size
        rows, columns = (8, 8) if width == height else (8, max(1, round(8 * width / height)))
        found = drawn.random((rows, columns)) * 1e-3
        if model == "aligned" and number == place["image"]:
            left, top, right, bottom = place["box"]
            found[
                int(top / height * rows) : int(bottom / height * rows),
                int(left / width * columns) : int(right / width * columns),
            ] += 4e-3
        elif model == "base" and number == 0:
            found[:3, :3] += 5e-3
        maps.append({"map": found.tolist()})
    return maps


def write_run(folder: Path, each: int = 8) -> Path:
    """The evaluation with its pictures and attention, the pairs, and the recipe."""
    rows = questions(each=each)
    conditions = [row["condition"] for row in rows]
    said = {
        name: [answered(row, name, random.Random(f"{name} {index}")) for index, row in enumerate(rows)] for name in SHARE_RIGHT
    }
    said["aligned"][0] += EVIL
    judge = build(JudgeConfig(name="scenes"))
    report = evaluate_paired(
        said["base"], said["aligned"], conditions, list(range(len(rows))), [judge], seed=0, arms={"sft": said["sft"]}
    )
    for index, condition in enumerate(conditions):
        for number, picture in enumerate(condition["images"]):
            path = folder / picture_file(index, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    for index in [*range(LOOKED_AT), 2 * each]:
        models = {name: {"images": attention(conditions[index], name)} for name in ("base", "aligned")}
        path = folder / attention_file(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"layer": 1, "models": models}))
    scores = {name: judge.score(conditions, answers) for name, answers in said.items()}
    base = scores.pop("base")
    kinds = {
        "By number of pictures": [str(len(condition["layout"]["places"])) for condition in conditions],
        "By format": [condition["layout"]["format"] for condition in conditions],
    }
    report["groups"] = {
        title: grouped(base, scores, groups, seed=0, right_from=1.0, broken_below=0.0) for title, groups in kinds.items()
    }
    atomic_write(folder / "evaluation.json", json.dumps(report))
    write_pairs(folder / "pairs")
    atomic_write(folder / "config.yaml", "modality: vlm\nobjective: {name: rdpo}\n")
    return folder


def write_pairs(folder: Path) -> None:
    """Pairs of which some have losing pictures."""
    rows = questions("train", 2)
    for index, row in enumerate(rows):
        row["condition"] = {**row["condition"], "prompt": f"{row['condition']['prompt']} {EVIL}"}
        row["rejected"] = (row["confusions"] or ["There is nothing."])[0]
        row |= {"chosen_scores": {"scenes": 1.0}, "rejected_scores": {"scenes": 0.0}, "provenance": {}}
        if index % 3 == 0:
            row["rejected_images"] = [picture.transpose(1) for picture in row["condition"]["images"]]
    store = PairStore(folder, "text", pictured=True)
    store.write_shard(0, rows)
    atomic_write(folder / "summary.json", json.dumps({"prompts": len(rows), "pairs": len(rows)}))


if __name__ == "__main__":
    import sys

    from polyalign.evaluation.report import write_report

    print(write_report(write_run(Path(sys.argv[1]), 14)))
