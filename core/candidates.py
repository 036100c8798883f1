"""What a preference is: a group of candidates with a target distribution over them.

A candidate is a *condition and an output together*, not an output alone: two answers to one prompt share the condition, the
visual terms of Re-Align and MCM-DPO share the answer and vary the image, ADPO compares k answers. All are groups.

Letters: G groups in a batch, K candidates in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """One output under one condition."""

    condition: Any
    output: Any


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates of one comparison. ``target`` is the distribution of preference over them: ``(1, 0)`` for a plain pair
    (chosen first), ``(1 - e, e)`` for a label that is wrong with probability e, ``(0.5, 0.5)`` for a tie.

    ``margins`` are fixed rewards of other objectives (MODPO's w'r, one number a candidate, on the reward scale);
    ``desirable`` is for unpaired methods; ``weight`` multiplies the group's loss.
    """

    group_id: str
    candidates: tuple[Candidate, ...]
    target: tuple[float, ...] = (1.0, 0.0)
    margins: tuple[float, ...] | None = None
    desirable: tuple[bool, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        count = len(self.candidates)
        for name in ("target", "margins", "desirable"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"group {self.group_id!r}: {count} candidates but {len(values)} values in {name}")


@dataclass(frozen=True)
class Batch:
    """G groups of K candidates as tensors.

    ``tensors`` is the modality's own: each entry has leading dimensions (G, K, ...) or, where the candidates of a group share
    it, (G, ...). Everything in it is cut along the first dimension, so a micro-batch is ``batch[0:2]``.
    """

    group_ids: tuple[str, ...]
    target: Tensor  # (G, K)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    margins: Tensor | None = None  # (G, K)
    desirable: Tensor | None = None  # (G, K) bool, or the probability in [0, 1] that a candidate is desirable
    weight: Tensor | None = None  # (G,)

    def __len__(self) -> int:
        return len(self.group_ids)

    def __getitem__(self, part: slice) -> Batch:
        return replace(
            self,
            group_ids=self.group_ids[part],
            tensors={name: tensor[part] for name, tensor in self.tensors.items()},
            **{name: value[part] for name, value in self._own_tensors().items()},
        )

    def of_candidates(self, places: Sequence[int]) -> Batch:
        """The preference side of some candidates of each group, for a comparison of a few among several. The target is scaled
        to a distribution over them, even where they had no share of it. ``tensors`` stay out: they are for scoring, which is
        done."""
        index = torch.tensor(places, device=self.target.device)
        target = self.target.index_select(1, index)
        share = target.sum(1, keepdim=True)
        target = torch.where(share > 0, target / torch.where(share > 0, share, 1.0), 1.0 / len(places))
        own = {name: getattr(self, name) for name in ("margins", "desirable")}
        parts = {name: None if value is None else value.index_select(1, index) for name, value in own.items()}
        return replace(self, target=target, tensors={}, **parts)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            **{name: value.to(device) for name, value in self._own_tensors().items()},
        )

    def _own_tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("target", "margins", "desirable", "weight")}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of_groups(cls, groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> Batch:
        """Collate the preference side of ``groups``; ``tensors`` are already collated by the modality.

        Raises:
            ValueError: no groups, groups of different sizes, or margins given for some groups only.
        """
        if not groups:
            raise ValueError("a batch needs at least one group")
        sizes = {len(group.candidates) for group in groups}
        if len(sizes) != 1:
            raise ValueError(f"groups of one batch must have the same number of candidates, found {sorted(sizes)}")

        def column(name: str, dtype: torch.dtype) -> Tensor | None:
            values = [getattr(group, name) for group in groups]
            missing = [group.group_id for group, value in zip(groups, values, strict=True) if value is None]
            if len(missing) == len(groups):
                return None
            if missing:
                raise ValueError(f"{name} is given for some groups but not for {missing[:3]}")
            return torch.tensor(values, dtype=dtype)

        target = column("target", torch.float32)
        assert target is not None
        return cls(
            group_ids=tuple(group.group_id for group in groups),
            target=target,
            tensors=tensors,
            margins=column("margins", torch.float32),
            desirable=column("desirable", torch.bool),
            weight=column("weight", torch.float32),
        )
