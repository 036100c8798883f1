"""From what a pair store holds (a picture, its bytes, a path) to a cropped picture and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng
from polyalign.datasets.pictures import decode as decode_picture


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


def content_of(picture: Any, *, where: str) -> bytes | Image.Image:
    """The picture's own content from any form a row may have: the bytes of a file, not yet decoded, if it is bytes, a path or
    the store's {bytes, path} struct; an upright RGB picture if it is a picture.

    Raises:
        UserError: there is no picture at ``where``.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str | Path):
        if not Path(picture).is_file():
            raise UserError(f"{where}: there is no file {picture}")
        picture = Path(picture).read_bytes()
    if not isinstance(picture, bytes | Image.Image) or picture == b"":
        raise UserError(
            f"{where}: expected a picture (bytes, a path or a PIL image), found {type(picture).__name__}. "
            "Drop the row or give the picture."
        )
    return picture if isinstance(picture, bytes) else decode(picture, where=where)


def decode(content: bytes | Image.Image, *, where: str) -> Image.Image:
    """The picture as :func:`polyalign.datasets.pictures.decode` gives it.

    Raises:
        UserError: the file is truncated, damaged, or no picture; ``where`` names the pair and the column.
    """
    try:
        return decode_picture(content)
    except ValueError as error:
        raise UserError(
            f"{where}: the picture cannot be decoded ({error}). It is truncated or damaged; replace it or drop the row."
        ) from error


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
