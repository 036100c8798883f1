"""The facts that a clinical text states, as far as their surface shows them: names, and numbers, dates, times and days with
what they are about.

A text is cut into sentences (at full stops, semicolons, and line breaks unless the next line goes on in lower case) and these
into names of a :class:`Lexicon`, values and words. A value is about the nearest name of the lexicon in its sentence, or about
the nearest word that says something if that is much nearer, or there is no name. Distance counts words, a comma, colon or
bracket as three; of two equally near the one before the value is taken.

What this does not see: numbers in words (two litres), years of two digits, relative dates (the day after), a list of names
before a list of values (sodium and potassium were 130 and 5.1), words for high and low, who or what a pronoun means, and
that a line goes on which was wrapped before a figure or a capital letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal

from polyalign.evaluation.text_metrics.units import unit_of

VALUES = ("number", "date", "time", "day")
"""Kinds of facts that are about something; every other kind is a name of the lexicon."""
ANCHORS: Mapping[str, Sequence[str]] = {
    "admission": ("admission", "admitted", "admit"),
    "discharge": ("discharge", "discharged"),
    "death": ("death", "died", "expired", "deceased"),
    "birth": ("birth", "born"),
}
"""What dates are about besides the lexicon's names; these are no facts by themselves."""
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
UNDATED = frozenset({"diagnosis"})
"""Kinds of names of which a day is no fact: tables have diagnoses as codes of a whole stay, without dates."""
# Words that a value is never about.
PASSED_OVER = frozenset(
    "a an and the of on at in to from with by for was were is are be been has had have he she his her it its as or than that "
    "this then day days given done started low high normal abnormal level value dose daily old noted found patient up down "
    "about approximately after before until since over under per x rose fell increased decreased improved dropped remained "
    "received presented showed measured treated continued stable then later".split()
)
DENIED_BEFORE = frozenset("no not without denies denied denying never absent".split())
NEARER = 3
"""By so much an unknown word has to be nearer to a value than a name, for the value to be about it."""
DENIAL_REACH = 5  # words from a denial to the name it denies
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_LINE_END = r"\n(?!(?-i:[ \t]*[a-z]))"  # a line that goes on in lower case is one that was wrapped
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(
    rf"""(?P<iso>(?<!\d)\d{{4}}[-/]\d{{1,2}}[-/]\d{{1,2}}(?!\d))
    | (?P<slashed>(?<!\d)\d{{1,2}}/\d{{1,2}}/\d{{4}}(?!\d))
    | (?P<dayfirst>(?<!\d)\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH},?\s+\d{{4}}(?!\d))
    | (?P<monthfirst>\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}(?!\d))
    | (?P<clock>(?<!\d)\d{{1,2}}:\d\d(?::\d\d)?(?:\s?[ap]\.?m\b\.?)?)
    | (?P<day>\bday\s+\#?\d+\b)
    | (?P<number>(?<![\w.])[-−]?(?:{_NUMBER})(?:/\d+(?:\.\d+)?)*(?!\d))
    | (?P<word>[^\W\d_]\w*(?:[-'’]\w+)*)
    | (?P<stop>[.!?;]|{_LINE_END})
    | (?P<mark>[,:()\[\]])""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(r"[ -]?(10\^\d{1,2}/[a-zµμ]+|[a-zµμ]+(?:/[a-zµμ]+)*|°[cf]|%)(?![\w^])", re.IGNORECASE)
_AGE = re.compile(r"[ -]?(?:(?:years?|yrs?)[ -]olds?|y/?o|years(?=\s*[,.]|\s+(?:man|woman|male|female)\b))\b", re.IGNORECASE)
_APART = re.compile(rf"[.;!?]\s|{_LINE_END}")
_PART = re.compile(r"\w+")


@dataclass(frozen=True)
class Fact:
    """One fact. Two are equal if they say the same: how it was written is not compared.

    ``value`` is a number in the base of its unit's dimension (500 mg is 0.5), an ISO date, a time, a day's number, or a name;
    ``about`` is what a value is about, and ``known`` whether that is a name of the lexicon; ``raw`` is the number as written.
    """

    kind: str
    value: object
    about: str = ""
    unit: str = ""
    denied: bool = False
    raw: object = field(default=None, compare=False)
    known: bool = field(default=False, compare=False)
    text: str = field(default="", compare=False)


class Lexicon:
    """Names that count as facts, by kind, with other ways to write them: ``{"drug": {"warfarin": ["coumadin"]}}``.

    Case, spaces and punctuation inside a name make no difference; of names that overlap the longest is taken.

    Raises:
        ValueError: a name without letters or digits, or a kind that values have.
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Iterable[str]]]):
        self._starts: dict[str, list[tuple[tuple[str, ...], str, str]]] = {}
        for kind, names in terms.items():
            if kind in VALUES:
                raise ValueError(f"a lexicon's kinds are not {', '.join(VALUES)}; found {kind!r}")
            for name, others in names.items():
                for surface in (name, *others):
                    self._add(surface, kind, name)
        for name, surfaces in ANCHORS.items():
            for surface in surfaces:
                self._add(surface, "", name)
        for entries in self._starts.values():
            entries.sort(key=lambda entry: -len(entry[0]))  # stable: of two kinds the one named first

    def _add(self, surface: str, kind: str, name: str) -> None:
        parts = tuple(_PART.findall(surface.casefold()))
        if not parts:
            raise ValueError(f"{surface!r} is no name: it has no letter and no digit")
        self._starts.setdefault(parts[0], []).append((parts, kind, name))

    def find(self, text: str) -> list[tuple[int, int, str, str]]:
        """(start, end, kind, name) of every name in ``text``, from left to right, none overlapping; the kind is empty for
        :data:`ANCHORS`."""
        parts = [(found.start(), found.end(), found[0].casefold()) for found in _PART.finditer(text)]
        found, place = [], 0
        while place < len(parts):
            for surface, kind, name in self._starts.get(parts[place][2], ()):
                end = place + len(surface)
                between = text[parts[place][0] : parts[min(end, len(parts)) - 1][1]]
                if tuple(part[2] for part in parts[place:end]) == surface and not _APART.search(between):
                    found.append((parts[place][0], parts[end - 1][1], kind, name))
                    place = end - 1
                    break
            place += 1
        return found


