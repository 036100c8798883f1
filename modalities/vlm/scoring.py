"""Token likelihoods of answers to prompts with pictures (:mod:`polyalign.core.likelihood.tokens`).

Letters: G groups, K candidates in a group, M different prompts of a group, V different prompts of the batch, R rows of a
forward pass, L their length, U completion tokens, A axes of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyalign.core.errors import UserError
from polyalign.core.likelihood.prefix_sharing import announce, mask_for, pays, shared_inputs, why_not
from polyalign.core.likelihood.tokens import TokenSettings, score_rows
from polyalign.core.likelihood.tokens_rows import Layout, Lengths, SharedLayout, separate_rows, shared_rows
from polyalign.core.scores import Scores
from polyalign.modalities.transformers_folders import plain
from polyalign.modalities.vlm.batches import inputs_of
from polyalign.modalities.vlm.families import Family
from polyalign.modalities.vlm.features import Features, as_argument, as_pixels

PADDING = -2
"""The owner of a shared row's columns that hold nothing."""

FeaturesOf = Callable[[int, Mapping[str, Tensor]], Features]
"""The features of a picture, by its key and its arguments of the vision tower."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of rows: which group and which of its prompts each row begins with (R,), with their ids and masks (R, P)."""

    group: Tensor
    number: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor | None  # (R, A, P)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], group: Tensor, number: Tensor) -> Prompts:
        positions = tensors.get("prompt_positions")
        picked = None if positions is None else positions[group, number]
        return cls(group, number, tensors["prompt_ids"][group, number], tensors["prompt_mask"][group, number], picked)


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
    tree, shared_prompts = shared(tensors, pad_id)
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


def separate(tensors: Mapping[str, Tensor]) -> tuple[Layout, Prompts]:
    """A row for each candidate, R = G K: its own prompt and its answer."""
    number = tensors["prompt_of"].flatten()
    groups, candidates = tensors["prompt_of"].shape
    group = torch.arange(groups, device=number.device).repeat_interleave(candidates)
    prompts = Prompts.of(tensors, group, number)
    alone = {
        "prompt_ids": prompts.ids,
        "prompt_mask": prompts.mask,
        "completion_ids": tensors["completion_ids"].flatten(0, 1).unsqueeze(1),
        "completion_mask": tensors["completion_mask"].flatten(0, 1).unsqueeze(1),
    }
    layout = separate_rows(alone, Lengths.of(alone))
    return Layout(layout.ids, layout.predicting, tensors["completion_mask"].bool()), prompts


def shared(tensors: Mapping[str, Tensor], pad_id: int) -> tuple[SharedLayout, Prompts]:
    """A row for each different prompt, R = V, with all answers to it behind it."""
    prompt_of = tensors["prompt_of"].tolist()
    rows: dict[tuple[int, int], int] = {}
    behind: dict[int, int] = {}  # answers that a row has so far
    row_of, slot_of = [], []
    for group, numbers in enumerate(prompt_of):
        for number in numbers:
            row = rows.setdefault((group, number), len(rows))
            row_of.append(row)
            slot_of.append(behind.get(row, 0))
            behind[row] = slot_of[-1] + 1
    device = tensors["prompt_ids"].device
    group, number = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))
    place = torch.tensor(row_of, device=device), torch.tensor(slot_of, device=device)
    prompts, mask = Prompts.of(tensors, group, number), tensors["completion_mask"].bool()
    shape = (len(rows), max(behind.values()), mask.shape[-1])
    grouped = {"prompt_ids": prompts.ids, "prompt_mask": prompts.mask}
    for name in ("completion_ids", "completion_mask"):
        given = tensors[name].flatten(0, 1)
        grouped[name] = given.new_zeros(shape).index_put(place, given)
    tree = shared_rows(grouped, Lengths.of(grouped))
    predicting = torch.zeros(shape, dtype=torch.long, device=device)
    predicting[tree.mask] = tree.predicting
    predicting = predicting[place].reshape(mask.shape)[mask]  # as the candidates come in the batch
    assert tree.owner is not None
    ids = torch.where(tree.owner == PADDING, pad_id, tree.ids)  # a repeated last token could be an image's
    return replace(tree, ids=ids, predicting=predicting, mask=mask), prompts


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
    if prompts.positions is not None:
        found["position_ids"] = _positions(layout, prompts)
    return found


def _positions(layout: Layout, prompts: Prompts) -> Tensor:
    """Positions (A, R, L): the prompt's own, and behind it from the highest of them upwards, on every axis alike."""
    assert prompts.positions is not None
    rows, length = layout.ids.shape
    padded = prompts.ids.shape[1]
    columns = torch.arange(length, device=layout.ids.device)
    along = columns.expand(rows, -1) if layout.positions is None else layout.positions
    before = prompts.lengths.unsqueeze(1)
    source = (columns + padded - before).clamp(max=padded - 1)  # (R, L), where a prompt's column is in the padded one
    own = prompts.positions.gather(2, source.unsqueeze(1).expand(-1, prompts.positions.shape[1], -1))
    after = prompts.positions.amax((1, 2)).unsqueeze(1) + 1 + along - before
    return torch.where((columns < before).unsqueeze(1), own, after.unsqueeze(1)).transpose(0, 1)


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
