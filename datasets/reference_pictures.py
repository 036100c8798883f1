"""Judges that hold a picture against the user's own: a folder with `chosen/` and `rejected/`
(:mod:`polyalign.datasets.formats.folders`).

They compare pixels, so they serve drawings that a model reproduces closely (a style of one's own, icons, sprites), not
photographs. Letters: x the output, c_p and r_p the chosen and the rejected picture of prompt p; d(a, b) the root mean square
difference of RGB values in [0, 1], at the output's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.folders import read_folders
from polyalign.datasets.pictures import decode


class _References:
    """The folder's pictures, by caption."""

    version = "1"

    def __init__(self, folder: str):
        pairs, _ = read_folders(Path(folder))
        self.folder = folder
        self.files = {str(pair.condition["prompt"]): (pair.chosen, pair.rejected) for pair in pairs}
        self._pixels = lru_cache(maxsize=None)(self._load)

    def of(self, condition: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
        """Chosen and rejected picture of the condition's prompt: (2, H, W, 3) in [0, 1].

        Raises:
            UserError: the folder has no pictures of that caption.
        """
        prompt = str(condition["prompt"])
        if prompt not in self.files:
            raise UserError(f"{self.folder}: no pair has the caption {prompt!r}, so this judge cannot judge a picture of it")
        return self._pixels(prompt, size)

    def everything(self, size: tuple[int, int]) -> tuple[list[str], np.ndarray]:
        """All captions, and their pictures (N, 2, H, W, 3)."""
        prompts = list(self.files)
        return prompts, np.stack([self._pixels(prompt, size) for prompt in prompts])

    def _load(self, prompt: str, size: tuple[int, int]) -> np.ndarray:
        return np.stack(
            [pixels(decode(file.read_bytes()).resize(size, Image.Resampling.LANCZOS)) for file in self.files[prompt]]
        )


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square difference over the last three axes."""
    return np.sqrt(((a - b) ** 2).mean((-3, -2, -1)))


class ReferenceStyleJudge(_References):
    """Which of the two it resembles more: d(x, r_p) - d(x, c_p). Above zero, the output is nearer to the chosen picture."""

    name = "reference_style"

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Image.Image]) -> list[float]:
        scores = []
        for condition, output in zip(conditions, outputs, strict=True):
            chosen, rejected = distance(self.of(condition, output.size), pixels(output))
            scores.append(float(rejected - chosen))
        return scores


class ReferenceNameJudge(_References):
    """Is it still a picture of its prompt? 1 if, of all pictures in the folder, the nearest is one of its own prompt's, else 0.
    A style that is gained by forgetting what things look like shows here."""

    name = "reference_name"

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Image.Image]) -> list[float]:
        scores = []
        for condition, output in zip(conditions, outputs, strict=True):
            prompts, references = self.everything(output.size)
            nearest = prompts[int(distance(references, pixels(output)).min(1).argmin())]
            scores.append(float(nearest == condition["prompt"]))
        return scores