EMPTY = Lexicon({})


@dataclass
class _Token:
    kind: str  # a name's or a value's kind, "anchor", "word" or "mark"
    start: int
    end: int
    name: str = ""
    fact: Fact | None = None


def facts_in(text: str, lexicon: Lexicon = EMPTY) -> list[Fact]:
    """The different facts of a text, in its order."""
    found: dict[Fact, None] = {}
    for sentence in _sentences(text, lexicon):
        for place, token in enumerate(sentence):
            if token.kind in VALUES:
                if fact := _about(sentence, place):
                    found.setdefault(fact)
            elif token.kind not in ("anchor", "word", "mark"):
                denied = _denied(sentence, place)
                found.setdefault(Fact(token.kind, token.name, denied=denied, text=text[token.start : token.end]))
    return list(found)


def _sentences(text: str, lexicon: Lexicon) -> Iterable[list[_Token]]:
    names = {start: (end, kind, name) for start, end, kind, name in lexicon.find(text)}
    sentence: list[_Token] = []
    place = 0
    while place < len(text):
        if place in names:
            end, kind, name = names[place]
            sentence.append(_Token(kind or "anchor", place, end, name))
            place = end
        elif found := _TOKEN.match(text, place):
            if found.lastgroup == "stop":
                yield sentence
                sentence = []
                place = found.end()
                continue
            token = _token(text, found)
            sentence.append(token)
            place = token.end
        else:
            place += 1
    yield sentence


def _token(text: str, found: re.Match[str]) -> _Token:
    kind, (start, end), written = found.lastgroup or "", found.span(), found[0]
    if kind in ("word", "mark"):
        return _Token(kind, start, end, written.casefold())
    if kind == "day":
        number = int(re.sub(r"\D", "", written))
        return _Token("day", start, end, fact=Fact("day", number, raw=number, text=written))
    if kind in ("iso", "slashed", "dayfirst", "monthfirst"):
        if day := _date(kind, written):
            return _Token("date", start, end, fact=Fact("date", day, raw=day, text=written))
        return _Token("word", start, end, written.casefold())  # 2134-13-40 is no date, and no numbers either
    if kind == "clock":
        if clock := _time(written):
            return _Token("time", start, end, fact=Fact("time", clock, raw=clock, text=written))
        return _Token("word", start, end, written.casefold())
    return _number(text, start, end)


