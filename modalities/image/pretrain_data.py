"""What the embedded base learns from: the world `shapes`, or a folder of the user's own captioned drawings."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.formats.folders import read_folders
from polyalign.datasets.pictures import decode
from polyalign.datasets.reference_pictures import ReferenceNameJudge, ReferenceStyleJudge, pixels
from polyalign.datasets.worlds import shapes

SHIFT = 2  # pixels to either side by which a drawing is moved, so that few drawings make many pictures
Condition = dict[str, Any]
# What the base sees of each task. Counting, relations and bound colours take longest to learn, so they come twice as often.
LESSONS = (*shapes.TASKS, "counting", "position", "color_attr")


class Source(Protocol):
    """Pictures with captions, the words they use, and how to tell what a base has learnt of them."""

    def pictures(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        """(N, 3, 32, 32) in [-1, 1], and N captions."""
        ...

    def words(self) -> list[str]: ...

    def conditions(self, count: int) -> list[Condition]: ...

    def figures(self, conditions: Sequence[Condition], outputs: Sequence[Image.Image]) -> dict[str, float]: ...

    def unfit(self, figures: dict[str, float]) -> str | None:
        """Why a base with these figures must not be used, or None."""
        ...


class Shapes:
    """The world `shapes`, some of its captions wrong (`shapes.CAPTION_NOISE`)."""

    def pictures(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        draws = random.Random(seed_of(seed, "pictures"))
        found, captions = [], []
        for _ in range(count):
            spec = shapes.random_spec(draws, LESSONS)
            found.append(shapes.draw(shapes.arrange(spec, draws)))
            captions.append(shapes.noisy_caption(spec, draws))
        return as_tensor(found), captions

    def words(self) -> list[str]:
        return words_of(opening + prompt for opening in shapes.OPENINGS for prompt in shapes.all_prompts())

    def conditions(self, count: int) -> list[Condition]:
        return shapes.prompts("heldout", count)

    def figures(self, conditions: Sequence[Condition], outputs: Sequence[Image.Image]) -> dict[str, float]:
        """Mini-GenEval: the share of right pictures by task, their mean (``overall``), and the share of clean pictures."""
        judge = shapes.ShapesJudge()
        verdicts = [judge.verdict(condition, picture) for condition, picture in zip(conditions, outputs, strict=True)]
        figures = {}
        for task in shapes.TASKS:
            right = [
                verdict.right for condition, verdict in zip(conditions, verdicts, strict=True) if condition["task"] == task
            ]
            figures[task] = round(float(np.mean(right)), 3)
        figures["overall"] = round(float(np.mean(list(figures.values()))), 4)
        figures["clean"] = round(float(np.mean([verdict.clean for verdict in verdicts])), 4)
        return figures

    def unfit(self, figures: dict[str, float]) -> str | None:
        if 0.45 <= figures["overall"] <= 0.85 and figures["clean"] >= 0.9:
            return None
        return "overall must lie in [0.45, 0.85], so that there is a skill and something to prefer, and clean be at least 0.9"


@dataclass
class Drawings:
    """A folder of style pairs: both pictures of each pair under one caption, so that the base draws either style by chance."""

    folder: Path

    def __post_init__(self) -> None:
        pairs, _ = read_folders(self.folder)
        size = (shapes.SIZE, shapes.SIZE)
        self.drawn = [
            (str(pair.condition["prompt"]), pixels(decode(file.read_bytes()).resize(size, Image.Resampling.LANCZOS)))
            for pair in pairs
            for file in (pair.chosen, pair.rejected)
        ]
        strange = [caption for caption, _ in self.drawn if not caption.isascii()]
        if strange:
            raise UserError(f"{self.folder}: this base's tokenizer knows ASCII letters only; found the caption {strange[0]!r}")

    def pictures(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        draws = random.Random(seed_of(seed, "pictures"))
        found, captions = [], []
        for _ in range(count):
            caption, drawing = draws.choice(self.drawn)
            found.append(shifted(drawing, draws.randint(-SHIFT, SHIFT), draws.randint(-SHIFT, SHIFT)))
            captions.append(caption)
        return as_tensor(found), captions

    def words(self) -> list[str]:
        return words_of(caption for caption, _ in self.drawn)

    def conditions(self, count: int) -> list[Condition]:
        captions = sorted({caption for caption, _ in self.drawn})
        return [{"prompt": captions[index % len(captions)]} for index in range(count)]

    def figures(self, conditions: Sequence[Condition], outputs: Sequence[Image.Image]) -> dict[str, float]:
        """``named``: the share of pictures nearest to a drawing of their name; ``chosen_style``: nearer to the chosen style."""
        named = ReferenceNameJudge(str(self.folder)).score(conditions, outputs)
        style = ReferenceStyleJudge(str(self.folder)).score(conditions, outputs)
        return {"named": round(float(np.mean(named)), 4), "chosen_style": round(float(np.mean(np.array(style) > 0)), 4)}

    def unfit(self, figures: dict[str, float]) -> str | None:
        return None if figures["named"] >= 0.5 else "named must be at least 0.5: the base has not learnt its drawings"


def as_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def shifted(drawing: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Moved by whole pixels, white flowing in."""
    height, width, _ = drawing.shape
    padded = np.pad(drawing, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=1.0)
    return padded[SHIFT - dy : SHIFT - dy + height, SHIFT - dx : SHIFT - dx + width]


def words_of(captions: Any) -> list[str]:
    """What CLIP's pre-tokenizer makes of the captions: runs of letters, single digits, runs of the rest; sorted."""
    return sorted({word for caption in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower())})
