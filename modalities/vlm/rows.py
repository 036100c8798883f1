"""Rows of a forward pass from the prompts and answers of a batch (:mod:`polyalign.modalities.vlm.batches`).

Letters: G groups, K candidates in a group, M different prompts of a group, P their padded length, R rows of a forward pass, L
their length, S pieces behind a row's beginning, U completion tokens, A axes of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyalign.core.likelihood.tokens_rows import Layout, Lengths, SharedLayout, separate_rows, shared_rows

PADDING = -2
"""The owner of a shared row's columns that hold nothing."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of rows: which group and which of its prompts each row begins with (R,), with their ids and masks (R, P).

    ``columns`` (R, L) is the prompt that each column belongs to, where a row has several of them.
    """

    group: Tensor
    number: Tensor
    ids: Tensor
    mask: Tensor
    lengths: Tensor  # (G, M), of all prompts
    known: Tensor | None  # (G, M, A, P), positions of all prompts
    columns: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], group: Tensor, number: Tensor) -> Prompts:
        ids, mask = tensors["prompt_ids"][group, number], tensors["prompt_mask"][group, number]
        return cls(group, number, ids, mask, tensors["prompt_mask"].sum(-1), tensors.get("prompt_positions"))

    def positions(self, layout: Layout) -> Tensor:
        """Positions (A, R, L): the prompt's own, and behind it from the highest of them upwards, on every axis alike."""
        assert self.known is not None
        rows, length = layout.ids.shape
        along = (
            torch.arange(length, device=layout.ids.device).expand(rows, -1) if layout.positions is None else layout.positions
        )
        group = self.group.unsqueeze(1)
        number = self.number.unsqueeze(1).expand(-1, length) if self.columns is None else self.columns
        before, padded = self.lengths[group, number], self.known.shape[-1]
        own = self.known[group, number, :, (along + padded - before).clamp(max=padded - 1)]  # (R, L, A)
        after = self.known.amax((2, 3))[group, number] + 1 + along - before
        return torch.where((along < before).unsqueeze(2), own, after.unsqueeze(2)).permute(2, 0, 1)


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


@dataclass(frozen=True)
class Beginning:
    """Prompts of a group that share a row: their numbers, and how many first tokens they have in common. A prompt by itself is
    its own beginning, and ends there."""

    group: int
    numbers: tuple[int, ...]
    length: int


def beginnings(tensors: Mapping[str, Tensor], image_token: int) -> list[Beginning]:
    """The rows that a batch's prompts make.

    Prompts of a group share one if they have the same pictures in what they have in common, none behind it, and if that is half
    of each of them at least: other questions about the same pictures. Each then ends with one token of its own or more.
    """
    ids, lengths = tensors["prompt_ids"].cpu(), tensors["prompt_mask"].sum(-1).tolist()
    pictures = tensors["prompt_pictures"].tolist()
    found: list[Beginning] = []
    for group, numbers in enumerate(tensors["prompt_of"].tolist()):
        rows: list[Beginning] = []
        texts = {number: ids[group, number, ids.shape[-1] - lengths[group][number] :] for number in set(numbers)}
        for number in dict.fromkeys(numbers):
            for place, row in enumerate(rows):
                alike = pictures[group][number] == pictures[group][row.numbers[0]]
                together = (*row.numbers, number)
                length = _common([texts[one] for one in together], image_token) if alike else 0
                if length:
                    rows[place] = Beginning(group, together, length)
                    break
            else:
                rows.append(Beginning(group, (number,), lengths[group][number]))
        found += rows
    return found


def _common(texts: list[Tensor], image_token: int) -> int:
    """How many first tokens prompts share; 0 if it is not worth it, or a picture stands behind them."""
    shortest = min(map(len, texts)) - 1
    first = texts[0][:shortest]
    differ = torch.stack([text[:shortest] != first for text in texts]).any(0).nonzero()
    length = int(differ[0]) if len(differ) else shortest
    short = 2 * length < max(map(len, texts))
    return 0 if short or any(bool((text[length:] == image_token).any()) for text in texts) else length


