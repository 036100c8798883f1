"""Words of captions as the Penn Treebank cuts them, in lower case and without punctuation, for BLEU, ROUGE-L and CIDEr.

The usual figures come from Stanford's Java tokeniser (PTBTokenizer, lower case, punctuation left out). This follows its rules
for captions: "don't" is "do", "n't"; "the dog's" is "the", "dog", "'s"; "cannot" is "can", "not"; hyphenated words, numbers
with commas or points, and abbreviations such as "u.s." stay whole. It does not know single abbreviations ("mr." is "mr"),
fractions or web addresses.
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset(
    {"''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "[", "]"}
)
_CANNOT = re.compile(r"\bcannot\b")
_NEGATED = re.compile(r"(?<=\w)(n't)\b")
_CLITIC = re.compile(r"(?<=\w)('(?:s|m|d|ll|re|ve))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|(?:[a-z]\.){2,}|\d+(?:[.,:/]\d+)+|\w+(?:[-&/]\w+)*|\.\.\.|--|[^\w\s]")
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def tokens(text: str) -> list[str]:
    """The words of one caption."""
    plain = _CANNOT.sub("can not", text.lower().translate(_QUOTES))
    plain = _CLITIC.sub(r" \1", _NEGATED.sub(r" \1", plain))
    return [token for token in _TOKEN.findall(plain) if token not in PUNCTUATION]
