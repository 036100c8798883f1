"""What sounds in a clip of the world `sounds`: events by matching templates, and the world's exact judge. No weights.

The detector sees the square root of mel band power. It knows each event's mean band power (its template, from renderings) and
explains a clip greedily, as `shapes` explains a picture by sprites: the event, place and loudness that take most of what is not
yet explained, again and again, powers adding up where events overlap; then all loudnesses anew. A clip is *clean* if little is
left unexplained. Since only band power counts, a clip whose phases were lost (Griffin-Lim, vocoders) is judged as any other.

Measured on clips that the thresholds were not set on (``measure``): see the tests, which hold it to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers.audio_utils import mel_filter_bank

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave, resampled
from polyalign.datasets.worlds.sound_events import EVENTS, RATE, render_event
from polyalign.datasets.worlds.sounds import SECONDS, Event, Spec, parse, satisfies

WINDOW, HOP, BANDS = 1024, 256, 32
BEFORE = 2  # frames of a template before its event starts, where the window already hears it
RENDERINGS = 48  # that a template is the mean of
MOST = 8  # events that are looked for
QUIETEST = 0.3  # of the nominal loudness; what is fainter is no event
ALIKE = 0.75  # cosine between an event and the sound at its place, in the bands and frames that make up the event
SAME_APART = 0.2  # seconds between two of the same event
CLEAN = 0.5  # unexplained share of the sound, as amplitudes, in a clean clip
SILENT = 1e-3  # root mean square of a clip without sound


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    """(WINDOW / 2 + 1, BANDS) triangles of height 1."""
    return mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, norm=None, mel_scale="slaney")


def band_power(samples: np.ndarray) -> np.ndarray:
    """(frames, BANDS): power in mel bands, a frame every `HOP` samples, centred on it."""
    padded = np.pad(np.asarray(samples, dtype=np.float32), WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1].astype(np.float32), axis=1)
    return (abs(spectrum) ** 2) @ _filters()


@lru_cache(maxsize=1)
def templates() -> np.ndarray:
    """(events, frames, BANDS): mean band power of each event at loudness 1, its start at frame `BEFORE`, padded with zeros."""
    draws = np.random.default_rng(20261121)
    longest = max(length for _, length in EVENTS.values())
    frames = int(np.ceil(longest * 1.08 * RATE / HOP)) + 2 * BEFORE
    found = np.zeros((len(EVENTS), frames, BANDS))
    for index, name in enumerate(EVENTS):
        for _ in range(RENDERINGS):
            buffer = np.zeros(frames * HOP, dtype=np.float32)
            samples = render_event(name, draws)
            start = BEFORE * HOP + int(draws.integers(-HOP // 2, HOP // 2))
            buffer[start : start + len(samples)] = samples[: len(buffer) - start]
            found[index] += band_power(buffer)[:frames] / RENDERINGS
    return found


@dataclass(frozen=True)
class Detection:
    """What was found: the events by onset, and what share of the sound they leave unexplained (amplitudes; 0 to 1)."""

    events: tuple[Event, ...]
    unexplained: float

    @property
    def clean(self) -> bool:
        return bool(self.events) and self.unexplained <= CLEAN


def detect(wave: Any) -> list[Event]:
    """The events of a clip, by onset. ``wave`` has ``samples`` and ``rate``; it is resampled to `RATE` if it has another."""
    return list(explain(wave).events)


def explain(wave: Any) -> Detection:
    """The events of a clip and what they leave unexplained."""
    samples = resampled(Wave(np.asarray(wave.samples, dtype=np.float32), wave.rate), RATE).samples
    if len(samples) < 2 or float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) < SILENT:
        return Detection((), 1.0)
    power = band_power(samples)
    found = _refined(power, _greedy(power))
    amplitude = np.sqrt(power)
    left = amplitude - np.sqrt(_model(power.shape, found))
    share = float(np.sqrt((left**2).sum() / (amplitude**2).sum()))
    names = list(EVENTS)
    events = [
        Event(names[kind], frame * HOP / RATE, frame * HOP / RATE + EVENTS[names[kind]][1], round(alike, 4))
        for kind, frame, _, alike in found
    ]
    return Detection(tuple(sorted(events, key=lambda event: event.onset)), share)


Found = tuple[int, int, float, float]
"""Kind of event, frame of its onset, loudness, likeness."""


def _greedy(power: np.ndarray) -> list[Found]:
    shapes = np.sqrt(templates())
    kinds, frames, bands = shapes.shape
    flat = shapes.reshape(kinds, -1)
    norms = (flat**2).sum(1)
    supports = (shapes > 0.15 * shapes.max((1, 2), keepdims=True)).reshape(kinds, -1).astype(float)
    padded = np.pad(power, ((BEFORE, frames), (0, 0)))
    left = padded.copy()
    barred = np.zeros((len(power), kinds), dtype=bool)
    found: list[Found] = []
    while len(found) < MOST:
        seen = np.lib.stride_tricks.sliding_window_view(np.sqrt(left), frames, axis=0)[: len(power)]
        seen = seen.transpose(0, 2, 1).reshape(len(power), -1)  # (onsets, frames * bands)
        dots = seen @ flat.T
        at_place = (seen**2) @ supports.T
        alike = (seen @ (flat * supports).T) / np.sqrt(((flat * supports) ** 2).sum(1) * at_place + 1e-12)
        loud = dots / norms
        gain = np.where((loud >= QUIETEST) & (alike >= ALIKE) & ~barred, dots**2 / norms, 0)
        place, kind = np.unravel_index(gain.argmax(), gain.shape)
        if gain[place, kind] == 0:
            break
        found.append((int(kind), int(place), float(loud[place, kind]), float(alike[place, kind])))
        window = left[place : place + frames]
        window[:] = np.maximum(window - loud[place, kind] ** 2 * templates()[kind], 0)
        near = int(SAME_APART * RATE / HOP)
        barred[max(0, place - near) : place + near + 1, kind] = True
    return found


def _model(shape: tuple[int, ...], found: Sequence[Found]) -> np.ndarray:
    """Band power of some events."""
    frames = templates().shape[1]
    whole = np.zeros((shape[0] + BEFORE + frames, shape[1]))
    for kind, place, loud, _ in found:
        whole[place : place + frames] += loud**2 * templates()[kind]
    return whole[BEFORE : BEFORE + shape[0]]


def _refined(power: np.ndarray, found: list[Found]) -> list[Found]:
    """All loudnesses anew, each on what the others leave, twice; and those that turn out too faint left out."""
    for _ in range(2):
        for index in range(len(found)):
            kind, place, _, alike = found[index]
            others = found[:index] + found[index + 1 :]
            rest = np.sqrt(np.maximum(power - _model(power.shape, others), 0))
            shape = np.sqrt(_model(power.shape, [(kind, place, 1.0, 1.0)]))
            found[index] = (kind, place, float((rest * shape).sum() / (shape**2).sum()), alike)
    return [one for one in found if one[2] >= QUIETEST]


# --- the judge -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the judge heard. ``score``: 1 right, 0 clean but wrong, -1 not clean."""

    events: tuple[Event, ...]
    unexplained: float
    clean: bool
    right: bool

    @property
    def score(self) -> float:
        return 1.0 if self.right else (0.0 if self.clean else -1.0)


