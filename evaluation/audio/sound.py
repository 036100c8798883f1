"""Sounds as the metrics take them: any object with ``samples`` and ``rate``, brought to a network's rate by a named resampler.

Metrics move with the resampler (PANNs' Frechet distance by tens of points), so every score says which one it was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
from scipy.signal import resample_poly

from polyalign.core.errors import UserError

RESAMPLER = "scipy.resample_poly"
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
LONGEST = 1 << 27
"""Samples times channels of a file that is read: 25 minutes of stereo at 44.1 kHz."""


class Sound(Protocol):
    """A mono sound: ``samples`` (n,) in [-1, 1], at ``rate`` samples a second."""

    @property
    def samples(self) -> np.ndarray: ...

    @property
    def rate(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Clip:
    """A sound that was read here, or cut out of another."""

    samples: np.ndarray
    rate: int


def is_sound(output: object) -> bool:
    """Whether an output is one that these metrics can take."""
    return isinstance(getattr(output, "samples", None), np.ndarray) and isinstance(getattr(output, "rate", None), int)


def at_rate(sound: Sound, rate: int) -> np.ndarray:
    """(n,) float32 samples at ``rate``, by polyphase filtering; at the sound's own rate as they are.

    Raises:
        UserError: a sound without samples, or with some that are not finite.
    """
    samples = np.asarray(sound.samples, dtype=np.float32)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise UserError(f"a sound to measure has to be mono and finite, with at least one sample; found shape {samples.shape}")
    if sound.rate == rate:
        return samples
    common = gcd(sound.rate, rate)
    return resample_poly(samples, rate // common, sound.rate // common).astype(np.float32)


def sound_files(folder: Path) -> list[Path]:
    """The sounds of a folder and its sub-folders, by name.

    Raises:
        UserError: there is no such folder, or no sound in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of sounds")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder}: has no sound ({', '.join(SUFFIXES)})")
    return found


def read_sound(path: Path) -> Clip:
    """A file as a mono clip (the mean of its channels) at its own rate.

    Raises:
        UserError: it cannot be read, is cut short, or is longer than what is read.
    """
    try:
        _refuse_cut_wav(path)
        with soundfile.SoundFile(path) as opened:
            if opened.frames * opened.channels > LONGEST:
                raise UserError(f"{path}: {opened.frames / opened.samplerate / 60:.0f} minutes of sound; cut it into clips")
            samples, rate, frames = opened.read(dtype="float32", always_2d=True), opened.samplerate, opened.frames
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: this sound cannot be read ({error})") from error
    if len(samples) != frames or not frames:
        raise UserError(f"{path}: this sound is cut short or empty ({len(samples)} of {frames} samples)")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: this sound has samples that are NaN or infinite")
    return Clip(np.ascontiguousarray(samples.mean(axis=1)), rate)


def _refuse_cut_wav(path: Path) -> None:
    """libsndfile takes what is there of a WAV file that was cut short; its header says how long it was."""
    with path.open("rb") as stream:
        start = stream.read(8)
    size, promised = path.stat().st_size, int.from_bytes(start[4:8], "little") + 8
    if start[:4] == b"RIFF" and size < promised < 0xFFFF_FFFF:  # which is what a stream says that cannot know its length
        raise UserError(f"{path}: this sound is cut short ({size} of {promised} bytes)")


def windows(sound: Sound, width: float, hop: float) -> tuple[list[Clip], np.ndarray]:
    """Pieces of ``width`` seconds every ``hop`` seconds, and the times (W,) of their middles in seconds.

    The sound is continued with silence by half a window at both ends, so that the middles cover it from start to end and an
    event at its very start is not seen later than one in its middle.
    """
    size, step = max(1, round(width * sound.rate)), max(1, round(hop * sound.rate))
    half = size // 2
    samples = np.pad(np.asarray(sound.samples, dtype=np.float32), (half, half + size))
    starts = range(0, len(sound.samples) + 1, step)
    return [Clip(samples[start : start + size], sound.rate) for start in starts], np.array(starts) / sound.rate


def padded(waves: Sequence[np.ndarray], length: int) -> np.ndarray:
    """(B, length) float32, zeros after the end; longer ones are cut."""
    made = np.zeros((len(waves), length), dtype=np.float32)
    for row, wave in zip(made, waves, strict=True):
        row[: min(length, len(wave))] = wave[:length]
    return made
