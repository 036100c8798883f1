"""What pictures become on their way into the language model, computed once for each different picture.

Each picture goes through the vision tower by itself, so that its features do not depend on the batch it comes in, and may be
kept for as long as tower and projector stand still: for chosen and rejected, for policy and reference, for later steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.modalities.transformers_folders import plain
from polyalign.modalities.vlm.families import FEATURES
from polyalign.modalities.vlm.processing import SEVERAL

Features = Mapping[str, Tensor]
"""``features`` (n, D), a row for each image token, and ``deep.0``, ``deep.1``, ... (n, D), what some families (Qwen3-VL) add to
the first layers; ``listed`` says in which form the model takes them."""


def of_picture(network: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features of one picture, with gradient where the vision tower or the projector is trained."""
    model = plain(network)
    parameter = next(model.parameters())
    on = {name: _like(tensor, parameter) for name, tensor in inputs.items()}
    found = model.get_image_features(**on, return_dict=True)
    pooled = found.pooler_output
    listed = isinstance(pooled, list | tuple)
    flat = torch.cat([part.flatten(0, -2) for part in pooled]) if listed else pooled.flatten(0, -2)
    features = {"features": flat, "listed": torch.tensor(listed)}
    for place, layer in enumerate(getattr(found, "deepstack_features", None) or ()):
        features[f"deep.{place}"] = torch.cat(list(layer)) if isinstance(layer, list | tuple) else layer
    return features


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the network's device, and numbers in its precision."""
    dtype = parameter.dtype if tensor.is_floating_point() and parameter.is_floating_point() else tensor.dtype
    return tensor.to(parameter.device, dtype)


def as_argument(pictures: Sequence[Features], device: torch.device) -> dict[str, Any]:
    """The argument of the forward pass that holds the features of ``pictures``, in the order of their places in the rows."""
    if not pictures:
        return {}
    parts = [picture["features"].to(device) for picture in pictures]
    found = SimpleNamespace(pooler_output=parts if bool(pictures[0]["listed"]) else torch.cat(parts))
    deep = [name for name in pictures[0] if name.startswith("deep.")]
    if deep:
        found.deepstack_features = [[picture[name].to(device) for picture in pictures] for name in deep]
    return {FEATURES: {"image": found}}


def as_pixels(rows: Sequence[Sequence[Mapping[str, Tensor]]], parameter: Tensor) -> dict[str, Tensor]:
    """The pictures of rows as arguments of a forward pass that takes no features: joined in the order of their places, padded
    with zeros, which every family leaves out again."""
    pictures = [picture for row in rows for picture in row]
    found = {}
    for name in pictures[0] if pictures else ():
        if name == SEVERAL:
            found[name] = torch.tensor([len(row) for row in rows if row])
            continue
        parts = [picture[name] for picture in pictures]
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined = parts[0].new_zeros(sum(len(part) for part in parts), *largest)
        start = 0
        for part in parts:
            joined[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
            start += len(part)
        found[name] = _like(joined, parameter)
    return found
