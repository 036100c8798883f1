"""Where each picture's tokens stand in a prompt.

Runs of the image token alone do not say it: pictures that touch are one run, and a picture in tiles is several.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def runs_of(ids: Sequence[int], token: int) -> list[range]:
    """The runs of ``token`` in ``ids``, as positions."""
    found = []
    for is_token, run in groupby(enumerate(ids), key=lambda pair: pair[1] == token):
        places = [place for place, _ in run]
        if is_token:
            found.append(range(places[0], places[-1] + 1))
    return found


def spans_of(ids: Sequence[int], token: int, counts: Sequence[int]) -> list[list[int]]:
    """The positions of each picture's tokens.

    Args:
        ids: of a prompt, pictures expanded. token: the image token.
        counts: how many tokens each picture has, in order.

    Raises:
        ValueError: counts that do not add up to the tokens that are there.
    """
    places = [place for place, one in enumerate(ids) if one == token]
    if len(places) != sum(counts):
        raise ValueError(f"{len(places)} image tokens in the prompt, and {sum(counts)} by the pictures' counts")
    found, start = [], 0
    for count in counts:
        found.append(places[start : start + count])
        start += count
    return found


def ended_counts(ids: Sequence[int], token: int) -> list[int]:
    """Tokens of each picture where each is one run (a token of its own ends it)."""
    return [len(run) for run in runs_of(ids, token)]


def whole_last_counts(ids: Sequence[int], token: int, whole: int) -> list[int]:
    """Tokens of each picture where it is runs of tiles, of which the last, behind the token ``whole``, is that of all of it."""
    counts, tokens = [], 0
    for run in runs_of(ids, token):
        tokens += len(run)
        if run.start > 0 and ids[run.start - 1] == whole:
            counts.append(tokens)
            tokens = 0
    return counts