def shared(tensors: Mapping[str, Tensor], image_token: int, pad_id: int) -> tuple[SharedLayout, Prompts]:
    """A row for each beginning of prompts, R rows, and behind it in pieces what follows: where prompts share it their ends, and
    all answers."""
    pieces = _Pieces.of(tensors, beginnings(tensors, image_token))
    prompts, mask = pieces.prompts, tensors["completion_mask"].bool()
    grouped = pieces.grouped(tensors)
    tree = shared_rows(grouped, Lengths.of(grouped))
    owner, positions = tree.owner, tree.positions
    assert owner is not None and positions is not None
    predicting = torch.zeros(grouped["completion_mask"].shape, dtype=torch.long, device=mask.device)
    predicting[tree.mask] = tree.predicting
    row, slot = pieces.place
    predicting, ends = predicting[row, slot, : mask.shape[-1]], predicting[row, pieces.parent[row, slot]]
    after = pieces.shift[row, slot]  # of answers behind an end of a prompt, which predicts their first token
    first = torch.where(after > 0, ends.gather(1, after.unsqueeze(1)).squeeze(1), predicting[:, 0])
    predicting = torch.cat([first.unsqueeze(1), predicting[:, 1:]], 1).reshape(mask.shape)[mask]  # as they come in the batch

    def of_columns(table: Tensor, otherwise: Tensor | int) -> Tensor:
        return torch.where(owner >= 0, table.gather(1, owner.clamp(min=0)), otherwise)

    layout = replace(
        tree,
        ids=torch.where(owner == PADDING, pad_id, tree.ids),  # a repeated last token could be an image's
        predicting=predicting,
        mask=mask,
        positions=positions + of_columns(pieces.shift, 0),
        parent=of_columns(pieces.parent, -1),
    )
    return layout, replace(prompts, columns=of_columns(pieces.number, prompts.number.unsqueeze(1)))


@dataclass(frozen=True)
class _Pieces:
    """What stands behind the beginnings of rows, (R, S) each: of an answer, its prompt's ``number``, the piece with the end of
    that prompt (``parent``, -1: none) and how long it is (``shift``). ``place``: row and slot of each answer (G K,)."""

    rows: list[Beginning]
    prompts: Prompts
    number: Tensor
    parent: Tensor
    shift: Tensor
    place: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rows: list[Beginning]) -> _Pieces:
        device, lengths = tensors["prompt_ids"].device, tensors["prompt_mask"].sum(-1).tolist()
        pieces = [  # (number, parent, shift) of each piece; ends come first
            [(number, -1, 0) for number in row.numbers] if len(row.numbers) > 1 else [] for row in rows
        ]
        row_of = {(row.group, number): place for place, row in enumerate(rows) for number in row.numbers}
        place = []
        for group, numbers in enumerate(tensors["prompt_of"].tolist()):
            for number in numbers:
                at = row_of[group, number]
                place.append((at, len(pieces[at])))
                alone = len(rows[at].numbers) == 1
                parent = -1 if alone else rows[at].numbers.index(number)
                pieces[at].append((number, parent, 0 if alone else lengths[group][number] - rows[at].length))
        most = max(map(len, pieces))
        table = torch.tensor([[*row, *[(0, -1, 0)] * (most - len(row))] for row in pieces], device=device)
        firsts = torch.tensor([(row.group, row.numbers[0]) for row in rows], device=device)
        row, slot = torch.tensor(place, device=device).unbind(1)
        number, parent, shift = table.unbind(2)
        return cls(rows, Prompts.of(tensors, *firsts.unbind(1)), number, parent, shift, (row, slot))

    def grouped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Beginnings as prompts, pieces as their completions, as :func:`shared_rows` takes them. Of a completion the last token
        is not read, so that the end of a prompt has one more, which is never looked at."""
        ids, mask, device = self.prompts.ids, self.prompts.mask, self.prompts.ids.device
        columns = torch.arange(ids.shape[1], device=device)
        cut = mask.sum(1, keepdim=True) - torch.tensor([[row.length] for row in self.rows], device=device)
        source = (columns - cut).clamp(min=0)
        grouped = {"prompt_ids": ids.gather(1, source), "prompt_mask": mask.gather(1, source) * (columns >= cut)}
        units = max(tensors["completion_mask"].shape[-1], int(self.shift.max()) + 1)
        shape = (*self.number.shape, units)
        for name in ("completion_ids", "completion_mask"):
            given = tensors[name].flatten(0, 1)
            given = torch.nn.functional.pad(given, (0, units - given.shape[1]))
            grouped[name] = given.new_zeros(shape).index_put(self.place, given)
        lengths = tensors["prompt_mask"].sum(-1).tolist()
        for place, row in enumerate(self.rows):
            for slot, number in enumerate(row.numbers if len(row.numbers) > 1 else ()):
                end = lengths[row.group][number] - row.length
                grouped["completion_ids"][place, slot, :end] = tensors["prompt_ids"][row.group, number, -end:]
                grouped["completion_mask"][place, slot, : end + 1] = 1
        return grouped
