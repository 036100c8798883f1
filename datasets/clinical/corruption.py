"""Summaries made worse in a known way: what a rejected answer is made of where nothing better is at hand.

Three kinds of error, those that matter in a clinical summary: a number or date *altered* to another of the same form, a
sentence *omitted*, a sentence of another patient's summary *invented*. The text around stays as it was, so a model learns the
difference and nothing else. Pairs of a model's own samples, judged, teach more (the error is then one that this model makes);
these need no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

ERRORS = ("altered", "omitted", "invented")
_DATE = r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)"
_VALUE = re.compile(rf"{_DATE}|(?<![\w.,/^:*-])\d+(?:\.\d+)?(?![\w*^:]|[.,/]\d)")
_SENTENCE = re.compile(r"[^\n]+?(?:(?<=\D)[.!?](?=\s|$)|(?<=\d)\.(?=\s+[A-Z]|\s*$)|(?=\n)|$)", re.MULTILINE)
_TRIES = 20


@dataclass(frozen=True)
class Corrupted:
    """A text with one error: which kind, and what stood where (empty for what was not there)."""

    text: str
    error: str
    before: str
    after: str


def corrupt(text: str, rng: random.Random, *, errors: Sequence[str] = ERRORS, donors: Sequence[str] = ()) -> Corrupted | None:
    """``text`` with one error of a kind drawn from ``errors``; another kind of them where that one is not possible, None where
    none is.

    Args:
        donors: summaries of other patients, for ``invented``; without any that kind is not possible.

    Raises:
        ValueError: an unknown kind.
    """
    unknown = sorted(set(errors) - set(ERRORS))
    if unknown:
        raise ValueError(f"no such error: {', '.join(unknown)}; known: {', '.join(ERRORS)}")
    for error in rng.sample(list(errors), len(errors)):
        found = (
            {"altered": _altered, "omitted": _omitted}[error](text, rng)
            if error != "invented"
            else _invented(text, rng, donors)
        )
        if found is not None and found.text != text:
            return found
    return None


def _altered(text: str, rng: random.Random) -> Corrupted | None:
    values = list(_VALUE.finditer(text))
    if not values:
        return None
    chosen = rng.choice(values)
    other = _other_value(chosen[0], rng)
    return Corrupted(text[: chosen.start()] + other + text[chosen.end() :], "altered", chosen[0], other)


def _other_value(written: str, rng: random.Random) -> str:
    """Another date within ten days, or a number with one digit changed: of the same length, as a slip of the pen is."""
    if re.fullmatch(_DATE, written):
        try:
            day = date.fromisoformat(written)
            return (day + timedelta(days=rng.choice((-10, -3, -1, 1, 3, 10)))).isoformat()
        except (ValueError, OverflowError):  # no such day: its digits are changed as a number's
            pass
    places = [place for place, sign in enumerate(written) if sign.isdigit()]
    place = rng.choice(places)
    first = place == places[0] and len(places) > 1 and written[1:2].isdigit()
    digit = rng.choice([digit for digit in "0123456789" if digit != written[place] and not (first and digit == "0")])
    return written[:place] + digit + written[place + 1 :]


def _omitted(text: str, rng: random.Random) -> Corrupted | None:
    sentences = _sentences(text)
    if len(sentences) < 2:
        return None
    start, end = rng.choice(sentences)
    rest = (
        text[:start].rstrip(" ") + (" " if start and not text[:start].endswith("\n") else "") + text[end:].lstrip(" ")
    ).strip()
    return Corrupted(rest, "omitted", text[start:end], "")


def _invented(text: str, rng: random.Random, donors: Sequence[str]) -> Corrupted | None:
    """A sentence from the middle of another summary, since first and last ones say who a patient is and how the stay ended."""
    own = _sentences(text)
    for _ in range(_TRIES if donors and own else 0):
        donor = rng.choice(donors)
        middle = [donor[start:end] for start, end in _sentences(donor)[1:-1]]
        strange = [sentence for sentence in middle if sentence not in text]
        if strange:
            sentence = rng.choice(strange)
            _, end = rng.choice(own[:-1] or own)
            return Corrupted(f"{text[:end]} {sentence}{text[end:]}", "invented", "", sentence)
    return None


def _sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, blanks around it left out. A point after a figure ends one only before a capital
    letter."""
    found = []
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip()
        if sentence:
            start = match.start() + match[0].index(sentence[0])
            found.append((start, start + len(sentence)))
    return found
