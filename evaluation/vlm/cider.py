"""CIDEr and CIDEr-D (Vedantam et al., arXiv 1411.5726): n-grams in common, weighted by how few images have them.

Letters: N images, n the length of n-grams (1 to 4).

An n-gram's weight in a text is tf (log N - log max(1, df)), tf how often the text has it and df how many images have it in one
of their references; both are of the corpus that is scored, so figures of different subsets do not compare.

    CIDEr   = 10 mean over n, references of cos(g(candidate), g(reference))                                 (eqs. 2, 3)
    CIDEr-D = 10 mean of exp(-(l_c - l_r)^2 / 2 sigma^2) min(g_c, g_r) . g_r / (|g_c| |g_r|),  sigma = 6     (eqs. 4, 5)

What coco-caption and pycocoevalcap call CIDEr is CIDEr-D. There l is the number of bigrams, here too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SIZES = (1, 2, 3, 4)
SIGMA = 6.0
Tokens = Sequence[str]
Gram = tuple[str, ...]


def ngrams(words: Tokens, n: int) -> Counter[Gram]:
    """How often a text has each of its n-grams."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


class CiderScores(NamedTuple):
    """Of each candidate; a corpus's figures are the means."""

    plain: list[float]
    d: list[float]


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> CiderScores:
    """CIDEr and CIDEr-D of each candidate with the references of its image.

    Raises:
        ValueError: as many lists of references as candidates are not given, or an image has none.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates need as many lists of references, found {len(references)}")
    if not all(references):
        raise ValueError("every image needs a reference")
    said = [_Text(words, _counts(words)) for words in candidates]
    known = [[_Text(words, _counts(words)) for words in texts] for texts in references]
    images = math.log(len(references)) if references else 0.0
    having = Counter(gram for texts in known for gram in {gram for text in texts for gram in text.counts})
    weights = {gram: images - math.log(count) for gram, count in having.items()}
    pairs = [_one(text, texts, weights, images) for text, texts in zip(said, known, strict=True)]
    return CiderScores([plain for plain, _ in pairs], [d for _, d in pairs])


class _Text(NamedTuple):
    words: Tokens
    counts: Counter[Gram]


def _counts(words: Tokens) -> Counter[Gram]:
    counts: Counter[Gram] = Counter()
    for n in SIZES:
        counts.update(ngrams(words, n))
    return counts


def _one(said: _Text, known: Sequence[_Text], weights: Mapping[Gram, float], unseen: float) -> tuple[float, float]:
    """(CIDEr, CIDEr-D); an n-gram of no reference has the weight ``unseen``, log N."""
    own, own_norms = _weighted(said, weights, unseen)
    plain = clipped = 0.0
    for reference in known:
        other, norms = _weighted(reference, weights, unseen)
        cosines, minima = [0.0] * len(SIZES), [0.0] * len(SIZES)
        for gram in own.keys() & other.keys():
            cosines[len(gram) - 1] += own[gram] * other[gram]
            minima[len(gram) - 1] += min(own[gram], other[gram]) * other[gram]
        lengths = [math.sqrt(one * two) for one, two in zip(own_norms, norms, strict=True)]
        plain += sum(value / length for value, length in zip(cosines, lengths, strict=True) if length)
        shared = sum(value / length for value, length in zip(minima, lengths, strict=True) if length)
        clipped += shared * _length_penalty(said.words, reference.words)
    scale = 10 / len(SIZES) / len(known)
    return scale * plain, scale * clipped


def _weighted(text: _Text, weights: Mapping[Gram, float], unseen: float) -> tuple[dict[Gram, float], list[float]]:
    """The weight of every n-gram, and the sum of squares for each n."""
    found = {gram: count * weights.get(gram, unseen) for gram, count in text.counts.items()}
    squares = [0.0] * len(SIZES)
    for gram, value in found.items():
        squares[len(gram) - 1] += value * value
    return found, squares


def _length_penalty(said: Tokens, reference: Tokens) -> float:
    difference = max(len(said) - 1, 0) - max(len(reference) - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
