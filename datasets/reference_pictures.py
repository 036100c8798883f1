"""Judges that hold a picture against the user's own: a folder with `chosen/` and `rejected/`
(:mod:`polyalign.datasets.formats.folders`), or, where one picture of a prompt is enough, of captioned pictures (NAME.txt beside
NAME.png, also in sub-folders).

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
from polyalign.datasets.formats.suffixes import ENDINGS, caption_of, files_in
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pictures import decode


def references(folder: Path) -> dict[str, tuple[Path, ...]]:
    """From caption to its pictures: chosen and rejected of a folder of pairs, else one of a folder of captioned pictures.

    Raises:
        UserError: no such folder, no pictures, a picture without a caption, or two of one caption that are no pair.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. It holds chosen/ and rejected/, or pictures NAME.png with NAME.txt")
    if any((folder / side).is_dir() for side in SIDES):
        pairs, _ = read_folders(folder)
        return {str(pair.condition["prompt"]): (pair.chosen, pair.rejected) for pair in pairs}
    found: dict[str, tuple[Path, ...]] = {}
    for place in sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in ENDINGS}):
        files = files_in(place)
        for picture in (file for file in files.values() if file.suffix.lower() in ENDINGS):
            try:
                caption = caption_of(place, files, (picture.stem,))
            except ValueError as error:
                raise UserError(f"{picture}: {error}") from error
            if caption in found:
                raise UserError(f"{picture}: has the caption of {found[caption][0]}, {caption!r}; take one away")
            found[caption] = (picture,)
    if not found:
        raise UserError(f"{folder}: there are no pictures in this folder, nor chosen/ and rejected/")
    return found


class _References:
    """The folder's pictures, by caption."""

    version = "1"

    def __init__(self, folder: str):
        self.folder, self.files = folder, references(Path(folder))
        self._pixels = lru_cache(maxsize=None)(self._load)

    def of(self, condition: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
        """Pictures of the condition's prompt, of a pair the chosen one first: (1 or 2, H, W, 3) in [0, 1].

        Raises:
            UserError: the folder has no pictures of that caption.
        """
        prompt = str(condition["prompt"])
        if prompt not in self.files:
            raise UserError(f"{self.folder}: no picture has the caption {prompt!r}, so this judge cannot judge a picture of it")
        return self._pixels(prompt, size)

    def everything(self, size: tuple[int, int]) -> tuple[list[str], np.ndarray]:
        """All captions, and their pictures (N, 1 or 2, H, W, 3)."""
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

    def __init__(self, folder: str):
        super().__init__(folder)
        if any(len(files) != 2 for files in self.files.values()):
            raise UserError(f"{folder}: has no chosen/ and rejected/, and a style is told by holding one against the other")

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
