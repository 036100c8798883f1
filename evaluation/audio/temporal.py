"""What sounds when, held against what a caption asks for: presence, extra events, order, strict match.

Letters: K events asked for, F events found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from polyalign.evaluation.audio.phrases import Groups
from polyalign.evaluation.audio.sound import Sound
from polyalign.evaluation.statistics import wilson_interval

OVERLAP = 0.5
"""Share of the shorter of two events from which they are together (STEAM, arXiv 2407.02857)."""


class Found(Protocol):
    """An event that a detector found: its name, and where it starts and ends, in seconds."""

    @property
    def event(self) -> str: ...

    @property
    def onset(self) -> float: ...

    @property
    def offset(self) -> float: ...


@dataclass(frozen=True)
class Event:
    """An event found here; ``score`` is what the detector was sure of."""

    event: str
    onset: float
    offset: float
    score: float = 1.0


Detector = Callable[[Sound], Sequence[Found]]


@dataclass(frozen=True)
class Outcome:
    """One sound against what was asked for.

    Attributes:
        asked, present: events asked for, and how many of them were found (a second bell counts as an event of its own).
        extra: events found beyond those asked for; None where the detector only looks for those.
        pairs, both, right: pairs of different events with an order between them; those of which both were found; those of these
            that start in that order.
        strict: exactly what was asked for, in its order.
    """

    asked: int
    present: int
    extra: int | None
    pairs: int
    both: int
    right: int
    strict: bool

    @property
    def recall(self) -> float:
        return self.present / self.asked if self.asked else 1.0

    @property
    def order(self) -> float:
        """Share of all pairs asked for that are there in their order; the recall where there is none."""
        return self.right / self.pairs if self.pairs else self.recall

    @property
    def graded(self) -> float:
        """(recall + order) / 2 less a tenth for each extra event (at most half); 1 only for a strict match."""
        partial = (self.recall + self.order) / 2 - min(0.5, 0.1 * (self.extra or 0))
        return 1.0 if self.strict else min(partial, 0.95)


def overlapping(first: Found, second: Found) -> bool:
    """Whether two events share half of the shorter one."""
    common = min(first.offset, second.offset) - max(first.onset, second.onset)
    return common >= OVERLAP * min(first.offset - first.onset, second.offset - second.onset)


def outcome(asked: Groups, found: Sequence[Found], *, closed: bool = True) -> Outcome:
    """One sound against what was asked for.

    The k-th event asked for under a name is the k-th found of it. A pair is in order if the one starts before the other; a
    strict match also wants events of different groups apart, and of one group together, by :func:`overlapping`.

    Args:
        closed: the detector names everything in a sound. Otherwise it looked for the events asked for alone: nothing is said of
            extra events, and a strict match does not want events of one group together.
    """
    by_name: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda event: event.onset):
        by_name.setdefault(one.event, []).append(one)
    taken: Counter[str] = Counter()
    items: list[tuple[int, str, Found | None]] = []
    for number, group in enumerate(asked):
        for name in group:
            places = by_name.get(name, [])
            items.append((number, name, places[taken[name]] if taken[name] < len(places) else None))
            taken[name] += 1
    present = sum(event is not None for _, _, event in items)
    extra = len(found) - present if closed else None
    counted = [(one, other) for one, other in combinations(items, 2) if one[0] != other[0] and one[1] != other[1]]
    there = [(one[2], other[2]) for one, other in counted if one[2] is not None and other[2] is not None]
    right = sum(first.onset < second.onset for first, second in there)
    whole = present == len(items) and right == len(counted) and not extra
    strict = whole and _apart(items, closed=closed)
    return Outcome(len(items), present, extra, len(counted), len(there), right, strict)


def _apart(items: Sequence[tuple[int, str, Found | None]], *, closed: bool) -> bool:
    """Whether events of different groups are apart and, for a closed detector, those of one group together."""
    for (group, _, first), (other, _, second) in combinations(items, 2):
        if first is None or second is None:
            return False
        if overlapping(first, second) != (group == other) and (closed or group != other):
            return False
    return True


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Shares over all sounds, each with ``value``, its 95 % Wilson ``interval`` and ``of`` how many.

    ``presence_recall`` counts events, ``order`` and ``order_given_present`` pairs of events, ``strict_match`` and
    ``with_extra_events`` sounds; events and pairs of one sound are taken as independent, so those intervals are a little
    narrow. ``extra_events`` is their mean number in a sound. What nothing was asked of is left out.
    """
    sounds = len(outcomes)
    totals = {name: sum(getattr(one, name) for one in outcomes) for name in ("asked", "present", "pairs", "both", "right")}
    shares = {
        "presence_recall": (totals["present"], totals["asked"]),
        "order": (totals["right"], totals["pairs"]),
        "order_given_present": (totals["right"], totals["both"]),
        "strict_match": (sum(one.strict for one in outcomes), sounds),
    }
    extras = [one.extra for one in outcomes if one.extra is not None]
    shares["with_extra_events"] = (sum(extra > 0 for extra in extras), len(extras))
    made: dict[str, Any] = {
        name: {"value": count / of, "interval": list(wilson_interval(count, of)), "of": of}
        for name, (count, of) in shares.items()
        if of
    }
    if extras:
        made["extra_events"] = {"value": sum(extras) / len(extras), "of": len(extras)}
    return made
