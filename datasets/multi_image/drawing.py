"""Which pictures stand beside which, drawn by key: the part that all formats share.

The items are first shared out over the numbers of images by exact quotas, source by source; each item then draws its
distractors uniformly from the other pictures of its source, without replacement, and the slot it takes itself. Every draw is
keyed by the item's place in its file, so a row is the same whatever was made before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.randomness import permutation, seed_of
from polyalign.datasets.multi_image.sources import Item, Questions

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """One row before any picture is opened: the item, and the names of all pictures in the order in which they are shown."""

    item: Item
    pictures: tuple[str, ...]
    slot: int
    """Where the item's own picture is, counted from 0."""

    @property
    def key(self) -> str:
        """What is different in every plan of one builder."""
        return f"{self.item.number:08d}"


class Rows(Sequence[dict[str, Any]]):
    """Rows that are composed when they are asked for, each alone; ``plans`` say what they will be."""

    def __init__(self, kind: str, questions: Questions, plans: Sequence[Any], compose: Callable[[Any, list[Any]], dict]):
        self.kind, self.questions, self.plans, self._compose = kind, questions, list(plans), compose

    def __len__(self) -> int:
        return len(self.plans)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Raises UserError for a picture that cannot be used, and says which entry it is for."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        plan = self.plans[index]
        try:
            pictures = [self.questions.open(name) for name in plan.pictures]
        except UserError as error:
            raise UserError(f"{error} (needed for {plan.item.place})") from error
        row = self._compose(plan, pictures)
        origin = {"place": plan.item.place, "source": plan.item.source, "pictures": list(plan.pictures)}
        return {"pair_id": f"{self.kind}-{plan.key}", **row, "origin": origin}

    def usable(self, dropped: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Every row whose pictures can be used; the others are appended to ``dropped`` with their problem."""
        for index, plan in enumerate(self.plans):
            try:
                yield self[index]
            except UserError as error:
                dropped.append({"place": plan.item.place, "problem": str(error)})

    def summary(self) -> dict[str, Any]:
        """Numbers of rows, by number of images and by source."""
        counts = Counter(len(plan.pictures) for plan in self.plans)
        sources = Counter(plan.item.source for plan in self.plans)
        return {"rows": len(self), "images": dict(sorted(counts.items())), "sources": dict(sorted(sources.items()))}


def shares(counts: Mapping[int, float], total: int) -> dict[int, int]:
    """``total`` shared out in proportion to ``counts``, exactly: whole parts first, then the largest remainders.

    Raises:
        UserError: no positive part, or a negative one.
    """
    if not counts or any(part < 0 for part in counts.values()) or not sum(counts.values()) > 0:
        raise UserError(f"counts {dict(counts)}: expected numbers of images with the share of each, such as {{2: 3, 4: 1}}")
    whole = sum(counts.values())
    exact = {number: total * part / whole for number, part in counts.items()}
    given = {number: int(part) for number, part in exact.items()}
    rest = sorted(exact, key=lambda number: (given[number] - exact[number], number))
    for number in rest[: total - sum(given.values())]:
        given[number] += 1
    return given


def grouped(things: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    """Things by their key, in order."""
    found: dict[Any, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def check_counts(counts: Mapping[int, float], allowed: Sequence[int], what: str) -> None:
    """Raises UserError for numbers of images that a format does not have."""
    if wrong := sorted(set(counts) - set(allowed)):
        raise UserError(f"counts: {what} of {wrong[0]} images is not known; allowed are {', '.join(map(str, allowed))}")


def limited(items: Sequence[T], limit: int | None, seed: int, kind: str) -> list[T]:
    """At most ``limit`` of ``items``, drawn by key, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise UserError(f"limit: at least one row must be asked for, found {limit}")
    return [items[place] for place in sorted(permutation(seed, len(items), kind, "limit")[:limit])]


def planned(
    questions: Questions,
    kind: str,
    counts: Mapping[int, float],
    *,
    seed: int,
    items: Sequence[Item] | None = None,
    limit: int | None = None,
    across_sources: bool = False,
) -> list[Plan]:
    """One plan for each item (all, or those given), in the order of the file.

    Raises:
        UserError: a source has too few pictures for a number of images that ``counts`` asks for.
    """
    taken = limited(questions.items if items is None else items, limit, seed, kind)
    largest = max((number for number, share in counts.items() if share > 0), default=0)
    plans: list[Plan] = []
    for source, members in grouped(taken, lambda item: "" if across_sources else item.source).items():
        pool = questions.every_picture if across_sources else questions.pictures[source]
        if len(pool) < largest:
            raise UserError(
                f"{largest} images are asked for, and {f'source {source!r}' if source else 'the data'} has {len(pool)} "
                "different picture(s). Ask for fewer in counts, or draw distractors from all sources with across_sources"
            )
        order = permutation(seed, len(members), kind, "counts", source)
        numbers = [number for number, share in shares(counts, len(members)).items() for _ in range(share)]
        where = questions.places[source] if not across_sources else {name: place for place, name in enumerate(pool)}
        plans += [_plan(members[place], pool, where, number, seed, kind) for place, number in zip(order, numbers, strict=True)]
    return sorted(plans, key=lambda plan: plan.item.number)


def _plan(item: Item, pool: Sequence[str], where: Mapping[str, int], number: int, seed: int, kind: str) -> Plan:
    draws = keyed(seed, kind, item.number)
    others = [pool[place] for place in drawn_others(draws, len(pool), (where[item.picture],), number - 1)]
    slot = int(draws.integers(number))
    return Plan(item, (*others[:slot], item.picture, *others[slot:]), slot)


def keyed(seed: int, kind: str, number: int) -> np.random.Generator:
    """The draws of one row."""
    return np.random.default_rng(seed_of(seed, "multi-image", kind, number))


def drawn_others(draws: np.random.Generator, size: int, without: Sequence[int], count: int) -> list[int]:
    """``count`` different places below ``size`` in random order, none of those ``without``."""
    if not count:
        return []
    found = draws.choice(size - len(without), size=count, replace=False)
    for own in sorted(without):
        found += found >= own
    return found.tolist()
