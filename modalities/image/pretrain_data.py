"""What the embedded base learns from: the world `shapes`, or a folder of the user's own drawings, in pairs or alone."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyalign.core.randomness import seed_of
from polyalign.datasets.pictures import decode
from polyalign.datasets.reference_pictures import ReferenceNameJudge, ReferenceStyleJudge, pixels, references
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
class Captioned:
    """A folder of drawings, each with its caption beside it, in sub-folders too.

    The share ``wrong`` of what is learnt has the caption of another drawing, so that the base errs by chance and not only by
    thing, which leaves something to prefer among its samples.
    """

    folder: Path
    wrong: float = 0.0
    least_named: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        size = (shapes.SIZE, shapes.SIZE)
        self.drawn = [
            (caption, pixels(decode(file.read_bytes()).resize(size, Image.Resampling.LANCZOS)))
            for caption, files in references(self.folder).items()
            for file in files
        ]

    def pictures(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        draws = random.Random(seed_of(seed, "pictures"))
        found, captions = [], []
        for _ in range(count):
            caption, drawing = draws.choice(self.drawn)
            found.append(shifted(drawing, draws.randint(-SHIFT, SHIFT), draws.randint(-SHIFT, SHIFT)))
            captions.append(caption)
        mistakes = random.Random(seed_of(seed, "wrong captions"))
        captions = [mistakes.choice(captions) if mistakes.random() < self.wrong else caption for caption in captions]
        return as_tensor(found), captions

    def words(self) -> list[str]:
        return words_of(caption for caption, _ in self.drawn)

    def conditions(self, count: int) -> list[Condition]:
        captions = sorted({caption for caption, _ in self.drawn})
        return [{"prompt": captions[index % len(captions)]} for index in range(count)]

    def figures(self, conditions: Sequence[Condition], outputs: Sequence[Image.Image]) -> dict[str, float]:
        """``named``: the share of pictures nearest to a drawing of their name."""
        named = ReferenceNameJudge(str(self.folder)).score(conditions, outputs)
        return {"named": round(float(np.mean(named)), 4)}

    def unfit(self, figures: dict[str, float]) -> str | None:
        if figures["named"] >= self.least_named:
            return None
        return f"named must be at least {self.least_named:g}: the base has not learnt its drawings"


class Drawings(Captioned):
    """A folder of style pairs: both pictures of each pair under one caption, so that the base draws either style by chance."""

    least_named = 0.5

    def figures(self, conditions: Sequence[Condition], outputs: Sequence[Image.Image]) -> dict[str, float]:
        """``named``, and ``chosen_style``: the share nearer to the chosen style."""
        style = ReferenceStyleJudge(str(self.folder)).score(conditions, outputs)
        return {**super().figures(conditions, outputs), "chosen_style": round(float(np.mean(np.array(style) > 0)), 4)}


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
