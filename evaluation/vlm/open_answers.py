"""Free answers compared with reference texts: Mantis-Eval's short answers and MMMU's open questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_MARKS = " \t\n.,;:!?\"'()"


def same_text(answer: str, truth: str) -> bool:
    """Equal but for case and the marks and blanks around, of what follows "final answer:" where that is said."""
    return _stated(answer).strip(_MARKS).casefold() == truth.strip(_MARKS).casefold()


def _stated(answer: str) -> str:
    place = answer.lower().rfind("final answer:")
    return answer if place < 0 else answer[place + len("final answer:") :]


def open_answer_right(answer: str, truths: Sequence[str]) -> bool:
    """MMMU's published rule for open questions.

    Of every line the shortest end after a word such as "is" or "so" (in the last line also after "=") is what it says; if no
    line has one, the whole answer is. Right is an answer of which such an end contains a reference text, or which has a
    reference number among its numbers, rounded to two decimals. A reference of one letter needs a blank beside it.
    """
    said = _ends(answer)
    said += [number for end in said for pattern in (_GROUPED, _SCIENTIFIC, _PLAIN) for number in pattern.findall(end)]
    found, wanted = [_forms(one) for one in said], [_forms(truth) for truth in truths]
    numbers = {number for one in wanted for number in one.numbers}
    if any(number in numbers for one in found for number in one.numbers):
        return True
    texts = [text for one in wanted for text in one.texts]
    return any(text in end for one in found for end in one.texts for text in texts)


def _ends(answer: str) -> list[str]:
    plain = answer.strip().strip(".").lower()
    lines = plain.split("\n")
    found = []
    for number, line in enumerate(lines):
        leads = (*_LEADS, "=") if number == len(lines) - 1 else _LEADS
        shortest = ""
        for end in (line.split(lead)[-1].strip() for lead in leads if lead in line):
            if not shortest or len(end) < len(shortest):  # an empty end is kept only if no later lead has one, as published
                shortest = end
        if shortest and shortest not in ":,.!?;'":
            found.append(shortest)
    return found or [plain]


class _Forms(NamedTuple):
    numbers: tuple[float, ...]
    texts: tuple[str, ...]


def _forms(text: str) -> _Forms:
    """A number, or a text in lower case."""
    plain = text.strip().lower()
    try:
        return _Forms((round(float(plain.replace(",", "")), 2),), ())
    except ValueError:
        return _Forms((), (f" {plain}", f"{plain} ") if len(plain) == 1 else (plain,) if plain else ())
