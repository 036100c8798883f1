"""Texts for the page: an answer with its words marked where it differs from the other one, prompts of any length."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polyalign.evaluation.report.markup import text

LONGEST = 6000
"""Characters of a prompt or an answer that are shown; the whole text lies in samples/."""

ALIKE = 0.3
"""Below this share of common words marks would cover nearly all and say nothing."""

MOST_WORDS = 1500
"""Longer answers are not compared word by word, which takes time in the square of their number."""

MOST_EQUAL = 12_000
"""Pairs of equal words, one of each answer, above which they are not compared either: every step of the comparison looks at
all of them, and an answer that says one thing over and over would take minutes."""

_PIECES = re.compile(r"\s+|[^\s]+")


def are_texts(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the items of an evaluation are texts."""
    return bool(items) and "base_text" in items[0]


def block(content: str, kind: str = "answer") -> str:
    """Ready-made HTML of a text, line breaks kept, in a box that scrolls when it is long."""
    inner = content if content.strip() else '<i class="quiet">nothing</i>'
    return f'<div class="{kind}" tabindex="0" dir="auto">{inner}</div>'


def plain(content: object) -> str:
    """A whole text, escaped."""
    return text(content, LONGEST)


def marked(first: str, second: str) -> tuple[str, str]:
    """Both texts as HTML, with the words that the other does not have at that place marked; unmarked where they are too
    different, equal, very long, or full of the same few words."""
    pieces = [_PIECES.findall(one[:LONGEST]) for one in (first, second)]
    if first == second or max(map(len, pieces)) > MOST_WORDS:
        return plain(first), plain(second)
    here, there = (Counter(piece for piece in side if piece.strip()) for side in pieces)
    if sum(count * there[word] for word, count in here.items()) > MOST_EQUAL:
        return plain(first), plain(second)
    matcher = difflib.SequenceMatcher(str.isspace, *pieces, autojunk=False)
    common = sum(
        piece.strip() != "" for start, _, size in matcher.get_matching_blocks() for piece in pieces[0][start : start + size]
    )
    if 2 * common < ALIKE * sum(piece.strip() != "" for side in pieces for piece in side):
        return plain(first), plain(second)
    sides: tuple[list[str], list[str]] = ([], [])
    for operation, a, b, c, d in matcher.get_opcodes():
        for side, words in zip(sides, (pieces[0][a:b], pieces[1][c:d]), strict=True):
            shown = text("".join(words), LONGEST)
            side.append(shown if operation == "equal" or not shown.strip() else f"<mark>{shown}</mark>")
    cut = ["\u2026" if len(one) > LONGEST else "" for one in (first, second)]
    return "".join(sides[0]) + cut[0], "".join(sides[1]) + cut[1]
