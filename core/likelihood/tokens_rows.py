"""Rows for a causal language model, from padded prompts and completions.

Rows begin with the prompt's first token and have their padding at the end, where causal models of any kind never look back
from: so no mask is needed, and the fastest attention there is can be used.

Letters: G groups, K candidates in a group, P and U padded lengths of prompts and completions, R rows, L their length, N tokens
of completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """``ids`` (R, L); ``predicting`` (N,), where in the flattened rows the state stands that predicts each token under ``mask``
    (G, K, U)."""

    ids: Tensor
    predicting: Tensor
    mask: Tensor
    positions: Tensor | None = None  # (R, L), where they are not 0, 1, 2, ...

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids} | ({} if self.positions is None else {"position_ids": self.positions})


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts (G,) and of completions (G, K)."""

    prompt: Tensor
    completion: Tensor
    mask: Tensor  # (G, K, U)

    @property
    def read(self) -> Tensor:
        """Tokens of completions that are read (G, K): all but the last, which is only predicted."""
        return (self.completion - 1).clamp(min=0)

    @property
    def separate(self) -> tuple[int, int]:
        """Rows and columns of separate rows."""
        return self.completion.numel(), int((self.prompt.unsqueeze(1) + self.read).max())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Lengths:
        """Raises ValueError for an empty prompt, or padding on the wrong side."""
        prompt, mask = tensors["prompt_mask"].bool(), tensors["completion_mask"].bool()
        wrong = (prompt[:, :-1] & ~prompt[:, 1:]).any() | (mask[..., 1:] & ~mask[..., :-1]).any()
        if bool(wrong | ~prompt.any(1).all()):
            raise ValueError(
                "a prompt has at least one token and its padding on the left, a completion its padding on the right "
                "(prompt_mask, completion_mask)"
            )
        return cls(prompt.sum(1), mask.sum(2), mask)


def separate_rows(tensors: Mapping[str, Tensor], lengths: Lengths) -> Layout:
    """A row for each candidate, R = G K: its prompt and its completion but for the last token."""
    prompts, completions = tensors["prompt_ids"], tensors["completion_ids"]
    groups, candidates, units = completions.shape
    padded = prompts.shape[1]
    source = torch.cat([prompts.unsqueeze(1).expand(-1, candidates, -1), completions], 2)  # prompt and completion touch
    _, length = lengths.separate
    places = torch.arange(length, device=prompts.device) + (padded - lengths.prompt).reshape(-1, 1, 1)
    ids = source.gather(2, places.clamp(max=padded + units - 1).expand(-1, candidates, -1))
    rows = torch.arange(groups * candidates, device=prompts.device).reshape(groups, candidates, 1)
    before = lengths.prompt.reshape(-1, 1, 1) - 1 + torch.arange(units, device=prompts.device)
    return Layout(ids.flatten(0, 1), (rows * length + before)[lengths.mask], lengths.mask)


@dataclass(frozen=True)
class SharedLayout(Layout):
    """One row for each group: [prompt | completion 1 | ... | completion K], padded behind the prompt and at the end.

    ``prompt_columns`` is where completions begin in all rows; ``owner`` (R, L) is the candidate of each column: -1 for the
    prompt, -2 for padding. ``parent`` (R, L), where completions follow on others: the one before that of each column, or -1.
    """

    prompt_columns: int = 0
    owner: Tensor | None = None
    parent: Tensor | None = None

    def visible(self) -> Tensor:
        """(R, L, L) bool: which columns (last) each column sees. The prompt sees its own past; a completion the prompt, its
        parent and its own past. Padding sees what is before it: what comes of it is never used, but it must be a number."""
        assert self.owner is not None
        owner, length = self.owner, self.owner.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
        seen = (owner.unsqueeze(1) == -1) | (owner.unsqueeze(1) == owner.unsqueeze(2))
        if self.parent is not None:
            seen |= owner.unsqueeze(1) == self.parent.unsqueeze(2)
        return past & seen


def shared_rows(tensors: Mapping[str, Tensor], lengths: Lengths) -> SharedLayout:
    """A row for each group, R = G. Positions begin anew behind the prompt with each completion."""
    prompts, completions = tensors["prompt_ids"], tensors["completion_ids"]
    groups, units, device = completions.shape[0], completions.shape[2], prompts.device
    padded, columns = prompts.shape[1], int(lengths.prompt.max())
    steps = torch.arange(max(columns, units), device=device)
    source = (steps[:columns] + (padded - lengths.prompt).unsqueeze(1)).clamp(max=padded - 1)
    starts = columns + lengths.read.cumsum(1) - lengths.read  # (G, K), the column of a completion's first token
    total = columns + int(lengths.read.sum(1).max())
    ids = prompts.new_zeros(groups, total)
    ids[:, :columns] = prompts.gather(1, source)
    positions = torch.zeros(groups, total, dtype=torch.long, device=device)
    positions[:, :columns] = steps[:columns]
    owner = torch.full((groups, total), -2, device=device)
    owner[:, :columns] = torch.where(steps[:columns] < lengths.prompt.unsqueeze(1), -1, -2)
    group, candidate, unit = (steps[:units] < lengths.read.unsqueeze(2)).nonzero(as_tuple=True)
    column = starts[group, candidate] + unit
    ids[group, column] = completions[group, candidate, unit]
    positions[group, column] = lengths.prompt[group] + unit
    owner[group, column] = candidate
    before = torch.where(
        steps[:units] == 0, lengths.prompt.reshape(-1, 1, 1) - 1, starts.unsqueeze(2) + steps[:units] - 1
    ) + total * torch.arange(groups, device=device).reshape(-1, 1, 1)
    return SharedLayout(ids, before[lengths.mask], lengths.mask, positions, columns, owner)
