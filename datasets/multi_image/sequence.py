"""MIA-DPO's sequences (arXiv 2410.17637): several images in a row, each behind its name, and a question about one of them.

``Image1:<image>\\nImage2:<image>\\nIn Image2, what ...``, two to five images, mostly two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from polyalign.datasets.multi_image.drawing import Plan, Rows, check_counts, planned
from polyalign.datasets.multi_image.named import named_row
from polyalign.datasets.multi_image.rows import IMAGE, Arrangement, Place, text
from polyalign.datasets.multi_image.sources import Questions

COUNTS: Mapping[int, float] = {2: 1200, 3: 350, 4: 350, 5: 295}
"""How many of 2,195 questions were given how many images, as published for TextVQA; shared out alike in every source."""

NUMBERS = range(2, 17)


def arranged(pictures: Sequence[Image.Image]) -> Arrangement:
    """The pictures one after another, unchanged."""
    opening = [part for number in range(1, len(pictures) + 1) for part in (text(f"\nImage{number}:"), IMAGE)]
    opening[0] = text("Image1:")
    places = tuple(Place(index, (0, 0, *picture.size)) for index, picture in enumerate(pictures))
    return Arrangement("sequence", tuple(pictures), (*opening, text("\n")), places)


def build(
    questions: Questions,
    *,
    seed: int,
    counts: Mapping[int, float] = COUNTS,
    limit: int | None = None,
    turns: int = 1,
    across_sources: bool = False,
) -> Rows:
    """A row for each question.

    Args:
        counts: shares of the numbers of images.
        limit: at most so many rows.
        turns: how many turns of a longer conversation are kept; the last answer kept is ``chosen``. The published pairs have 1.
        across_sources: distractors from all sources, not only from the question's own.

    Raises:
        UserError: counts that are not possible with these data.
    """
    check_counts(counts, NUMBERS, "a sequence")
    plans = planned(questions, "sequence", counts, seed=seed, limit=limit, across_sources=across_sources)

    def compose(plan: Plan, pictures: list[Image.Image]) -> dict[str, Any]:
        return named_row(questions, plan, arranged(pictures), turns)

    return Rows("sequence", questions, plans, compose)
