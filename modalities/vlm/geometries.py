"""Which part of its picture each image token of a prompt shows: the constructors of
:mod:`polyalign.modalities.vlm.token_geometry`, with what a family's own processor says of sizes, tiles and padding."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.vlm.families import GRID
from polyalign.modalities.vlm.processing import SEVERAL, Picture, Prompt
from polyalign.modalities.vlm.spans import runs_of
from polyalign.modalities.vlm.token_geometry import (
    Geometry,
    View,
    anyres,
    check_tokens,
    cropped,
    padded,
    stretched,
    tiled,
)

MARK = re.compile(r"<row_(\d+)_col_(\d+)>$")
"""What Idefics3 and SmolVLM write before a tile."""


class _Options:
    """An image processor's settings, those that the recipe changes first (``prepare.picture_options``)."""

    def __init__(self, images: Any, given: Mapping[str, Any]):
        self._images, self._given = images, given

    def __getattr__(self, name: str) -> Any:
        return self._given[name] if name in self._given else getattr(self._images, name)


def geometries_of(model: Model, prompt: Prompt) -> list[Geometry]:
    """The geometry of each picture of a prompt, in order; their tokens are those of ``prompt.spans``.

    Raises:
        UserError: a family whose processors are not known here, or settings that show pictures otherwise than it does.
    """
    family, spans = model.parts["family"].name, prompt.spans(model.parts["image_token"])
    found = []
    for place, (picture, span) in enumerate(zip(prompt.pictures, spans, strict=True), start=1):
        geometry = _of(family, model, prompt, picture, span)
        check_tokens(geometry, picture.tokens, f"image {place}")
        found.append(geometry)
    return found


def _of(family: str, model: Model, prompt: Prompt, picture: Picture, span: Sequence[int]) -> Geometry:
    images = _Options(model.parts["processor"].image_processor, model.parts["picture_options"])
    side = math.isqrt(picture.tokens)
    if family == "llava":
        return _llava(images, picture, side)
    if family == "qwen":
        _, height, width = picture.inputs[GRID][0].tolist()
        return stretched(picture.size, height // images.merge_size, width // images.merge_size)
    if family == "llava_next":
        return _anyres(images, picture, picture.inputs["pixel_values"].shape[-1] // model.parts["processor"].patch_size)
    if family == "llava_onevision":
        return _onevision(model.parts["processor"], picture)
    if family == "internvl":
        return _internvl(picture)
    if family == "idefics3":
        return _marked(model, prompt, picture, span)
    if family == "gemma3" and len(picture.inputs["pixel_values"]) == 1:
        return stretched(picture.size, side, side)
    raise UserError(
        f"which part of a picture a token shows is not known for {family} with these settings (Gemma3: without "
        "do_pan_and_scan). Known: llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, idefics3, "
        "smolvlm, gemma3"
    )


def _llava(images: Any, picture: Picture, side: int) -> Geometry:
    if getattr(images, "do_pad", False):
        return padded(picture.size, side, side)
    shortest = images.size.get("shortest_edge")
    if not images.do_center_crop or shortest is None:
        return stretched(picture.size, side, side)
    crop = images.crop_size["width"], images.crop_size["height"]
    return cropped(picture.size, side, side, shortest=shortest, crop=crop)


def _anyres(images: Any, picture: Picture, per_side: int, at_most: int | None = None) -> Geometry:
    tile = picture.inputs["pixel_values"].shape[-1]
    return anyres(picture.size, images.image_grid_pinpoints, tile=tile, per_side=per_side, at_most=at_most)


def _onevision(processor: Any, picture: Picture) -> Geometry:
    per_side = math.isqrt(processor.num_image_tokens)
    if int(picture.inputs[SEVERAL].reshape(-1)[0]) > 1:
        whole = stretched(picture.size, per_side, per_side)
        return Geometry(picture.size, (*whole.views, View(1, 1, (0.0, 0.0, 0.0, 0.0))))  # its end has a token of its own
    most = processor.vision_aspect_ratio.removeprefix("anyres_max_")
    return _anyres(processor.image_processor, picture, per_side, int(most) if most.isdigit() else None)


def _internvl(picture: Picture) -> Geometry:
    """The grid of so many tiles that comes closest to the picture's proportions; with several, one tile of the whole."""
    count = len(picture.inputs["pixel_values"])
    blocks, side, ratio = max(count - 1, 1), math.isqrt(picture.tokens // count), picture.size[0] / picture.size[1]
    grids = [(rows, blocks // rows) for rows in range(1, blocks + 1) if blocks % rows == 0]
    rows, columns = min(grids, key=lambda grid: abs(ratio - grid[1] / grid[0]))
    return tiled(picture.size, rows, columns, per_tile=(side, side))


def _marked(model: Model, prompt: Prompt, picture: Picture, span: Sequence[int]) -> Geometry:
    """Rows and columns of tiles as the prompt itself numbers them."""
    tokenizer, rows, columns, tiles = model.parts["tokenizer"], 1, 1, 0
    for run in runs_of(prompt.ids[: span[-1] + 1], model.parts["image_token"]):
        if run.start < span[0]:
            continue
        tiles += 1
        mark = MARK.search(tokenizer.decode(prompt.ids[max(0, run.start - 12) : run.start]))
        if mark is not None:
            rows, columns = max(rows, int(mark[1])), max(columns, int(mark[2]))
    side = math.isqrt(picture.tokens // tiles)
    return tiled(picture.size, rows, columns, per_tile=(side, side), thumbnail=tiles > 1)
