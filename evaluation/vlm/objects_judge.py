"""A judge of free answers about pictures whose objects are known: it finds the objects that an answer mentions, by all their
names, and compares them with the picture's.

Conditions have ``objects`` (what is in the picture), ``task`` and ``about``, as the world `emoji_scenes` writes them:

- ``what`` (also where there is no task): right if all objects are mentioned and no other one of the list;
- ``exists``: right if the answer says yes or no (:func:`~polyalign.evaluation.vlm.answers.yes_or_no`) as it is about ``about``;
- ``count``: right if the number that the answer gives is that of the objects.

An answer is *hallucinated* if it mentions an object of the list that is not there, says yes to one, or counts too many. As in
CHAIR, only what is on the list can be found, and a mention counts as one, also in "there is no dog" (``exists`` apart, where
the object asked for may be named).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.evaluation.vlm.answers import yes_or_no
from polyalign.evaluation.vlm.chair import Objects, mentioned, read_synonyms
from polyalign.evaluation.vlm.mentions import words_of

TASKS = ("what", "exists", "count")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(WORDS)} | {"no": 0, "none": 0}
_NUMBER = rf"\d+|{'|'.join(_NUMBERS)}"
_OF_OBJECTS = re.compile(rf"\b({_NUMBER})\s+(?:\w+\s+)?(?:objects?|things?|items?)\b")
_ANY = re.compile(rf"\b({_NUMBER})\b")


def number_in(text: str) -> int | None:
    """The number of objects (things, items) that a text gives first; else the only number in it; else None."""
    plain = text.lower()
    found = _OF_OBJECTS.findall(plain)[:1] or list(dict.fromkeys(_ANY.findall(plain)))
    numbers = {int(one) if one.isdecimal() else _NUMBERS[one] for one in found}
    return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True)
class Asked:
    """What a condition asks, with the list's own names."""

    task: str
    about: str | None
    objects: frozenset[str]

    def verdict(self, answer: str, said: frozenset[str]) -> str:
        """``right``, ``wrong`` or ``hallucinated`` for an answer that mentions these objects."""
        strange = bool(said - self.objects - {self.about})
        if self.task == "what":
            right = said == self.objects
        elif self.task == "exists":
            truth, read = ("yes" if self.about in self.objects else "no"), yes_or_no(answer)
            right, strange = read == truth and not strange, strange or (read == "yes" and truth == "no")
        else:
            number = number_in(answer)
            right, strange = number == len(self.objects) and not strange, strange or (number or 0) > len(self.objects)
        return "right" if right else "hallucinated" if strange else "wrong"


class ObjectsJudge:
    """1 for a right answer, 0 for a wrong one, -1 for one that tells of what is not in the picture.

    Args:
        synonyms: file of the objects that are looked for: a line an object, its names separated by commas (CHAIR's format).

    Raises:
        UserError: the file cannot be read, or has a name twice.
    """

    name = "objects"
    broken_below = 0.0  # a lower score is a hallucination: the report counts these
    broken_word = "hallucinated"
    right_from = 1.0

    scores: Mapping[str, float] = {"right": 1.0, "wrong": 0.0, "hallucinated": -1.0}

    def __init__(self, *, synonyms: str):
        self._names = read_synonyms(Path(synonyms))
        self._phrases = Objects(self._names).phrases()
        self.version = f"1 synonyms {sha256_of(Path(synonyms))[:8]}"

    def refuse(self, condition: Mapping[str, Any]) -> Asked:
        """What the condition asks.

        Raises:
            UserError: no objects, ones that are not on the list, or another task.
        """
        given = condition.get("objects")
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise UserError(
                f"the judge 'objects': a question needs 'objects', the names of what is in the picture; found {given!r}"
            )
        task = condition.get("task") or "what"
        if task not in TASKS:
            raise UserError(f"the judge 'objects': there is no task {task!r}. Tasks: {', '.join(TASKS)}")
        about = self._own(str(condition.get("about", ""))) if task == "exists" else None
        return Asked(task, about, frozenset(self._own(one) for one in given))

    def _own(self, name: str) -> str:
        found = self._names.get(" ".join(words_of(name)))
        if found is None:
            raise UserError(f"the judge 'objects': {name!r} is not on the list of synonyms, so no answer can be read for it")
        return found

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        """Raises:
        UserError: see :meth:`refuse`.
        """
        found = []
        for condition, output in zip(conditions, outputs, strict=True):
            said = frozenset(mentioned(output, self._phrases))
            found.append(self.scores[self.refuse(condition).verdict(output, said)])
        return found