class SoundsJudge:
    """The exact judge: 1 for a right clip, 0 for a clean clip of something else, -1 for a clip that is not clean."""

    name = "sounds"
    version = "1"
    broken_below = 0.0  # a lower score is a broken clip, not only a wrong one: the report counts these
    right_from = 1.0  # from this score on the clip is right

    def refuse(self, condition: Mapping[str, Any]) -> Spec:
        """What the prompt asks for.

        Raises:
            UserError: the prompt is not of this world.
        """
        try:
            return parse(condition["prompt"])
        except ValueError as error:
            raise UserError(f"the judge 'sounds': {error}") from error

    def verdict(self, condition: Mapping[str, Any], wave: Any) -> Verdict:
        """Raises:
        UserError: the prompt is not of this world, or the clip is longer than the world's.
        """
        spec = self.refuse(condition)
        if len(wave.samples) > 1.05 * SECONDS * wave.rate:
            seconds = len(wave.samples) / wave.rate
            raise UserError(f"the judge 'sounds' hears clips of {SECONDS} s, found one of {seconds:.2f} s")
        found = explain(wave)
        return Verdict(found.events, found.unexplained, found.clean, found.clean and satisfies(found.events, spec))

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> list[float]:
        return [self.verdict(condition, wave).score for condition, wave in zip(conditions, outputs, strict=True)]


# --- figures ---------------------------------------------------------------------------------------------------------------


def order_kept(events: Sequence[Event], spec: Spec) -> bool | None:
    """Of a clip with every event that was asked for: whether all are in their order and together as asked, whatever else is
    there. None where an event is missing, or nothing about time was asked."""
    wanted = list(spec.events)
    kept: list[Event] = []
    for event in sorted(events, key=lambda event: event.onset):
        if event.event in wanted:
            wanted.remove(event.event)
            kept.append(event)
    if wanted or len(set(spec.events)) == 1:
        return None
    return satisfies(kept, spec)


def figures(specs: Sequence[Spec], verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Shares over clips: of asked events that are there (``presence``), of events that nobody asked for among those found
    (``extra``), of clips in the right order among those with all their events (``order``), of right clips (``strict``), of
    clean clips (``clean``), and of right clips by task."""
    asked = there = heard = 0
    orders: list[bool] = []
    right: dict[str, list[bool]] = {}
    clean: list[bool] = []
    for spec, verdict in zip(specs, verdicts, strict=True):
        names = [event.event for event in verdict.events]
        hits = sum(min(names.count(name), spec.events.count(name)) for name in set(spec.events))
        asked, there, heard = asked + len(spec.events), there + hits, heard + len(names)
        kept = order_kept(verdict.events, spec)
        orders += [] if kept is None else [kept]
        right.setdefault(spec.task, []).append(verdict.right)
        clean.append(verdict.clean)
    every = [one for some in right.values() for one in some]
    shares = {
        "presence": there / asked,
        "extra": (heard - there) / max(1, heard),
        "order": float(np.mean(orders)) if orders else float("nan"),
        "strict": float(np.mean(every)),
        "clean": float(np.mean(clean)),
        **{f"strict_{task}": float(np.mean(some)) for task, some in right.items()},
    }
    return {name: round(share, 4) for name, share in shares.items()}


def measure(clips: Iterable[tuple[Spec, Any]]) -> dict[str, float]:
    """The detector's own figures on clips whose events are known: those of :func:`figures`."""
    specs, verdicts = [], []
    for spec, wave in clips:
        found = explain(wave)
        specs.append(spec)
        verdicts.append(Verdict(found.events, found.unexplained, found.clean, found.clean and satisfies(found.events, spec)))
    return figures(specs, verdicts)
