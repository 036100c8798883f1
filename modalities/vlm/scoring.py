"""Token likelihoods of answers to prompts with pictures (:mod:`polyalign.core.likelihood.tokens`).

Letters: G groups, K candidates in a group, R rows of a forward pass, L their length, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyalign.core.errors import UserError
from polyalign.core.likelihood.prefix_sharing import announce, mask_for, pays, shared_inputs, why_not
from polyalign.core.likelihood.tokens import TokenSettings, score_rows
from polyalign.core.likelihood.tokens_rows import Layout, SharedLayout
from polyalign.core.scores import Scores
from polyalign.modalities.transformers_folders import plain
from polyalign.modalities.vlm.batches import inputs_of
from polyalign.modalities.vlm.families import Family
from polyalign.modalities.vlm.features import Features, as_argument, as_pixels
from polyalign.modalities.vlm.rows import Prompts, separate, shared

FeaturesOf = Callable[[int, Mapping[str, Tensor]], Features]
"""The features of a picture, by its key and its arguments of the vision tower."""


def score(
    network: nn.Module,
    family: Family,
    tensors: Mapping[str, Tensor],
    settings: TokenSettings,
    *,
    image_token: int,
    pad_id: int,
    features_of: FeaturesOf,
) -> Scores:
    """Scores (G, K, U) of a batch of :mod:`polyalign.modalities.vlm.batches`: log-probabilities of answers' tokens in nats."""
    layout, prompts, inputs = _rows(network, family, tensors, settings, image_token, pad_id)
    inputs |= about_prompts(family, layout, prompts, image_token)
    inputs |= pictures_for(network, family, tensors, prompts, features_of)
    return score_rows(network, layout, inputs, tensors["completion_ids"], settings)


def _rows(
    network: nn.Module,
    family: Family,
    tensors: Mapping[str, Tensor],
    settings: TokenSettings,
    image_token: int,
    pad_id: int,
) -> tuple[Layout, Prompts, dict[str, Any]]:
    """Rows for the network, shared or separate, and their ids, positions and masks."""
    layout, prompts = separate(tensors)
    if settings.prefix_sharing == "off" or tensors["prompt_of"].shape[1] == 1:
        return layout, prompts, layout.inputs()
    tree, shared_prompts = shared(tensors, image_token, pad_id)
    rows, columns = layout.ids.shape
    config = plain(network).config.get_text_config()
    if settings.prefix_sharing != "on" and not pays(config, tree, (rows, columns)):
        return layout, prompts, layout.inputs()
    reason = why_not_shared(network, family, tree)
    if reason is None:
        return tree, shared_prompts, shared_rows_inputs(network, family, tree, image_token)
    if settings.prefix_sharing == "on":
        raise UserError(
            f"prefix_sharing is on, and {type(plain(network)).__name__} cannot share prompts: {reason}. Set it to auto or off"
        )
    announce(network, reason)
    return layout, prompts, layout.inputs()


def why_not_shared(network: nn.Module, family: Family, layout: SharedLayout) -> str | None:
    """Why prompts cannot be shared, in words, or None."""
    if not family.tested:
        return f"{family.name} is not among the families whose pictures are known to allow it"
    if not family.mutual:
        return why_not(network, layout)
    attention = plain(network).config._attn_implementation
    return None if attention in ("sdpa", "eager") else f"its attention ({attention}) takes no mask of such a form; sdpa does"


def shared_rows_inputs(network: nn.Module, family: Family, layout: SharedLayout, image_token: int) -> dict[str, Any]:
    """Ids, positions and masks of shared rows. Where tokens of a picture see one another (Gemma3) the prompt is not plainly
    causal, and there are two masks: that of layers which look back a while counts positions, not columns."""
    if not family.mutual:
        return shared_inputs(network, layout)
    assert layout.positions is not None
    is_image = layout.ids == image_token
    begins = is_image & ~functional.pad(is_image, (1, 0))[:, :-1]
    block = torch.where(is_image, begins.cumsum(1), 0)
    same = (block.unsqueeze(1) == block.unsqueeze(2)) & is_image.unsqueeze(1)
    visible = layout.visible() | same
    masks = {"full_attention": mask_for(network, visible)}
    window = getattr(plain(network).config.get_text_config(), "sliding_window", None)
    if window is not None:
        near = layout.positions.unsqueeze(1) > layout.positions.unsqueeze(2) - window
        masks["sliding_attention"] = mask_for(network, visible & near)
    return layout.inputs() | {"attention_mask": masks}


def about_prompts(family: Family, layout: Layout, prompts: Prompts, image_token: int) -> dict[str, Tensor]:
    """Positions and types of the tokens of rows, where a family has its own."""
    found = {}
    if family.types is not None:
        found[family.types] = (layout.ids == image_token).int()
    if prompts.known is not None:
        found["position_ids"] = prompts.positions(layout)
    return found


def pictures_for(
    network: nn.Module, family: Family, tensors: Mapping[str, Tensor], prompts: Prompts, features_of: FeaturesOf
) -> dict[str, Any]:
    """What the forward pass is given of the pictures of rows, each different one computed once."""
    keys, places = tensors["picture_key"].tolist(), tensors["prompt_pictures"]
    rows = [
        [(group, place) for place in places[group, number].tolist() if place >= 0]
        for group, number in zip(prompts.group.tolist(), prompts.number.tolist(), strict=True)
    ]
    first = {keys[group][place]: (group, place) for row in reversed(rows) for group, place in reversed(row)}
    parameter = next(network.parameters())
    if not family.takes_features:
        parts = [[inputs_of(tensors, *first[keys[group][place]]) for group, place in row] for row in rows]
        return as_pixels(parts, parameter)
    found = {key: features_of(key, inputs_of(tensors, *at)) for key, at in first.items()}
    return as_argument([found[keys[group][place]] for row in rows for group, place in row], parameter.device)
