"""From what a pair store holds (a picture, its bytes, a path) to a cropped picture and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from polyalign.core.randomness import rng
from polyalign.modalities.picture_contents import content_of, decode

__all__ = ["View", "content_of", "cut", "decode", "pixels", "view_of"]


@dataclass(frozen=True)
class View:
    """How the pictures of one pair are cut: shared by chosen and rejected, since a difference of views is not a preference.

    ``place`` is the crop's position as shares (down, right) of the room there is, so that pictures of different sizes are cut
    at the same relative place.
    """

    resolution: int
    place: tuple[float, float] = (0.5, 0.5)
    flipped: bool = False


def view_of(pair_id: str, step: int, *, seed: int, resolution: int, crop: Literal["centre", "random"], flip: bool) -> View:
    """The view of a pair at a step, keyed by both."""
    generator = rng(seed, "view", pair_id, step)
    down, right, side = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return View(resolution, (down, right) if crop == "random" else (0.5, 0.5), flip and side < 0.5)


def cut(picture: Image.Image, view: View) -> tuple[Image.Image, tuple[int, int]]:
    """Shorter side to the resolution (bilinear), mirror, then crop; also the crop's (top, left).

    Mirrored first, so that (top, left) is true of the mirrored picture.
    """
    side = view.resolution
    width, height = picture.size
    factor = side / min(width, height)
    size = (max(side, round(width * factor)), max(side, round(height * factor)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    if view.flipped:
        picture = ImageOps.mirror(picture)
    top, left = round((size[1] - side) * view.place[0]), round((size[0] - side) * view.place[1])
    return picture.crop((left, top, left + side, top + side)), (top, left)


def pixels(picture: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
