"""Rows of one batch as tensors. A group's prompts and pictures are there once, whichever of its candidates have them.

Letters: G groups, K candidates in a group, M different prompts of a group, P their padded length, J pictures of a prompt, I
different pictures of a group, U completion tokens, A axes of positions.

| tensor | |
| --- | --- |
| ``prompt_ids``, ``prompt_mask`` (G, M, P) | padded on the left; an unused place has one token |
| ``prompt_positions`` (G, M, A, P) | where they are not 0, 1, 2, ... |
| ``prompt_pictures`` (G, M, J) | which of the group's pictures stand in the prompt, in order; -1 is none |
| ``prompt_of`` (G, K) | the prompt of each candidate |
| ``completion_ids``, ``completion_mask`` (G, K, U) | padded on the right |
| ``picture_key`` (G, I) | equal where pictures are; 0 is none |
| ``picture.NAME`` (G, I, ...) | arguments of the vision tower, padded with zeros |
| ``picture_shape.NAME`` (G, I, n) | their shapes without padding |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyalign.modalities.token_rows import padded_completions, padded_left
from polyalign.modalities.vlm.processing import Picture, Prompt

PICTURE, SHAPE = "picture.", "picture_shape."


@dataclass(frozen=True)
class VlmRow:
    """A row's different prompts, and of each candidate the prompt's place and the answer's ids."""

    prompts: tuple[Prompt, ...]
    prompt_of: tuple[int, ...]
    completions: tuple[list[int], ...]

    @property
    def pictures(self) -> list[Picture]:
        """The row's different pictures."""
        return list({picture.key: picture for prompt in self.prompts for picture in prompt.pictures}.values())


def collate(rows: Sequence[VlmRow], pad_id: int) -> dict[str, Tensor]:
    """The tensors of a batch."""
    prompts = max(len(row.prompts) for row in rows)
    filled = [[*row.prompts, *[_NONE] * (prompts - len(row.prompts))] for row in rows]
    flat = [prompt for row in filled for prompt in row]
    ids, mask = padded_left([prompt.ids or [pad_id] for prompt in flat], pad_id)
    completion_ids, completion_mask = padded_completions([row.completions for row in rows], pad_id)
    tensors = {
        "prompt_ids": ids.unflatten(0, (-1, prompts)),
        "prompt_mask": mask.unflatten(0, (-1, prompts)),
        "prompt_pictures": _places(rows, prompts),
        "prompt_of": torch.tensor([row.prompt_of for row in rows]),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    axes = next((len(prompt.positions) for prompt in flat if prompt.positions is not None), 0)
    if axes:
        positions = torch.zeros(len(flat), axes, ids.shape[1], dtype=torch.long)
        for place, prompt in enumerate(flat):
            if prompt.positions is not None:
                positions[place, :, ids.shape[1] - len(prompt.ids) :] = prompt.positions
        tensors["prompt_positions"] = positions.unflatten(0, (-1, prompts))
    return tensors | stacked([row.pictures for row in rows])


_NONE = Prompt([])


def _places(rows: Sequence[VlmRow], prompts: int) -> Tensor:
    most = max(len(prompt.pictures) for row in rows for prompt in row.prompts)
    found = torch.full((len(rows), prompts, most), -1)
    for group, row in enumerate(rows):
        places = {picture.key: place for place, picture in enumerate(row.pictures)}
        for number, prompt in enumerate(row.prompts):
            for at, picture in enumerate(prompt.pictures):
                found[group, number, at] = places[picture.key]
    return found


def stacked(pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """The pictures of groups as tensors padded to one shape, with their shapes."""
    groups, most = len(pictures), max(map(len, pictures))
    keys = torch.zeros(groups, most, dtype=torch.long)
    tensors = {"picture_key": keys}
    samples = {name: tensor for row in pictures for picture in row for name, tensor in picture.inputs.items()}
    for name, sample in samples.items():
        every = [picture.inputs[name].shape for row in pictures for picture in row]
        largest = [max(sizes) for sizes in zip(*every, strict=True)]
        tensors[PICTURE + name] = torch.zeros(groups, most, *largest, dtype=sample.dtype)
        tensors[SHAPE + name] = torch.zeros(groups, most, sample.ndim, dtype=torch.long)
    for group, row in enumerate(pictures):
        for place, picture in enumerate(row):
            keys[group, place] = picture.key
            for name, tensor in picture.inputs.items():
                tensors[PICTURE + name][(group, place, *map(slice, tensor.shape))] = tensor
                tensors[SHAPE + name][group, place] = torch.tensor(tensor.shape)
    return tensors


def inputs_of(tensors: Mapping[str, Tensor], group: int, place: int) -> dict[str, Tensor]:
    """One picture's arguments of the vision tower, without padding."""
    found = {}
    for key, tensor in tensors.items():
        if key.startswith(PICTURE):
            shape = tensors[SHAPE + key.removeprefix(PICTURE)][group, place].tolist()
            found[key.removeprefix(PICTURE)] = tensor[(group, place, *map(slice, shape))]
    return found
