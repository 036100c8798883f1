"""ROUGE (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004): what a summary shares with a reference.

Words are runs of letters and digits in lower case, so 1.4 is the two words 1 and 4; nothing is stemmed and no word is left
out. For English text this is what the common Python package ``rouge-score`` does with stemming off; that package also throws
away every letter outside a to z, which are kept here, so the two differ for other languages.

Precision is relative to the candidate, recall to the reference, and F1 their harmonic mean (Lin's F with beta = 1). All three
are 0 where either text has no words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from polyalign.core.errors import UserError

Split = Literal["lines", "sentences"]
MEASURES = ("f1", "precision", "recall")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Rouge(NamedTuple):
    """Each in [0, 1]."""

    precision: float
    recall: float
    f1: float


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def rouge_n(candidate: str, reference: str, n: int) -> Rouge:
    """ROUGE-N: n-grams in common, each counted as often as both texts have it.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n-grams have at least one word, not {n}")
    have, want = _ngrams(words(candidate), n), _ngrams(words(reference), n)
    return _rouge((have & want).total(), have.total(), want.total())


def rouge_l(candidate: str, reference: str) -> Rouge:
    """ROUGE-L of whole texts: the length of their longest common subsequence of words."""
    have, want = words(candidate), words(reference)
    return _rouge(lcs_length(have, want), len(have), len(want))


def rouge_lsum(candidate: str, reference: str, *, split: Split = "lines") -> Rouge:
    """Summary-level ROUGE-L: for each sentence of the reference, the union of its longest common subsequences with every
    sentence of the candidate; a word counts no more often than the candidate has it.

    A sentence has several longest common subsequences where words repeat. Which is taken changes the union, so the choice is
    that of ``rouge-score``: from the end, a word in common is always taken, else a word of the reference is passed over unless
    that would shorten the rest.

    Args:
        split: where sentences end: at line breaks, as ``rouge-score`` has it, or also after a full stop, ``!`` or ``?``.

    Raises:
        ValueError: another ``split``.
    """
    have, want = ([words(part) for part in _sentences(text, split)] for text in (candidate, reference))
    left = Counter(word for sentence in have for word in sentence)
    found = 0
    for sentence in want:
        union: set[int] = set().union(*(lcs_places(sentence, other) for other in have))
        for place in sorted(union):
            if left[sentence[place]] > 0:
                left[sentence[place]] -= 1
                found += 1
    return _rouge(found, sum(map(len, have)), sum(map(len, want)))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    return len(first) - _columns(first, second)[-1].bit_count()


def lcs_places(first: Sequence[str], second: Sequence[str]) -> set[int]:
    """The places in ``first`` of one longest common subsequence with ``second``; see :func:`rouge_lsum` for which."""
    columns = _columns(first, second)
    places, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif columns[j] >> (i - 1) & 1:  # passing over first[i - 1] loses nothing
            i -= 1
        else:
            j -= 1
    return places


def _columns(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """The table of LCS lengths L[i][j] as one whole number for each j: bit i of column j is 0 where L[i + 1][j] = L[i][j] + 1.

    One addition of long integers makes a column (Hyyro, "Bit-parallel LCS-length computation revisited", 2004), so two notes of
    some thousand words take milliseconds.
    """
    everywhere = (1 << len(first)) - 1
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    columns = [everywhere]
    for word in second:
        column = columns[-1]
        matches = column & places.get(word, 0)
        columns.append(((column + matches) | (column - matches)) & everywhere)
    return columns


def _ngrams(sentence: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(sentence[start:] for start in range(n)), strict=False))


def _sentences(text: str, split: str) -> list[str]:
    if split == "lines":
        return text.split("\n")
    if split == "sentences":
        return _SENTENCE_END.split(text)
    raise ValueError(f"sentences are split at 'lines' or 'sentences', not {split!r}")


def _rouge(common: int, have: int, want: int) -> Rouge:
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    return Rouge(common / have, common / want, 2 * common / (have + want))


def references_of(condition: Mapping[str, Any], judge: str, key: str = "reference") -> list[str]:
    """The reference, or the list of them, that a condition has under ``key``.

    Raises:
        UserError: there is none, or it is no text.
    """
    given = condition.get(key)
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise UserError(
            f"the judge '{judge}' compares with the text under '{key}' beside the prompt, and found "
            f"{'nothing' if given is None else type(given).__name__} for the prompt {str(condition.get('prompt'))[:80]!r}. Put "
            f"a '{key}' (a text, or a list of texts) beside every prompt, in a .jsonl or .parquet file"
        )
    return references


class RougeLJudge:
    """ROUGE-L against ``condition["reference"]``: 1 for the reference's words in the reference's order, 0 for none of them. Of
    several references the one that gives most counts.

    Args:
        measure: ``f1``, ``precision`` or ``recall``.
        summary: the summary-level form (Lsum) instead of the longest common subsequence of the whole texts.
        split: with ``summary``, where sentences end: ``lines`` or ``sentences``.
        reference: name of the reference beside the prompt.
        label: the judge's name in scores and reports, to tell two of a kind apart.

    Raises:
        UserError: an option is none of the allowed.
    """

    name = "rouge_l"

    def __init__(
        self,
        *,
        measure: str = "f1",
        summary: bool = False,
        split: Split = "sentences",
        reference: str = "reference",
        label: str | None = None,
    ):
        if measure not in MEASURES:
            raise UserError(f"the judge 'rouge_l': measure is {measure!r}; allowed: {', '.join(MEASURES)}")
        if split not in ("lines", "sentences"):
            raise UserError(f"the judge 'rouge_l': split is {split!r}; allowed: lines, sentences")
        self.measure, self.summary, self.reference = measure, summary, reference
        self.split: Split = split
        self.version = f"1 {f'lsum {split}' if summary else 'l'} {measure} {reference}"
        self.name = label or self.name

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        """Raises:
        UserError: a condition has no reference.
        """
        pairs = zip(conditions, outputs, strict=True)
        return [
            max(self._of(output, text) for text in references_of(given, self.name, self.reference)) for given, output in pairs
        ]

    def _of(self, candidate: str, reference: str) -> float:
        found = rouge_lsum(candidate, reference, split=self.split) if self.summary else rouge_l(candidate, reference)
        return getattr(found, self.measure)
