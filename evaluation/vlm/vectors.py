"""Word vectors from a text file, and which words they hold for synonyms."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError


class Vectors:
    """Vectors of unit length by word.

    Args:
        path: lines of a word and its numbers, separated by blanks (GloVe's and word2vec's text format, the latter with a
            first line of two numbers).
        words: the words that are needed; others are not kept. Words are compared in lower case.

    Raises:
        UserError: unreadable, a line of another length, or none of the words.
    """

    def __init__(self, path: Path, words: Collection[str]):
        wanted, self._of = {word.lower() for word in words}, {}
        width = None
        try:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    word, *numbers = line.rstrip().split(" ")
                    if number == 1 and len(numbers) == 1:
                        continue
                    width = width or len(numbers)
                    if len(numbers) != width:
                        raise UserError(f"{path}: line {number} has {len(numbers)} numbers, those before have {width}")
                    if word.lower() in wanted and word.lower() not in self._of:
                        self._of[word.lower()] = np.array(numbers, dtype=np.float64)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no text file of word vectors ({error})") from error
        if not self._of:
            raise UserError(f"{path}: has a vector for none of the {len(wanted)} words that are needed")
        self._of = {word: vector / norm for word, vector in self._of.items() if (norm := np.linalg.norm(vector))}

    def similarity(self, first: str, second: str) -> float:
        """Cosine of two words; 0 where one has no vector."""
        vectors = [self._of.get(word.lower()) for word in (first, second)]
        if vectors[0] is None or vectors[1] is None:
            return 0.0
        return float(vectors[0] @ vectors[1])

    def __len__(self) -> int:
        return len(self._of)
