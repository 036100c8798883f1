"""Distinct-n: the share of a set of texts' n-grams that are different, plain and adjusted for how many there are.

Plain distinct-n (Li et al., arXiv 1510.03055) falls with the length of the texts even where nothing is repeated more than
chance would: a longer text draws the same words again. The expectation-adjusted form (Liu et al., arXiv 2202.13587) divides by
how many different ones C draws out of V would give, V (1 - ((V - 1) / V)^C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from polyalign.evaluation.text_metrics.rouge import words

SIZES = (1, 2, 3, 4, 5)


def distinct(texts: Sequence[str], n: int, *, tokens: Callable[[str], Sequence[str]] = words) -> float:
    """N / C: different n-grams over all n-grams of ``texts`` together, in (0, 1]; 0 where there are none.

    Raises:
        ValueError: n below 1.
    """
    different, count = _counts(texts, n, tokens)
    return different / count if count else 0.0


def adjusted_distinct(
    texts: Sequence[str], n: int, vocabulary: int, *, tokens: Callable[[str], Sequence[str]] = words
) -> float:
    """N / (U (1 - ((U - 1) / U)^C)) with U = V^n, the n-grams that a vocabulary of V words can make; 0 where there are none.

    The paper gives the formula for words (n = 1). It can exceed 1: real text that repeats less than uniform draws would.

    Args:
        vocabulary: V, the words (tokens) that the texts could have used; for a language model its vocabulary. The same V for
            everything that is compared.

    Raises:
        ValueError: n or V below 1, or texts with more different words than V.
    """
    if vocabulary < 1:
        raise ValueError(f"a vocabulary has at least one word, not {vocabulary}")
    seen = _counts(texts, 1, tokens)[0]
    if seen > vocabulary:
        raise ValueError(f"the texts have {seen} different words, more than the vocabulary of {vocabulary}")
    different, count = _counts(texts, n, tokens)
    if not count:
        return 0.0
    possible = float(vocabulary) ** n
    expected = 1.0 if vocabulary == 1 else -possible * math.expm1(count * math.log1p(-1 / possible))  # exact for huge U too
    return different / expected


def profile(
    texts: Sequence[str],
    *,
    vocabulary: int | None = None,
    sizes: Sequence[int] = SIZES,
    tokens: Callable[[str], Sequence[str]] = words,
) -> dict[str, float]:
    """``distinct_1`` ... ``distinct_5`` and, with a vocabulary, ``adjusted_1`` ... ``adjusted_5``."""
    found = {f"distinct_{n}": distinct(texts, n, tokens=tokens) for n in sizes}
    if vocabulary is not None:
        found |= {f"adjusted_{n}": adjusted_distinct(texts, n, vocabulary, tokens=tokens) for n in sizes}
    return found


def _counts(texts: Sequence[str], n: int, tokens: Callable[[str], Sequence[str]]) -> tuple[int, int]:
    """(different n-grams, all n-grams); none goes from one text into the next."""
    if n < 1:
        raise ValueError(f"n-grams have at least one word, not {n}")
    different, count = set(), 0
    for text in texts:
        sequence = tokens(text)
        ngrams = list(zip(*(sequence[start:] for start in range(n)), strict=False))
        different.update(ngrams)
        count += len(ngrams)
    return len(different), count
