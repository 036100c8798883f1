"""Where in a sound a phrase is heard: a curve of likeness over windows, and the events where it is high.

Letters: W windows, P phrases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from polyalign.core.errors import UserError
from polyalign.evaluation.audio import tagger
from polyalign.evaluation.audio.clap import Clap
from polyalign.evaluation.audio.sound import Sound, windows
from polyalign.evaluation.audio.temporal import Event


class Locator(Protocol):
    """Finds phrases in a sound."""

    def __call__(self, sound: Sound, phrases: Sequence[str]) -> list[Event]: ...


@dataclass(frozen=True)
class Windows:
    """How a sound is looked through, and when a phrase is there.

    Args:
        width, hop: of the windows, in seconds.
        presence: a phrase is in a sound if its curve reaches this.
        share: an event is where the curve is at least this share of the way from ``floor`` to its maximum.
        floor: of the curve; 0 takes ``share`` of the maximum itself.
        batch: windows heard together.
    """

    width: float = 2.0
    hop: float = 0.5
    presence: float = 0.2
    share: float = 0.5
    floor: float = 0.0
    batch: int = 32

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.hop > 0 and 0 < self.share < 1 and self.batch >= 1):
            raise UserError(
                f"windows of {self.width} s every {self.hop} s, an event from {self.share} of the maximum, "
                f"{self.batch} at a time: width and hop have to be above 0, the share between 0 and 1, and the batch at least 1"
            )

    def __str__(self) -> str:
        return (
            f"windows {self.width:g} s every {self.hop:g} s, present from {self.presence:g}, "
            f"from {self.share:g} between {self.floor:g} and the maximum"
        )


def events_of(curve: np.ndarray, times: np.ndarray, phrase: str, asked: Windows) -> list[Event]:
    """The stretches of a curve (W,) that are near its maximum, as events from the middle of their first window to that of their
    last, at least one hop long; none if the curve stays under ``presence``.

    At half of the maximum a window holds about half of what it can of an event, so its middle is near the event's start.
    """
    top = float(curve.max(initial=-np.inf))
    if top < asked.presence:
        return []
    high = np.concatenate([[False], curve >= asked.floor + asked.share * (top - asked.floor), [False]])
    edges = np.flatnonzero(high[1:] != high[:-1])
    return [
        Event(phrase, float(times[first]), float(times[last - 1] + asked.hop), float(curve[first:last].max()))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    ]


@dataclass(frozen=True)
class ClapLocator:
    """Cosine of each window with each phrase, in CLAP's space."""

    clap: Clap
    windows: Windows

    def __call__(self, sound: Sound, phrases: Sequence[str]) -> list[Event]:
        names = list(dict.fromkeys(phrases))
        pieces, times = windows(sound, self.windows.width, self.windows.hop)
        with torch.inference_mode():
            texts = self.clap.texts(names)
            parts = (pieces[start : start + self.windows.batch] for start in range(0, len(pieces), self.windows.batch))
            curves = torch.cat([self.clap.sounds(part) @ texts.T for part in parts]).cpu().numpy()
        found = [
            event for name, curve in zip(names, curves.T, strict=True) for event in events_of(curve, times, name, self.windows)
        ]
        return sorted(found, key=lambda event: event.onset)


@dataclass(frozen=True)
class TaggerLocator:
    """The greatest probability (sigmoid) of a phrase's labels in each window.

    Raises:
        UserError: when called with a phrase that shares no word with any label and for which ``labels`` says none.
    """

    tagger: tagger.Tagger
    windows: Windows
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(self, sound: Sound, phrases: Sequence[str]) -> list[Event]:
        names = list(dict.fromkeys(phrases))
        places = {name: tagger.labels_of(name, self.tagger.labels, self.labels) for name in names}
        if lost := [name for name, own in places.items() if not own]:
            raise UserError(
                f"no label of the tagger shares a word with {lost[0]!r}. Say which it means by "
                f"{{{lost[0]!r}: [LABEL, ...]}}: with a judge's option labels, or in a JSON file given as --labels"
            )
        pieces, times = windows(sound, self.windows.width, self.windows.hop)
        with torch.inference_mode():
            parts = (pieces[start : start + self.windows.batch] for start in range(0, len(pieces), self.windows.batch))
            shares = torch.cat([self.tagger(part)[1].sigmoid() for part in parts]).cpu().numpy()
        found = [event for name in names for event in events_of(shares[:, places[name]].max(1), times, name, self.windows)]
        return sorted(found, key=lambda event: event.onset)