def _number(text: str, start: int, end: int) -> _Token:
    """A number with its unit; 120/80 is one value of two parts."""
    parts = [Decimal(part) for part in text[start:end].replace(",", "").replace("−", "-").split("/")]
    raw = parts[0] if len(parts) == 1 else tuple(parts)
    if age := _AGE.match(text, end):
        fact = Fact("number", raw, "age", "year", raw=raw, known=True, text=text[start : age.end()])
        return _Token("number", start, age.end(), fact=fact)
    unit = _UNIT.match(text, end)
    measured = unit_of(unit[1]) if unit else None
    if unit is None or measured is None:
        return _Token("number", start, end, fact=Fact("number", raw, raw=raw, text=text[start:end]))
    dimension, factor = measured
    scaled = raw * factor if isinstance(raw, Decimal) else tuple(part * factor for part in raw)
    fact = Fact("number", scaled, unit=dimension, raw=raw, text=text[start : unit.end()])
    return _Token("number", start, unit.end(), fact=fact)


def _date(kind: str, written: str) -> str | None:
    """ISO date, None if there is no such day. 03/05/2134 is the fifth of March: the notes are American."""
    numbers = [int(number) for number in re.findall(r"\d+", written)]
    if kind == "iso":
        year, month, day = numbers
    elif kind == "slashed":
        month, day, year = numbers
    else:
        day, year = numbers
        letters = re.search(_MONTH, written, re.IGNORECASE)
        month = MONTHS.index(letters[0][:3].casefold()) + 1 if letters else 0
    try:
        return date(year, month, day).isoformat()
    except ValueError:
        return None


def _time(written: str) -> str | None:
    hour, minute, *_ = (int(number) for number in re.findall(r"\d+", written))
    letters = re.sub(r"[^apm]", "", written.casefold())
    if letters and 1 <= hour <= 12:
        hour = hour % 12 + (12 if letters == "pm" else 0)
    try:
        return time(hour, minute).isoformat("minutes")
    except ValueError:
        return None


def _about(sentence: Sequence[_Token], place: int) -> Fact | None:
    """The value's fact with what it is about; None for a day of what has none."""
    fact = sentence[place].fact
    assert fact is not None
    if fact.about:
        return fact
    distances = {}
    for other, token in enumerate(sentence):
        spoken = token.kind == "word" and token.name not in PASSED_OVER
        dated = token.kind == "anchor" and fact.kind in ("date", "time")
        if spoken or dated or token.kind not in (*VALUES, "anchor", "word", "mark"):
            distances[other] = _distance(sentence, place, other) + (NEARER if spoken else 0)
    if not distances:
        return fact
    nearest = min(distances, key=lambda other: (distances[other], sentence[other].kind == "word", other > place))
    if fact.kind == "day" and sentence[nearest].kind in UNDATED:
        return None
    about = sentence[nearest].name
    return Fact(fact.kind, fact.value, about, fact.unit, raw=fact.raw, known=sentence[nearest].kind != "word", text=fact.text)


def _distance(sentence: Sequence[_Token], place: int, other: int) -> int:
    between = sentence[min(place, other) + 1 : max(place, other)]
    return sum(3 if token.kind == "mark" else 1 for token in between)


def _denied(sentence: Sequence[_Token], place: int) -> bool:
    """Whether a name is denied: a denying word before it, or 'ruled out' around it, with no 'but' between."""
    before = [token.name for token in sentence[:place] if token.kind == "word"]
    after = [token.name for token in sentence[place + 1 :] if token.kind == "word"][:4]
    for other in ("but", "except"):
        if other in before:
            before = before[len(before) - before[::-1].index(other) :]
    before = before[-DENIAL_REACH:]
    ruled_out = any(words[start : start + 2] == ["ruled", "out"] for words in (before, after) for start in range(len(words)))
    negative_for = any(before[start : start + 2] == ["negative", "for"] for start in range(len(before)))
    return ruled_out or negative_for or bool(DENIED_BEFORE.intersection(before))
