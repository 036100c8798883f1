"""Which words of a given list a text mentions, in singular or plural, the longest phrase first.

Plurals are undone with the list at hand: of all forms that a word may be the plural of, the one on the list is taken, so
"buses", "puppies", "knives" and "glasses" need no dictionary and a word of the list is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

IRREGULAR: Mapping[str, str] = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "policemen": "policeman",
    "firemen": "fireman",
    "snowmen": "snowman",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
    "dice": "die",
}
_WORD = re.compile(r"\w+(?:-\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Lower-case words and single marks; a mark between two words keeps them from being one phrase."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


class Phrases:
    """Phrases to look for and what each counts as.

    Args:
        meanings: from a phrase (lower case, words separated by blanks) to what it counts as; None for a phrase that takes its
            words away from others and counts as nothing ("train track" is no train).
    """

    def __init__(self, meanings: Mapping[str, str | None]):
        self.meanings = {tuple(words_of(phrase)): meaning for phrase, meaning in meanings.items()}
        self._known = {word for phrase in self.meanings for word in phrase}
        self._longest = max((len(phrase) for phrase in self.meanings), default=0)

    def singular(self, word: str) -> str:
        """The form of ``word`` that the phrases have; the word itself if they have none."""
        if word in self._known:
            return word
        return next((form for form in _singulars(word) if form in self._known), word)

    def find(self, text: str) -> list[tuple[str, str]]:
        """(phrase, meaning) of every mention from left to right, none overlapping."""
        words = [self.singular(word) for word in words_of(text)]
        found, place = [], 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                phrase = tuple(words[place : place + length])
                if phrase in self.meanings:
                    meaning = self.meanings[phrase]
                    found += [] if meaning is None else [(" ".join(phrase), meaning)]
                    place += length - 1
                    break
            place += 1
        return found


def _singulars(word: str) -> Iterable[str]:
    if word in IRREGULAR:
        yield IRREGULAR[word]
    if word.endswith("s"):
        yield word[:-1]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("ves"):
        yield from (word[:-3] + "f", word[:-3] + "fe")
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        yield word[:-2]
