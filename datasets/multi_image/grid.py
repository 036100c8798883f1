"""MIA-DPO's collages (arXiv 2410.17637): several images in one picture, each in a cell with its name above.

Cells are 448 x 448 pixels, 40 apart, with a strip of 40 for the name above each; an image fills its cell as far as its own
proportions let it, from the top left corner. So 2 or 3 images make a picture of 448 n + 40 (n - 1) by 488, 4 make 936 x 976,
6 (two rows of three) 1424 x 976, 9 make 1424 x 1464.

Unlike the published data the names are in the font that Pillow brings along, since Arial cannot be: give ``font`` for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image.drawing import Plan, Rows, check_counts, planned
from polyalign.datasets.multi_image.named import named_row
from polyalign.datasets.multi_image.rows import IMAGE, Arrangement, Box, Place, text
from polyalign.datasets.multi_image.sources import Item, Questions

COUNTS: Mapping[int, float] = {2: 3800, 3: 1100, 4: 1100, 6: 1100, 9: 900}
"""How many of 8,000 questions were given how many images, as published for OCR-VQA; shared out alike in every source."""

SHAPES: Mapping[int, tuple[int, int]] = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns by number of images."""

CELL, MARGIN, LABEL, INDENT = 448, 40, 36, 20


def cells(count: int) -> list[Box]:
    """The slot of each image, without the strip of its name.

    Raises:
        UserError: no collage of so many images.
    """
    check_counts({count: 1}, tuple(SHAPES), "a collage")
    columns = SHAPES[count][1]
    step = CELL + MARGIN
    corners = [(place % columns * step, place // columns * step + MARGIN) for place in range(count)]
    return [(left, top, left + CELL, top + CELL) for left, top in corners]


def canvas(count: int) -> tuple[int, int]:
    """Width and height of a collage."""
    boxes = cells(count)
    return max(box[2] for box in boxes), max(box[3] for box in boxes)


def fitted(size: tuple[int, int], room: tuple[float, float]) -> tuple[int, int]:
    """The size at which a picture fills ``room`` as far as its proportions let it, larger or smaller than it was."""
    scale = min(room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def arranged(pictures: Sequence[Image.Image], font: str | Path | None = None) -> Arrangement:
    """The pictures in one.

    Args:
        font: a TrueType file for the names; None is Pillow's own.

    Raises:
        UserError: no collage of so many images, or no font in that file.
    """
    slots = cells(len(pictures))
    sheet = Image.new("RGB", canvas(len(pictures)), "white")
    brush, letters = ImageDraw.Draw(sheet), _font(font)
    places = []
    for number, (picture, slot) in enumerate(zip(pictures, slots, strict=True), start=1):
        size = fitted(picture.size, (CELL, CELL))
        brush.text((slot[0] + INDENT, slot[1] - MARGIN), f"Image{number}", fill="black", font=letters)
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), slot[:2])  # after the name: a tail of it may reach down
        places.append(Place(0, (slot[0], slot[1], slot[0] + size[0], slot[1] + size[1]), slot))
    return Arrangement("grid", (sheet,), (IMAGE, text("\n")), tuple(places))


def _font(given: str | Path | None) -> Any:
    try:
        return ImageFont.load_default(size=LABEL) if given is None else ImageFont.truetype(str(given), LABEL)
    except OSError as error:
        raise UserError(f"font: {given} does not open as a TrueType font ({error})") from error


def build(
    questions: Questions,
    *,
    seed: int,
    counts: Mapping[int, float] = COUNTS,
    limit: int | None = None,
    turns: int = 1,
    across_sources: bool = False,
    items: Sequence[Item] | None = None,
    font: str | Path | None = None,
) -> Rows:
    """A row for each question; the arguments as in :func:`polyalign.datasets.multi_image.sequence.build`.

    Questions and answers with coordinates of the single picture are taken as they are, as the published ones were, though the
    picture has moved: give ``items`` without them (:func:`polyalign.datasets.multi_image.picture_in_picture.has_box`).

    Args:
        items: of the questions; None is all.
        font: a TrueType file for the names; None is Pillow's own.

    Raises:
        UserError: counts that are not possible, or no font in that file.
    """
    check_counts(counts, tuple(SHAPES), "a collage")
    plans = planned(questions, "grid", counts, seed=seed, items=items, limit=limit, across_sources=across_sources)

    def compose(plan: Plan, pictures: list[Image.Image]) -> dict[str, Any]:
        return named_row(questions, plan, arranged(pictures, font), turns)

    return Rows("grid", questions, plans, compose)
