"""Which part of a picture each image token shows, after a processor has resized, padded, cropped or tiled it.

A :class:`Geometry` is a few :class:`View` s in the order of the tokens: a view divides a rectangle of the picture evenly into
rows x columns, one token each, in reading order. The rectangle is in pixels of the picture as the user gave it, so that boxes
of a collage are compared with it directly; it reaches outside where the processor pads. What each family does to a picture:

| family | constructor |
| --- | --- |
| LLaVA-1.5 as trained (square, padded) | :func:`padded` |
| LLaVA-1.5 in transformers, CLIP's processor (shortest side, centre crop) | :func:`cropped` |
| LLaVA-NeXT, LLaVA-OneVision with one picture (AnyRes) | :func:`anyres` |
| LLaVA-OneVision with several, Gemma3, InternVL without tiles, Janus | :func:`stretched` |
| Qwen2-VL, 2.5, 3 | :func:`stretched` with rows and columns of ``image_grid_thw`` over the merge size |
| InternVL with tiles, SmolVLM, Idefics3 | :func:`tiled` |

Letters: N image tokens of a picture, K boxes. Boxes are (left, top, right, bottom).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyalign.core.errors import UserError

Size = tuple[int, int]
"""Width and height in pixels, as Pillow has them."""


@dataclass(frozen=True)
class View:
    """``rows`` x ``columns`` tokens over the rectangle ``box``. With ``newline`` each row has one more that shows nothing."""

    rows: int
    columns: int
    box: tuple[float, float, float, float]
    newline: bool = False

    def __len__(self) -> int:
        return self.rows * (self.columns + self.newline)

    def boxes(self) -> Tensor:
        """(rows * (columns + newline), 4) the box of each token in float64; an empty one for the ends of rows."""
        left, top, right, bottom = self.box
        across = torch.linspace(left, right, self.columns + 1, dtype=torch.float64)
        down = torch.linspace(top, bottom, self.rows + 1, dtype=torch.float64)
        found = torch.zeros(self.rows, self.columns + self.newline, 4, dtype=torch.float64)
        found[:, : self.columns, 0], found[:, : self.columns, 2] = across[:-1], across[1:]
        found[:, : self.columns, 1], found[:, : self.columns, 3] = down[:-1, None], down[1:, None]
        return found.flatten(0, 1)


@dataclass(frozen=True)
class Geometry:
    """The tokens of a picture of ``size``."""

    size: Size
    views: tuple[View, ...]

    def __len__(self) -> int:
        return sum(len(view) for view in self.views)

    @property
    def whole(self) -> tuple[float, float, float, float]:
        """The picture's own box."""
        return 0.0, 0.0, float(self.size[0]), float(self.size[1])

    def shares(self, boxes: Sequence[Sequence[float]]) -> Tensor:
        """(N, K) float64: how much of each token's area lies in each box, 0 to 1."""
        tokens = torch.cat([view.boxes() for view in self.views])[:, None]
        places = torch.tensor([list(box) for box in boxes], dtype=torch.float64)[None]
        sides = torch.minimum(tokens[..., 2:], places[..., 2:]) - torch.maximum(tokens[..., :2], places[..., :2])
        area = (tokens[..., 2:] - tokens[..., :2]).prod(-1)
        return torch.where(area > 0, sides.clamp(min=0).prod(-1) / area.clamp(min=1e-300), 0.0)


def stretched(size: Size, rows: int, columns: int) -> Geometry:
    """The whole picture, resized without regard to its proportions."""
    return Geometry(size, (View(rows, columns, (0.0, 0.0, *map(float, size))),))


