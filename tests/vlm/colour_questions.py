"""A small set of questions about pictures of one colour each."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "black", "white", "brown", "orange", "purple", "navy")
SIZES = ((60, 40), (40, 60), (30, 30), (90, 20))


def write_colours(folder: Path, count: int = 12, source: str = "coco") -> Path:
    """``questions.jsonl`` with ``count`` pictures of the source, each asked for its colour."""
    (folder / source).mkdir(parents=True)
    lines = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", SIZES[number % len(SIZES)], colour).save(folder / source / f"{number}.png")
        lines.append({"image": f"{source}/{number}.png", "question": "What colour is it?", "answer": colour})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
