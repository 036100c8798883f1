"""The world `clinical`: hospital stays that never were, and summaries whose every fact can be checked.

A patient is sampled first, as structure: who, when, and what happened. The stay's text and its right summary are rendered from
that, so the judge knows every fact exactly; no patient's data are anywhere in it. A right summary is::

    A 67-year-old woman was admitted on 2134-03-05 with pneumonia. On day 1, sodium was low at 128 mmol/L. On day 2, ceftriaxone
    1 g was given. On day 3, bronchoscopy was done. Discharged home on 2134-03-09.

The judge reads a summary sentence by sentence into facts and compares these with the stay's. A fact is *omitted* if nothing in
the summary speaks of it, *altered* if something does and says it otherwise (another dose, another day, another date),
*invented* if the stay has nothing of it; a sentence that is none of these forms is invented too.
Score = right / (facts of the stay + invented).

Doctors' summaries have errors, and so have those that the embedded base learnt from: :func:`noisy_summary`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import lru_cache
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.clinical.stay import Event, Flag, Stay, in_order, prompt_of, stay_of

DIAGNOSES = (
    "pneumonia", "sepsis", "anaemia", "hyponatraemia", "heart failure", "atrial fibrillation", "pancreatitis", "stroke",
    "asthma", "cellulitis", "diabetes", "hypertension", "delirium", "hepatitis", "pyelonephritis", "gout",
)  # fmt: skip
PROCEDURES = (
    "bronchoscopy", "echocardiogram", "dialysis", "intubation", "colonoscopy", "transfusion", "lumbar puncture",
    "cardioversion", "paracentesis", "gastroscopy", "biopsy", "debridement",
)  # fmt: skip
DESTINATIONS = ("discharged home", "discharged to rehabilitation", "discharged to hospice", "died")

LABS: Mapping[str, tuple[str, tuple[int, int], tuple[int, int], int]] = {
    "sodium": ("mmol/L", (112, 133), (147, 162), 0),
    "potassium": ("mmol/L", (20, 33), (54, 69), 1),
    "creatinine": ("mg/dL", (2, 5), (14, 79), 1),
    "haemoglobin": ("g/dL", (52, 109), (176, 199), 1),
    "glucose": ("mg/dL", (31, 64), (186, 480), 0),
    "lactate": ("mmol/L", (2, 4), (25, 98), 1),
    "platelets": ("10^9/L", (14, 128), (460, 890), 0),
    "calcium": ("mg/dL", (61, 82), (108, 139), 1),
}
"""Unit, range of low values, range of high values (whole numbers of the last digit), digits after the point."""

DRUGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ceftriaxone": ("g", ("1", "2")),
    "furosemide": ("mg", ("20", "40", "80")),
    "metoprolol": ("mg", ("25", "50", "100")),
    "heparin": ("units", ("5000", "7500")),
    "insulin": ("units", ("4", "6", "8", "12")),
    "vancomycin": ("mg", ("750", "1000", "1250")),
    "morphine": ("mg", ("2", "4", "5")),
    "warfarin": ("mg", ("2.5", "3", "5")),
    "prednisone": ("mg", ("10", "30", "60")),
    "lisinopril": ("mg", ("5", "10", "20")),
    "amiodarone": ("mg", ("150", "200", "400")),
    "omeprazole": ("mg", ("20", "40")),
}
HELD_OUT_SHARE = 8
"""One stay in so many is held out, by the hash of its prompt."""

ERRORS: Mapping[str, float] = {"altered": 0.10, "omitted": 0.06, "invented": 0.06}
"""Chance of each kind of error in a summary that the embedded base learns from."""


# --- stays -------------------------------------------------------------------------------------------------------------------


def random_stay(rng: random.Random) -> Stay:
    """One stay of two to nine days with four to seven events; no name occurs twice in it."""
    days = rng.randint(2, 9)
    admitted = date(2100 + rng.randrange(100), 1, 1) + timedelta(days=rng.randrange(360))
    chosen = [Event(1, "diagnosis", name) for name in rng.sample(DIAGNOSES, rng.randint(1, 2))]
    kinds = [rng.choice(("lab", "drug", "procedure")) for _ in range(rng.randint(3, 5))]
    names = {
        kind: iter(rng.sample(list(of), len(of))) for kind, of in (("lab", LABS), ("drug", DRUGS), ("procedure", PROCEDURES))
    }
    chosen += [_event(kind, next(names[kind]), rng.randint(1, days), rng) for kind in kinds]
    return Stay(
        sex=rng.choice(("woman", "man")),
        age=rng.randint(19, 98),
        admitted=admitted,
        discharged=admitted + timedelta(days=days - 1),
        destination=rng.choice(DESTINATIONS),
        events=in_order(chosen),
    )


def _event(kind: str, name: str, day: int, rng: random.Random) -> Event:
    if kind == "procedure":
        return Event(day, "procedure", name)
    if kind == "drug":
        unit, doses = DRUGS[name]
        return Event(day, "drug", name, rng.choice(doses), unit)
    unit, low, high, digits = LABS[name]
    flag: Flag = rng.choice(("low", "high"))
    value = rng.randint(*(low if flag == "low" else high))
    return Event(day, "lab", name, f"{value / 10**digits:.{digits}f}", unit, flag)


def held_out(prompt: str) -> bool:
    """Whether a stay is kept from training and alignment."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def stays(split: str, count: int, seed: int = 0) -> list[Stay]:
    """``count`` different stays of a split, ``train`` or ``heldout``.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"the world 'clinical' has the splits 'train' and 'heldout', not {split!r}")
    return _different(_stream(split, seed), count)


def _stream(split: str, seed: int) -> Iterator[Stay]:
    rng = random.Random(f"clinical-{seed}-{split}")
    while True:
        stay = random_stay(rng)
        if held_out(prompt_of(stay)) == (split == "heldout"):
            yield stay


def _different(stream: Iterator[Stay], count: int) -> list[Stay]:
    found: dict[Stay, None] = {}
    while len(found) < count:
        found.setdefault(next(stream))
    return list(found)


def prompts(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` conditions of a split: {"prompt", "task", "reference"}, of which the last is the right summary.

    Raises:
        ValueError: another split.
    """
    found = stays(split, count, seed)
    return [{"prompt": prompt_of(stay), "task": "summary", "reference": summary_of(stay)} for stay in found]


