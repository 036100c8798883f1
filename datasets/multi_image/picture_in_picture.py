"""MIA-DPO's pictures in pictures (arXiv 2410.17637): the image that is asked about, in the middle of another.

It fills 0.7 of the other's width or height, as its proportions let it. The published phrasings, about 90, are not listed
anywhere; those here are put together from their two published examples' parts and are as many.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image.drawing import Plan, Rows, keyed, planned
from polyalign.datasets.multi_image.grid import fitted
from polyalign.datasets.multi_image.named import confusions, finished, lowered
from polyalign.datasets.multi_image.rows import IMAGE, Arrangement, Box, Place, asked, text
from polyalign.datasets.multi_image.sources import Item, Questions

SHARE = 0.7
"""Of the width and of the height of the picture behind."""

LEFT_OUT = ("vg",)
"""Sources that the published data leave out here: Visual Genome asks for regions by their coordinates."""

_LEADS = ("Regarding", "For", "In", "Considering", "Looking at", "With respect to")
_WHERE = ("the central {}", "the {} in the center", "the {} in the middle")
_WHAT = ("image", "picture", "subplot", "inset", "smaller picture")
PHRASINGS = tuple(f"{lead} {where.format(what)}" for lead, where, what in product(_LEADS, _WHERE, _WHAT))

_BOX = re.compile(r"\[\s*\d*\.?\d+\s*(?:,\s*\d*\.?\d+\s*){3}\]")


def has_box(item: Item) -> bool:
    """Whether a question or an answer gives coordinates, ``[0.1, 0.2, 0.5, 0.9]``, which hold in the single picture alone."""
    return any(_BOX.search(words) for turn in item.turns for words in (turn.question, turn.answer))


def inset_box(inner: tuple[int, int], outer: tuple[int, int]) -> Box:
    """Where a picture of size ``inner`` (width, height) lies in one of size ``outer``."""
    width, height = fitted(inner, (SHARE * outer[0], SHARE * outer[1]))
    left, top = (outer[0] - width) // 2, (outer[1] - height) // 2
    return left, top, left + width, top + height


def arranged(background: Image.Image, picture: Image.Image) -> Arrangement:
    """``picture`` in ``background``; the places are the one in the middle, then the whole."""
    box = inset_box(picture.size, background.size)
    sheet = background.copy()
    sheet.paste(picture.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2])
    places = (Place(0, box), Place(0, (0, 0, *background.size)))
    return Arrangement("picture_in_picture", (sheet,), (IMAGE, text("\n")), places)


def build(
    questions: Questions,
    *,
    seed: int,
    limit: int | None = None,
    left_out: Sequence[str] = LEFT_OUT,
    across_sources: bool = False,
) -> Rows:
    """A row for each question about a picture, without those that give coordinates.

    Args:
        limit: at most so many rows.
        left_out: sources that are not asked about.
        across_sources: backgrounds from all sources, not only from the question's own.

    Raises:
        UserError: no question is left, or a source has a single picture.
    """
    items = [item for item in questions.items if item.source not in left_out and not has_box(item)]
    if not items:
        raise UserError(
            f"{questions.folder}: all {len(questions.items)} question(s) give coordinates or are of the sources "
            f"{', '.join(left_out) or 'none'}, and cannot be asked of a picture in a picture"
        )
    kind = "picture_in_picture"
    plans = planned(questions, kind, {2: 1}, seed=seed, items=items, limit=limit, across_sources=across_sources)

    def compose(plan: Plan, pictures: list[Image.Image]) -> dict[str, Any]:
        turn = plan.item.turns[0]
        phrase = PHRASINGS[int(keyed(seed, f"{kind} phrasing", plan.item.number).integers(len(PHRASINGS)))]
        arrangement = arranged(pictures[1 - plan.slot], pictures[plan.slot])
        messages = [asked(arrangement, f"{phrase}, {lowered(turn.question)}")]
        return finished(messages, arrangement, (0,), 1, turn.answer, confusions(questions, plan, turn.question))

    return Rows(kind, questions, plans, compose)
