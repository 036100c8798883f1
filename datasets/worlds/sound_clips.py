"""Clips of the world `sounds` composed of real recordings: a folder of short sounds takes the place of the synthesised events.

    FOLDER/cowbell/*.flac
    FOLDER/door slam/*.wav        one folder for each event, its recordings in it; the folder's name is how captions name it

What is held out are recordings, a third of each event's: a model is never judged by the very sound that it was trained on.
Tasks, captions and places are the world's (:mod:`polyalign.datasets.worlds.sounds`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.audio.waves import Wave, read
from polyalign.datasets.worlds.sound_events import LOUDNESS, RATE
from polyalign.datasets.worlds.sounds import GAIN, TASKS, Event, Spec, captions, groups_of, mix

SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")
LONGEST = 0.5  # seconds of a recording that are used: three of them fit into a clip
FADE = 0.01  # seconds at the end of what was cut
SILENCE = 0.02  # of the peak: what is fainter before a recording's first sound and after its last is left out


class Composer:
    """Clips of the recordings in ``folder``.

    Attributes:
        files: each event's recordings by name, the first of files with the same content.
        phrases: how captions name each event.

    Raises:
        UserError: fewer than three events (orders of three need as many), or one without two recordings that can be told apart.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        kinds = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        self.files = {kind.name: _different(kind) for kind in kinds}
        self.files = {name: files for name, files in self.files.items() if files}
        if len(self.files) < 3:
            raise UserError(
                f"{folder}: found recordings of {len(self.files)} event(s); three at least are needed, each in a folder that "
                f"is called as captions shall name it, with files that end in {', '.join(SUFFIXES)}"
            )
        lone = [name for name, files in self.files.items() if len(files) < 2]
        if lone:
            raise UserError(
                f"{folder}: only one recording of {', '.join(lone)} (copies of a file are one); one of each is held "
                "out, so two are needed"
            )
        self.phrases = {name: f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name.replace('_', ' ')}" for name in self.files}

    def recordings(self, event: str, split: str) -> list[Path]:
        """The files of an event in a split: in the order of the hash of their content a third (at least one) is held out.

        Raises:
            ValueError: another split.
        """
        if split not in ("train", "heldout"):
            raise ValueError(f"recordings are split into 'train' and 'heldout', not {split!r}")
        files = sorted(self.files[event], key=_hash)
        kept_back = max(1, len(files) // 3)
        return files[:kept_back] if split == "heldout" else files[kept_back:]

    def sound(self, file: Path, gain: float = 1.0) -> np.ndarray:
        """One recording as an event: mono at `RATE`, without silence around it, at most `LONGEST` seconds, at the loudness of
        the world's events.

        Raises:
            UserError: the file is no sound, or is silent.
        """
        samples = read(file, RATE).samples
        peak = float(np.abs(samples).max())
        if peak == 0:
            raise UserError(f"{file}: is silent")
        heard = np.flatnonzero(np.abs(samples) > SILENCE * peak)
        samples = samples[heard[0] : min(heard[-1] + 1, heard[0] + int(LONGEST * RATE))].copy()
        fade = min(int(FADE * RATE), len(samples))
        samples[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        window = min(RATE // 10, len(samples))
        energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
        power = float((energy[window:] - energy[:-window]).max() / window)
        return (samples * (gain * LOUDNESS / np.sqrt(power))).astype(np.float32)

    def clips(
        self, split: str, count: int, seed: int = 0, tasks: Sequence[str] = TASKS
    ) -> Iterator[tuple[str, Spec, Wave, list[Event]]]:
        """``count`` clips of the recordings of a split: a right caption, the specification, the clip, and its events."""
        draws = random.Random(f"sound-clips-{seed}-{split}")
        files = {event: self.recordings(event, split) for event in self.files}
        every = {task: list(groups_of(task, list(files))) for task in tasks}
        for index in range(count):
            task = draws.choice(tasks)
            spec = Spec(task, draws.choice(every[task]))
            places = np.random.default_rng(seed_of(seed, "sound-clips", split, index))
            groups = [
                [(event, self.sound(draws.choice(files[event]), float(places.uniform(*GAIN)))) for event in group]
                for group in spec.groups
            ]
            yield (draws.choice(captions(spec, self.phrases)), spec, *mix(groups, places))


def _different(kind: Path) -> list[Path]:
    """The recordings in a folder by name; of copies the first."""
    files = sorted(file for file in kind.iterdir() if file.suffix.lower() in SUFFIXES)
    return sorted({_hash(file): file for file in reversed(files)}.values())


def _hash(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()