# --- summaries ---------------------------------------------------------------------------------------------------------------


def summary_of(stay: Stay) -> str:
    """The right summary."""
    names = " and ".join(event.name for event in stay.of_kind("diagnosis"))
    first = f"A {stay.age}-year-old {stay.sex} was admitted on {stay.admitted.isoformat()}{f' with {names}' if names else ''}."
    told = [_sentence(event) for event in stay.events if event.kind != "diagnosis"]
    return " ".join([first, *told, f"{stay.destination.capitalize()} on {stay.discharged.isoformat()}."])


def _sentence(event: Event) -> str:
    what = {
        "lab": f"{event.name} was {event.flag} at {event.value} {event.unit}",
        "drug": f"{event.name} {event.value} {event.unit} was given",
        "procedure": f"{event.name} was done",
    }[event.kind]
    return f"On day {event.day}, {what}."


def noisy_summary(stay: Stay, rng: random.Random) -> str:
    """A summary as a hurried doctor writes it: each kind of error in `ERRORS` with its own chance, once at most."""
    told = stay
    others = [event for event in stay.events if event.kind != "diagnosis"]
    if rng.random() < ERRORS["omitted"]:
        left_out = rng.choice(others)
        told = replace(told, events=tuple(event for event in told.events if event != left_out))
    if rng.random() < ERRORS["invented"]:
        have = {event.name for event in stay.events}
        kind, names = rng.choice((("lab", LABS), ("drug", DRUGS), ("procedure", PROCEDURES)))
        name = rng.choice([name for name in names if name not in have])
        told = replace(told, events=in_order([*told.events, _event(kind, name, rng.randint(1, stay.days), rng)]))
    if rng.random() < ERRORS["altered"]:
        told = _altered(told, rng)
    return summary_of(told)


def _altered(stay: Stay, rng: random.Random) -> Stay:
    """The stay with one fact changed: an age, a date, a day, a dose or a value."""
    options = [event for event in stay.events if event.kind != "diagnosis"]
    choice = rng.randrange(len(options) + 2)
    if choice == 0:
        return replace(stay, age=stay.age + rng.choice((-10, -1, 1, 10)))
    if choice == 1:
        return replace(stay, discharged=stay.discharged + timedelta(days=rng.choice((-1, 1, 10))))
    event = options[choice - 2]
    if event.kind == "procedure" or rng.random() < 0.5:
        other = replace(event, day=rng.choice([day for day in range(1, stay.days + 2) if day != event.day]))
    else:
        again = (_event(event.kind, event.name, event.day, rng) for _ in range(100))
        other = next((one for one in again if one.value != event.value), replace(event, day=event.day + 1))
    return replace(stay, events=tuple(other if one == event else one for one in stay.events))


