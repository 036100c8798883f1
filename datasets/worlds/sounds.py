"""The world `sounds`: eight synthesised events in clips of two seconds, captions of order, count and overlap.

A clip is 2.048 s at 16 kHz: one to three events of about a third of a second, in groups that follow one another; a group is one
event, or two that sound together. A prompt asks for one of six tasks: one event, a count, an order of two or of three, a count
within an order, an overlap. What is wanted is exactly known, and so is when each event of a rendered clip starts and ends; what
is in any other clip tells `sound_detector`.

Training captions can be made wrong on purpose (`noisy_caption`): the order permuted, a count off by one, an overlap told as an
order, as captions of real recordings are careless about time (AudioCaps' captions name what is heard, seldom in what order). A
model trained on them knows the order partly, which leaves something to prefer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from math import ceil
from typing import Any

import numpy as np

from polyalign.core.randomness import seed_of
from polyalign.datasets.audio.waves import Wave
from polyalign.datasets.worlds.sound_events import EVENTS, RATE, render_event

SAMPLES = 32768
SECONDS = SAMPLES / RATE
TASKS = ("single", "count", "order", "order_of_three", "count_in_order", "overlap")
PHRASES = {event: f"a {event}" for event in EVENTS}
"""How captions name each event."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "single": ("{0}",),
    "count": ("{0} twice", "{0} two times"),
    "count_of_three": ("{0} three times",),
    "order": ("{0} then {1}", "{0} followed by {1}", "{0} before {1}", "{1} after {0}"),
    "order_of_three": ("{0} then {1} then {2}", "{0} followed by {1} then {2}"),
    "twice_first": ("{0} twice then {1}", "{0} twice before {1}"),
    "twice_last": ("{0} then {1} twice", "{0} followed by {1} twice"),
    "overlap": ("{0} while {1} sounds", "{0} and {1} together"),
}
GAIN = (0.6, 1.0)  # an event's loudness beside its nominal one
STEP = 0.128  # seconds: events start on a grid, as a sequencer's do, which leaves a small model less to learn
# How often a training caption is wrong about time, by task. A lone event cannot be.
CAPTION_NOISE = {"count": 0.2, "order": 0.35, "order_of_three": 0.35, "count_in_order": 0.35, "overlap": 0.2}
HELD_OUT = 3  # one composition in so many is held out

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: groups of events, one group after the other, the events of a group together."""

    task: str
    groups: Groups

    @property
    def events(self) -> tuple[str, ...]:
        return tuple(event for group in self.groups for event in group)


@dataclass(frozen=True)
class Event:
    """An event of a clip; ``onset`` and ``offset`` in seconds. ``score``: what share of the sound at its place it explains."""

    event: str
    onset: float
    offset: float
    score: float = 1.0


# --- prompts ---------------------------------------------------------------------------------------------------------------


def captions(spec: Spec, phrases: Mapping[str, str] = PHRASES) -> list[str]:
    """Every wording of a specification, its events named by ``phrases``."""
    names = [phrases[event] for event in spec.events]
    kind = spec.task
    if kind == "count" and len(names) == 3:
        kind = "count_of_three"
    if kind == "count_in_order":
        kind = "twice_first" if names[0] == names[1] else "twice_last"
        names = list(dict.fromkeys(names))
    return [wording.format(*names) for wording in WORDINGS[kind]]


def parse(prompt: str) -> Spec:
    """The specification of a prompt of this world.

    Raises:
        ValueError: the prompt is none that this world can speak of.
    """
    spec = _specifications().get(" ".join(prompt.split()))
    if spec is None:
        raise ValueError(
            f"the world 'sounds' does not know the prompt {prompt!r}; it speaks of {', '.join(PHRASES.values())}: 'a bell', "
            "'a bell twice', 'a bell then a drum', 'a drum after a bell', 'a bell then a drum then a horn', 'a bell twice then "
            "a drum', 'a bell while a drum sounds'"
        )
    return spec


def all_prompts() -> list[str]:
    """Every prompt of the world."""
    return list(_specifications())


@lru_cache(maxsize=1)
def _specifications() -> dict[str, Spec]:
    return {caption: spec for task in TASKS for spec in _all_of(task) for caption in captions(spec)}


@lru_cache(maxsize=len(TASKS))
def _all_of(task: str) -> tuple[Spec, ...]:
    return tuple(Spec(task, groups) for groups in groups_of(task, tuple(EVENTS)))


def groups_of(task: str, events: Sequence[str]) -> Iterator[Groups]:
    """Every arrangement of ``events`` that a task knows."""
    if task == "single":
        yield from (((event,),) for event in events)
    elif task == "count":
        yield from (((event,),) * times for event in events for times in (2, 3))
    elif task == "order":
        yield from (((first,), (second,)) for first, second in permutations(events, 2))
    elif task == "order_of_three":
        yield from (((first,), (second,), (third,)) for first, second, third in permutations(events, 3))
    elif task == "count_in_order":
        for first, second in permutations(events, 2):
            yield ((first,), (first,), (second,))
            yield ((first,), (second,), (second,))
    else:  # a bell over a drum is a drum over a bell: both are prompts, and one composition
        yield from ((pair,) for pair in permutations(events, 2))


def _composition(spec: Spec) -> str:
    return " > ".join("+".join(sorted(group)) for group in spec.groups)


@lru_cache(maxsize=1)
def _held_out() -> frozenset[str]:
    """A third of each task's compositions, in the order of their hash; of lone events none."""
    chosen: set[str] = set()
    for task in TASKS[1:]:
        every = sorted({_composition(spec) for spec in _all_of(task)})
        every.sort(key=lambda composition: hashlib.sha256(f"{task}: {composition}".encode()).digest())
        chosen.update(every[: len(every) // HELD_OUT])
    return frozenset(chosen)


def held_out(prompt: str) -> bool:
    """Whether a prompt is one of those that never take part in alignment, and that evaluation asks for. What is held out is the
    composition, under every wording: another wording of a trained prompt would be no test."""
    return _composition(parse(prompt)) in _held_out()


def prompts(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` conditions of a split (``train`` or ``heldout``), the tasks about time in turn: {"prompt", "task"}.

    Lone events are in no split: nothing about them can be preferred. The same prompt comes more than once when a task has fewer
    prompts than are asked for.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"the world 'sounds' has the splits 'train' and 'heldout', not {split!r}")
    by_task: dict[str, list[str]] = {}
    for task in TASKS[1:]:
        texts = [text for spec in _all_of(task) for text in captions(spec) if held_out(text) == (split == "heldout")]
        random.Random(f"sounds-{seed}-{split}-{task}").shuffle(texts)
        by_task[task] = texts
    chosen = []
    for index in range(count):
        task = TASKS[1 + index % len(by_task)]
        texts = by_task[task]
        chosen.append({"prompt": texts[(index // len(by_task)) % len(texts)], "task": task})
    return chosen


def random_spec(draws: random.Random, tasks: Sequence[str] = TASKS, *, split: str | None = None) -> Spec:
    """One specification: one of ``tasks`` evenly (a task named twice comes twice as often), then evenly within it; of one
    split, where one is named. Tasks of which the split has none (of lone events nothing is held out) are passed over.

    Raises:
        ValueError: it has none of any of them.
    """

    def fits(spec: Spec) -> bool:
        return split is None or (_composition(spec) in _held_out()) == (split == "heldout")

    able = [task for task in tasks if any(map(fits, _all_of(task)))]
    if not able:
        raise ValueError(f"the split {split!r} has nothing of {', '.join(tasks)}")
    task = draws.choice(able)
    while not fits(spec := draws.choice(_all_of(task))):
        pass
    return spec


def noisy_caption(spec: Spec, draws: random.Random) -> str:
    """A caption of ``spec``, wrong about time with the probability of its task (`CAPTION_NOISE`)."""
    if draws.random() < CAPTION_NOISE.get(spec.task, 0.0):
        spec = wrong(spec, draws)
    return draws.choice(captions(spec))


def wrong(spec: Spec, draws: random.Random) -> Spec:
    """The same events in another order, another number, or one after the other in the place of together."""
    if spec.task == "count":
        return Spec("count", spec.groups[:1] * (5 - len(spec.groups)))
    if spec.task == "overlap":
        first, second = draws.sample(spec.groups[0], 2)
        return Spec("order", ((first,), (second,)))
    others = sorted({order for order in permutations(spec.groups) if order != spec.groups})
    if spec.task == "count_in_order":  # 'a bell, a drum, a bell' has no wording
        others = [spec.groups[::-1]]
    return Spec(spec.task, draws.choice(others))


# --- clips -----------------------------------------------------------------------------------------------------------------


def place(lengths: Sequence[Sequence[float]], draws: np.random.Generator) -> list[list[float]]:
    """Onsets in seconds, on the grid of `STEP`, of groups of events with these lengths: one group after the other with a step
    between them at least, the rest of the clip shared out by chance; the events of a group start at once.

    Raises:
        ValueError: the groups do not fit into a clip.
    """
    whole = [max(ceil(length / STEP) for length in group) for group in lengths]
    spare = int(SECONDS / STEP) - sum(whole) - (len(whole) + 1)
    if spare < 0:
        seconds = sum(whole) * STEP
        raise ValueError(f"events of {seconds:.2f} s in {len(whole)} groups do not fit into a clip of {SECONDS:.2f} s")
    rests = draws.multinomial(spare, draws.dirichlet([3.0] * (len(whole) + 1)))
    onsets, now = [], 0
    for rest, group, length in zip(rests, lengths, whole, strict=False):
        now += 1 + int(rest)
        onsets.append([now * STEP] * len(group))
        now += length
    return onsets


def mix(groups: Sequence[Sequence[tuple[str, np.ndarray]]], draws: np.random.Generator) -> tuple[Wave, list[Event]]:
    """A clip of named sounds at `RATE`, group after group, and its list of events by onset.

    Raises:
        ValueError: the groups do not fit into a clip.
    """
    onsets = place([[len(samples) / RATE for _, samples in group] for group in groups], draws)
    clip, events = np.zeros(SAMPLES, dtype=np.float32), []
    for group, starts in zip(groups, onsets, strict=True):
        for (name, samples), start in zip(group, starts, strict=True):
            first = min(round(start * RATE), SAMPLES - len(samples))
            clip[first : first + len(samples)] += samples
            events.append(Event(name, first / RATE, (first + len(samples)) / RATE))
    return Wave(np.clip(clip, -1, 1), RATE), sorted(events, key=lambda event: event.onset)


def render(spec: Spec, seed: int) -> tuple[Wave, list[Event]]:
    """A right clip of ``spec``, and its events. Pitch, length, loudness, noise and places follow from ``seed``."""
    draws = np.random.default_rng(seed)
    groups = [[(name, float(draws.uniform(*GAIN)) * render_event(name, draws)) for name in group] for group in spec.groups]
    return mix(groups, draws)


def clips(
    split: str | None, count: int, seed: int = 0, tasks: Sequence[str] = TASKS
) -> Iterator[tuple[Spec, Wave, list[Event]]]:
    """``count`` clips of random specifications of a split (None: of all)."""
    draws = random.Random(f"sounds-clips-{seed}-{split}")
    for index in range(count):
        spec = random_spec(draws, tasks, split=split)
        yield spec, *render(spec, seed_of(seed, "sounds", str(split), index))


# --- what is right ---------------------------------------------------------------------------------------------------------


def together(first: Event, second: Event) -> bool:
    """Whether two events overlap by half of the shorter one (STEAM's rule for a failed order, AudioTime, arXiv 2407.02857)."""
    common = min(first.offset, second.offset) - max(first.onset, second.onset)
    return common >= 0.5 * min(first.offset - first.onset, second.offset - second.onset)


def satisfies(events: Sequence[Event], spec: Spec) -> bool:
    """Exactly the events that were asked for, in their order, and together where they were asked to be together."""
    if sorted(event.event for event in events) != sorted(spec.events):
        return False
    found = sorted(events, key=lambda event: event.onset)
    start = 0
    for group in spec.groups:
        part = found[start : start + len(group)]
        start += len(group)
        if sorted(event.event for event in part) != sorted(group):
            return False
        if any(not together(first, second) for first, second in combinations(part, 2)):
            return False
        if start < len(found) and any(together(one, found[start]) for one in part):
            return False
    return True