def padded(size: Size, rows: int, columns: int) -> Geometry:
    """A square as wide as the longer side, the picture in the middle."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return Geometry(size, (View(rows, columns, (float(left), float(top), float(left + side), float(top + side))),))


def cropped(size: Size, rows: int, columns: int, *, shortest: int, crop: Size) -> Geometry:
    """The middle of the picture, ``crop`` (width, height) of it when its shortest side has been made ``shortest`` long."""
    width, height = size
    long = int(shortest * max(size) / min(size))  # as the processors round it
    resized = (shortest, long) if width <= height else (long, shortest)
    box: list[float] = []
    for full, scaled, kept in zip(size, resized, crop, strict=True):
        start = (scaled - kept) // 2
        box += [start * full / scaled, (start + kept) * full / scaled]
    return Geometry(size, (View(rows, columns, (box[0], box[2], box[1], box[3])),))


def tiled(
    size: Size, tile_rows: int, tile_columns: int, *, per_tile: tuple[int, int], thumbnail: bool | None = None
) -> Geometry:
    """The picture resized to whole tiles, a view for each in reading order, then one of the whole.

    Args:
        per_tile: rows and columns of tokens of a tile.
        thumbnail: whether the view of the whole is there; None is with more than one tile.
    """
    width, height = size[0] / tile_columns, size[1] / tile_rows
    tiles = [
        View(*per_tile, (column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(tile_rows)
        for column in range(tile_columns)
    ]
    last = (len(tiles) > 1) if thumbnail is None else thumbnail
    return Geometry(size, (*tiles, *([View(*per_tile, (0.0, 0.0, *map(float, size)))] if last else [])))


def anyres(
    size: Size,
    resolutions: Sequence[Size],
    *,
    tile: int,
    per_side: int,
    newline: bool = True,
    at_most: int | None = None,
) -> Geometry:
    """LLaVA-NeXT's views: the whole picture stretched to one tile, then the picture fitted into the best of ``resolutions``,
    centred and cut into tiles; rows and columns of tokens that show padding alone are left out again.

    Args:
        resolutions: (height, width), ``image_grid_pinpoints``.
        tile: a tile's side in pixels.
        per_side: tokens along a tile's side.
        newline: every row of the second view ends with a token of its own.
        at_most: tiles' worth of tokens to which OneVision scales the second view down (9 in ``anyres_max_9``); None is any.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    target_height, target_width = select_best_resolution((height, width), [list(one) for one in resolutions])
    scale_across, scale_down = target_width / width, target_height / height
    if scale_across < scale_down:
        fitted = target_width, min(math.ceil(height * scale_across), target_height)
    else:
        fitted = min(math.ceil(width * scale_down), target_width), target_height
    rows, columns = target_height // tile * per_side, target_width // tile * per_side
    first_row, first_column = _unpadded(size, rows, columns)
    step = tile / per_side
    pad_across, pad_down = (target_width - fitted[0]) // 2, (target_height - fitted[1]) // 2
    box = (
        (first_column * step - pad_across) * width / fitted[0],
        (first_row * step - pad_down) * height / fitted[1],
        ((columns - first_column) * step - pad_across) * width / fitted[0],
        ((rows - first_row) * step - pad_down) * height / fitted[1],
    )
    rows, columns = rows - 2 * first_row, columns - 2 * first_column
    if at_most is not None:
        ratio = math.sqrt(rows * columns / (at_most * per_side**2))
        if ratio > 1.1:  # the model leaves smaller excess as it is
            rows, columns = int(rows // ratio), int(columns // ratio)
    whole = View(per_side, per_side, (0.0, 0.0, float(width), float(height)))
    return Geometry(size, (whole, View(rows, columns, box, newline)))


def _unpadded(size: Size, rows: int, columns: int) -> tuple[int, int]:
    """Rows at the top (and bottom) and columns at the left (and right) that the model takes away, in tokens."""
    width, height = size
    if width / height > columns / rows:
        return (rows - int(round(height * columns / width, 7))) // 2, 0
    return 0, (columns - int(round(width * rows / height, 7))) // 2


def check_tokens(geometry: Geometry, tokens: int, where: str) -> None:
    """Raises UserError if a picture has another number of tokens than its geometry says."""
    if len(geometry) != tokens:
        raise UserError(
            f"{where}: {tokens} image tokens, and the processor's geometry for a picture of {geometry.size[0]} x "
            f"{geometry.size[1]} pixels has {len(geometry)}. The processor's settings are others than those given here"
        )
