"""How pairs were drawn from questions: what a maker of pairs says of it in pairs/summary.json under ``selection``.

A model learns what chosen answers have in common, and that is the data's only if the pairs are drawn evenly. Pairs of the
model's mistakes alone are not: a base that says yes too often has mistakes whose right answer is no, and a policy trained on
these says no. Their training curves look well.

The *telling word* of a pair is the first word of its chosen answer that its rejected answer does not have at that place. Its
distribution over the pairs is held against that over all questions, with pairs or without:

    distance = 1/2 sum over words of |share in the pairs - share in all questions|        (0: the same, 1: nothing in common)

``by_chance`` is the distance to expect of as many pairs drawn evenly, from the mean absolute deviation of a binomial share,
sqrt(2 p (1 - p) / (pi n)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

SHOWN = 8
"""Words with the largest difference of shares that are named."""


def telling_word(chosen: str, rejected: str) -> str | None:
    """The first word of ``chosen`` that ``rejected`` does not have at its place, without case and marks; None where the
    rejected answer begins with the chosen one."""
    pairs = zip_longest(_words(chosen), _words(rejected))
    return next((word for word, other in pairs if word is not None and word != other), None)


def _words(answer: str) -> list[str]:
    return [word.strip(".,;:!?\"'") for word in answer.casefold().split()]


def selection(
    *, questions: int, right: int, pairs: int, pairs_of_right: int, words: Mapping[str, int], words_of_pairs: Mapping[str, int]
) -> dict[str, Any]:
    """The block ``selection``.

    Args:
        questions, right: that were asked of the model, and that it answered rightly.
        pairs, pairs_of_right: that were kept, and those of them whose question it answered rightly.
        words, words_of_pairs: how often each telling word is that of a question, and of a pair that was kept.
    """
    block: dict[str, Any] = {"questions": questions, "right": right, "pairs": pairs, "pairs_of_right": pairs_of_right}
    total, kept = sum(words.values()), sum(words_of_pairs.values())
    if not total or not kept:
        return {**block, "words": None}
    shares = {
        word: (words_of_pairs.get(word, 0) / kept, words.get(word, 0) / total) for word in words.keys() | words_of_pairs.keys()
    }
    chance = sum(math.sqrt(2 * share * (1 - share) / (math.pi * kept)) for _, share in shares.values()) / 2
    most = sorted(shares, key=lambda word: (-abs(shares[word][0] - shares[word][1]), word))[:SHOWN]
    found = {
        "pairs": kept,
        "distance": round(sum(abs(one - other) for one, other in shares.values()) / 2, 4),
        "by_chance": round(chance, 4),
        "most": [[word, *(round(share, 4) for share in shares[word])] for word in most if shares[word][0] != shares[word][1]],
    }
    return {**block, "words": found}