# --- the judge ---------------------------------------------------------------------------------------------------------------

_FIRST = re.compile(r"A (\d+)-year-old (woman|man) was admitted on (\S+?)(?: with (.+))?")
_TOLD = re.compile(r"On day (\d+), (.+)")
_LAST = re.compile(r"(Died|Discharged [^\d]+?) on (\S+)")
_LAB = re.compile(r"(.+?) was (low|high|abnormal|normal) at (\S+) (.+)")
_DRUG = re.compile(r"(.+?) (\d\S*) (.+) was given")
_DONE = re.compile(r"(.+) was done")

Anchor = tuple[str, ...]
Details = tuple[str, ...]


def facts_of(stay: Stay) -> dict[Anchor, Details]:
    """A stay's facts: what each is about, and what it says of it."""
    facts: dict[Anchor, Details] = {
        ("patient",): (str(stay.age), stay.sex),
        ("admission",): (stay.admitted.isoformat(),),
        ("end",): (stay.destination, stay.discharged.isoformat()),
    }
    for event in stay.events:
        anchor = (event.kind, event.name)
        details = () if event.kind == "diagnosis" else (str(event.day), event.value or "", event.unit or "", event.flag or "")
        facts[anchor] = details
    return facts


def facts_told(summary: str) -> list[tuple[Anchor, Details]]:
    """What a summary says, a sentence after the other; one that cannot be read is ("unreadable", the sentence)."""
    facts: list[tuple[Anchor, Details]] = []
    for sentence in re.split(r"\.\s+|\.$", summary.strip()):
        if sentence:
            facts += _facts_of_sentence(sentence)
    return facts


def _facts_of_sentence(sentence: str) -> list[tuple[Anchor, Details]]:
    if found := _FIRST.fullmatch(sentence):
        age, sex, admitted, names = found.groups()
        told = [(("diagnosis", name), ()) for name in (names.split(" and ") if names else ())]
        return [(("patient",), (age, sex)), (("admission",), (admitted,)), *told]
    if found := _LAST.fullmatch(sentence):
        return [(("end",), (found[1].lower(), found[2]))]
    told_on = _TOLD.fullmatch(sentence)
    if told_on is None:
        return [(("unreadable", sentence), ())]
    day, what = told_on.groups()
    if lab := _LAB.fullmatch(what):
        return [(("lab", lab[1]), (day, lab[3], lab[4], lab[2]))]
    if drug := _DRUG.fullmatch(what):
        return [(("drug", drug[1]), (day, drug[2], drug[3], ""))]
    if done := _DONE.fullmatch(what):
        return [(("procedure", done[1]), (day, "", "", ""))]
    return [(("unreadable", sentence), ())]


@dataclass(frozen=True)
class Verdict:
    """Numbers of facts. ``facts`` are those of the stay: right, altered or omitted; ``invented`` come on top, ``unreadable`` of
    them in sentences of no known form."""

    facts: int
    right: int
    altered: int
    omitted: int
    invented: int
    unreadable: int

    @property
    def score(self) -> float:
        return self.right / (self.facts + self.invented)


def compare(stay: Stay, summary: str) -> Verdict:
    """Every fact of the stay and of the summary, counted. What is told twice counts once, and as invented from then on."""
    source, told = facts_of(stay), facts_told(summary)
    said: dict[Anchor, Details] = {}
    invented = 0
    for anchor, details in told:
        if anchor not in source or anchor in said:
            invented += 1
        else:
            said[anchor] = details
    right = sum(source[anchor] == details for anchor, details in said.items())
    return Verdict(
        facts=len(source),
        right=right,
        altered=len(said) - right,
        omitted=len(source) - len(said),
        invented=invented,
        unreadable=sum(anchor[0] == "unreadable" for anchor, _ in told),
    )


@lru_cache(maxsize=4096)
def _stay_once(prompt: str) -> Stay:
    return stay_of(prompt)


class ClinicalJudge:
    """The exact judge: right facts / (facts of the stay + invented ones), 1 for a summary that is right in everything."""

    name = "clinical"
    version = "1"
    right_from = 1.0  # from this score on the summary is right

    def verdict(self, condition: Mapping[str, Any], summary: str) -> Verdict:
        """Raises:
        UserError: the prompt is no stay.
        """
        try:
            stay = _stay_once(condition["prompt"])
        except ValueError as error:
            raise UserError(f"the judge 'clinical': {error}") from error
        return compare(stay, summary)

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        return [self.verdict(condition, summary).score for condition, summary in zip(conditions, outputs, strict=True)]
