"""Where on its pictures an answer looked, as maps that can be laid over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.attention_ratio import image_attention, middle_layer
from polyalign.modalities.vlm.attention_rows import layers_of, record
from polyalign.modalities.vlm.geometries import geometries_of
from polyalign.modalities.vlm.processing import completion_of
from polyalign.modalities.vlm.token_geometry import Geometry, check_tokens


def attention_maps(
    adapter: VlmAdapter,
    model: Model,
    condition: Mapping[str, Any],
    answer: str,
    layer: int | None = None,
    *,
    cells: int = 48,
) -> list[np.ndarray]:
    """A map (rows, columns) in float64 for each picture of the condition, in its proportions, the longer side ``cells`` long.

    A value is the attention that the answer's tokens pay to that part of the picture, on average over them and over the heads
    of the layer; their sum is what they pay to the picture. So maps of pictures of one condition, and of the base and the
    aligned model (``adapters_off`` of :mod:`polyalign.core.references` is the base under a LoRA), may be drawn in one scale.

    Args:
        layer: counted from 0; None is the middle one.

    Raises:
        UserError: a condition or answer that is wrong, a layer that is not there, or a family whose tokens' places are not
            known.
    """
    where = "attention map"
    prompt = adapter.prompt(model, condition, where=where)
    ids = completion_of(model, condition, answer, adapter.settings.append_eos, where=where)
    chosen = middle_layer(layers_of(model)) if layer is None else layer
    (found,) = record(adapter, model, [(prompt, ids)], [chosen])
    attention = image_attention(found.rows[chosen], prompt.spans(model.parts["image_token"]))
    pairs = zip(geometries_of(model, prompt), attention, strict=True)
    return [raster(geometry, tokens, cells) for geometry, tokens in pairs]


def raster(geometry: Geometry, attention: Tensor, cells: int) -> np.ndarray:
    """The attention (N,) to a picture's tokens spread evenly over the parts that they show, on a grid over the picture. What
    lies on padding is left out.

    Raises:
        UserError: another number of tokens than the geometry has.
    """
    check_tokens(geometry, len(attention), "the picture")
    width, height = geometry.size
    scale = cells / max(width, height)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    values, total = attention.double().cpu().numpy(), np.zeros((rows, columns))
    for view in geometry.views:
        own, values = values[: len(view)], values[len(view) :]
        left, top, right, bottom = view.box
        if right > left and bottom > top:
            grid = own.reshape(view.rows, -1)[:, : view.columns]
            total += _parts(top, bottom, view.rows, height, rows) @ grid @ _parts(left, right, view.columns, width, columns).T
    return total


def _parts(start: float, end: float, tokens: int, length: int, cells: int) -> np.ndarray:
    """(cells, tokens) how much of each of ``tokens`` even parts of start..end lies in each of ``cells`` of 0..length."""
    edges, bounds = np.linspace(start, end, tokens + 1), np.linspace(0, length, cells + 1)
    low, high = np.maximum(edges[:-1], bounds[:-1, None]), np.minimum(edges[1:], bounds[1:, None])
    return np.clip(high - low, 0, None) / (end - start) * tokens
