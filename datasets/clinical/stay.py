"""A hospital stay as what happened in it, and its text: the prompt from which a model writes the summary.

A prompt is one line for the patient and the two ends of the stay, then one line for each event in the order of time::

    woman, 67 years, admitted 2134-03-05, discharged home 2134-03-09.
    day 1: diagnosis pneumonia.
    day 1: sodium 128 mmol/L, low.
    day 2: ceftriaxone 1 g.
    day 3: procedure bronchoscopy.
    summary:

Day 1 is the day of admission; ``undated: procedure bronchoscopy.`` is an event of which the source does not say when it was.
:func:`stay_of` reads such a prompt back, exactly, so that whoever has the prompt has every fact of it, and what a summary says
can be checked. That holds where every laboratory value and dose is a number with a unit, as not all of a real hospital's are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

Kind = Literal["diagnosis", "procedure", "lab", "drug"]
Sex = Literal["woman", "man"]
Flag = Literal["low", "high", "abnormal", "normal"]

FLAGS: Mapping[str, Flag] = {"low": "low", "high": "high", "abnormal": "abnormal", "normal": "normal"}
CLOSING = "summary:"
_HEAD = re.compile(
    r"(?P<sex>woman|man), (?P<age>\d{1,3}) years, admitted (?P<admitted>\d{4}-\d\d-\d\d), "
    r"(?P<destination>died|discharged [^,\d]+) (?P<discharged>\d{4}-\d\d-\d\d)\."
)
_EVENT = re.compile(r"(?:day (?P<day>\d+)|undated): (?P<what>.+)\.")
_LAB = re.compile(r"(?P<name>.+?) (?P<value>-?\d[\d.]*) (?P<unit>\S.*), (?P<flag>low|high|abnormal|normal)")
_DRUG = re.compile(r"(?P<name>.+?) (?P<value>\d[\d.]*) (?P<unit>\S.*)")
_NAMED = re.compile(r"(?P<kind>diagnosis|procedure) (?P<name>.+)")


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``value`` is text, as its source writes it: doses and laboratory values must not be rounded.

    ``value`` and ``unit`` are a laboratory's or a drug's, ``flag`` is a laboratory's; diagnoses and procedures have but a name.
    ``day`` is 0 where the source has no date. ``value`` and ``unit`` are None where it has none of them.
    """

    day: int
    kind: Kind
    name: str
    value: str | None = None
    unit: str | None = None
    flag: Flag | None = None


@dataclass(frozen=True)
class Stay:
    """One admission of one patient. ``destination`` is a phrase such as ``discharged home`` or ``died``; events are in the
    order of time."""

    sex: Sex
    age: int
    admitted: date
    discharged: date
    destination: str
    events: tuple[Event, ...]

    @property
    def days(self) -> int:
        """Days in hospital, both ends counted."""
        return (self.discharged - self.admitted).days + 1

    def of_kind(self, kind: Kind) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.kind == kind)


def event_text(event: Event) -> str:
    """An event as its prompt line has it, without the day."""
    if event.kind not in ("lab", "drug"):
        return f"{event.kind} {event.name}"
    measured = " ".join(part for part in (event.name, event.value, event.unit) if part)
    return f"{measured}, {event.flag}" if event.flag else measured


def prompt_of(stay: Stay) -> str:
    """The prompt of a stay."""
    head = (
        f"{stay.sex}, {stay.age} years, admitted {stay.admitted.isoformat()}, {stay.destination} {stay.discharged.isoformat()}."
    )
    return "\n".join([head, *(f"{_when(event)}: {event_text(event)}." for event in stay.events), CLOSING])


def _when(event: Event) -> str:
    return f"day {event.day}" if event.day else "undated"


def stay_of(prompt: str) -> Stay:
    """The stay that :func:`prompt_of` made ``prompt`` from.

    Raises:
        ValueError: a line that is not of such a prompt; the message has it.
    """
    lines = prompt.strip().split("\n")
    head = _HEAD.fullmatch(lines[0])
    if head is None:
        raise ValueError(
            f"the first line of a stay is 'woman, 67 years, admitted DATE, discharged home DATE.', found {lines[0]!r}"
        )
    if lines[-1] != CLOSING or len(lines) < 2:
        raise ValueError(f"the last line of a stay is {CLOSING!r}, found {lines[-1]!r}")
    return Stay(
        sex="woman" if head["sex"] == "woman" else "man",
        age=int(head["age"]),
        admitted=date.fromisoformat(head["admitted"]),
        discharged=date.fromisoformat(head["discharged"]),
        destination=head["destination"],
        events=tuple(_event_of(line) for line in lines[1:-1]),
    )


def _event_of(line: str) -> Event:
    found = _EVENT.fullmatch(line)
    if found is None:
        raise ValueError(f"an event of a stay is 'day 2: ceftriaxone 1 g.', found {line!r}")
    day, what = int(found["day"] or 0), found["what"]
    if named := _NAMED.fullmatch(what):
        return Event(day, "diagnosis" if named["kind"] == "diagnosis" else "procedure", named["name"])
    if lab := _LAB.fullmatch(what):
        return Event(day, "lab", lab["name"], lab["value"], lab["unit"], FLAGS[lab["flag"]])
    if drug := _DRUG.fullmatch(what):
        return Event(day, "drug", drug["name"], drug["value"], drug["unit"])
    raise ValueError(f"no diagnosis, procedure, laboratory value or drug: {line!r}")


def in_order(events: Sequence[Event]) -> tuple[Event, ...]:
    """Events by day; on one day diagnoses, laboratory values, drugs, procedures, each in the order given."""
    rank = {"diagnosis": 0, "lab": 1, "drug": 2, "procedure": 3}
    return tuple(sorted(events, key=lambda event: (event.day, rank[event.kind])))


def day_of(stay: Stay, event: Event) -> date:
    """The calendar day of an event that has one."""
    return stay.admitted + timedelta(days=event.day - 1)
