"""What the makers of pairs say of how they were drawn (:mod:`polyalign.evaluation.selection`), as the rules read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError


class _Words(BaseModel):
    distance: float
    by_chance: float
    most: list[tuple[str, float, float]]


class _Block(BaseModel):
    questions: int = Field(ge=1)
    right: int
    pairs: int = Field(ge=1)
    pairs_of_right: int
    words: _Words | None = None


@dataclass(frozen=True)
class Selection:
    """``right``: share of the questions that the base got right; ``of_right``: share of the pairs that are of these.
    ``distance`` and ``by_chance`` of the telling words, None where none were counted; ``most``: (word, share in the pairs,
    share in all questions)."""

    questions: int
    pairs: int
    right: float
    of_right: float
    distance: float | None
    by_chance: float
    most: tuple[tuple[str, float, float], ...]


def read_selection(summary: Mapping[str, Any] | None, least_pairs: int, missing: list[str]) -> Selection | None:
    """``selection`` of pairs/summary.json; None where nothing wrote it, where there are fewer pairs than ``least_pairs``, and,
    with a line in ``missing``, where it is another thing."""
    given = (summary or {}).get("selection")
    if given is None:
        return None
    try:
        block = _Block.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        missing.append(f"pairs/summary.json: selection is not how pairs were drawn ({first['msg']})")
        return None
    if block.pairs < least_pairs:
        return None
    words = block.words
    return Selection(
        questions=block.questions,
        pairs=block.pairs,
        right=block.right / block.questions,
        of_right=block.pairs_of_right / block.pairs,
        distance=None if words is None else words.distance,
        by_chance=0.0 if words is None else words.by_chance,
        most=() if words is None else tuple(words.most),
    )
