"""Sounds as bytes and as samples: one way to read, one way to write, one way to resample, one way to say two are the same.

Reading and writing go through soundfile (libsndfile: FLAC, WAV, OGG, MP3), never through torchaudio. A store keeps FLAC of 16
bits, so a sound that was written and read once is the same ever after; the first time it moves by at most half of 1/32768.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from polyalign.core.errors import UserError

MAX_VALUES = 1 << 27  # samples times channels: 25 minutes of stereo at 44.1 kHz
MAX_BYTES = 1 << 28  # of one sound file
MAX_PEAK = 4.0  # floating-point files may reach beyond 1; what lies far beyond is in another unit
SILENT = 1e-4  # highest sample of a sound that counts as silent: 80 dB below full scale
RATES = (1_000, 384_000)  # of a sound that is sound
STEPS = 32768  # of a 16-bit sample, on either side of zero
_ENDINGS = {"FLAC": ".flac", "WAV": ".wav", "OGG": ".ogg", "MP3": ".mp3"}

Mono = Literal["mean", "first"]


@dataclass(frozen=True, eq=False)
class Wave:
    """A mono sound: ``samples`` (n,) float32 in [-1, 1], at ``rate`` samples a second."""

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class Header:
    """What a sound file says of itself before it is decoded."""

    rate: int
    channels: int
    frames: int
    format: str


def header(content: bytes) -> Header:
    """The header of a sound file's bytes.

    Raises:
        ValueError: no sound in a format that libsndfile reads.
    """
    try:
        found = soundfile.info(io.BytesIO(content))
    except (soundfile.LibsndfileError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a sound in a format that can be read ({len(content)} bytes; FLAC, WAV and OGG are)") from error
    return Header(found.samplerate, found.channels, found.frames, found.format)


def decode(content: bytes | Wave, *, mono: Mono = "mean") -> Wave:
    """A sound file's bytes as a mono wave at the file's own rate, values beyond [-1, 1] cut off; a wave comes back as it is.

    Args:
        mono: what becomes of several channels: their mean, or the first (Tango's way).

    Raises:
        ValueError: not a whole sound: no known format, cut short, of no length, too long, or with values that are no samples.
    """
    if isinstance(content, Wave):
        return content
    said = header(content)
    _refuse(said, content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"a sound that does not decode: {error}") from error
    if len(samples) != said.frames and said.format != "MP3":  # whose header only estimates the length
        raise ValueError(f"a sound that is cut short: its header says {said.frames} samples, {len(samples)} are there")
    if not np.isfinite(samples).all():
        raise ValueError("a sound with samples that are NaN or infinite")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise ValueError(f"a sound with samples up to {peak:g}; expected values in [-1, 1]")
    one = samples[:, 0] if mono == "first" else samples.mean(axis=1)
    return Wave(np.ascontiguousarray(np.clip(one, -1.0, 1.0), dtype=np.float32), said.rate)


def _refuse(said: Header, content: bytes) -> None:
    if not said.frames:
        raise ValueError("a sound of no length")
    if not RATES[0] <= said.rate <= RATES[1]:
        raise ValueError(f"a sound with {said.rate} samples a second; expected {RATES[0]} to {RATES[1]}")
    if said.frames * said.channels > MAX_VALUES:
        raise ValueError(
            f"a sound of {said.frames / said.rate / 60:.0f} minutes with {said.channels} channel(s); at most {MAX_VALUES:,} "
            "samples are read. Cut it into clips first"
        )
    if content[:4] == b"RIFF":  # libsndfile takes what is there of a WAV file that was cut short
        promised = int.from_bytes(content[4:8], "little") + 8
        if len(content) < promised < 0xFFFF_FFFF:
            raise ValueError(f"a sound that is cut short: its header says {promised} bytes, {len(content)} are there")


def read(source: str | Path | bytes, rate: int | None = None, mono: Mono = "mean") -> Wave:
    """A sound from a file or its bytes, at ``rate`` (None: its own).

    Raises:
        UserError: no such file, or not a whole sound.
    """
    where = "sound" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        wave = decode(content, mono=mono)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return wave if rate is None else resampled(wave, rate)


def encode_flac(wave: Wave) -> bytes:
    """FLAC of 16 bits, mono, without metadata; values beyond [-1, 1] are cut off. The same wave gives the same bytes on one
    machine.

    Raises:
        ValueError: no samples, or some that are not finite.
    """
    samples = np.asarray(wave.samples, dtype=np.float64)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"expected samples of shape (n,) with n > 0, found {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("a sound with samples that are NaN or infinite")
    whole = np.clip(np.rint(samples * STEPS), -STEPS, STEPS - 1).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, whole, wave.rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write(path: str | Path, wave: Wave) -> None:
    """Write a FLAC file (:func:`encode_flac`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_flac(wave))


def _by_scipy(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    from scipy.signal import resample_poly  # a slow import, which reading a recipe does not need

    common = gcd(old, new)
    return resample_poly(samples, new // common, old // common)


def _by_torchaudio(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    import torch

    from polyalign.core.optional import require

    functional = require("torchaudio.functional", extra="audio", purpose="Resampling by torchaudio")
    return functional.resample(torch.from_numpy(np.asarray(samples, dtype=np.float32)), old, new).numpy()


RESAMPLERS: Mapping[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "scipy.resample_poly": _by_scipy,
    "torchaudio": _by_torchaudio,
}
"""Resamplers by the names under which scores and caches record them."""


def resampled(wave: Wave, rate: int, by: str = "scipy.resample_poly") -> Wave:
    """The wave at another ``rate``, ``ceil(n rate / wave.rate)`` samples; the wave itself where the rate is its own. Metrics
    move with the resampler, so what is measured records its name.

    Raises:
        UserError: an unknown resampler, or torchaudio asked for and not importable.
    """
    if by not in RESAMPLERS:
        raise UserError(f"unknown resampler {by!r}; there are {', '.join(RESAMPLERS)}")
    if wave.rate == rate:
        return wave
    return Wave(np.clip(RESAMPLERS[by](wave.samples, wave.rate, rate), -1.0, 1.0).astype(np.float32), rate)


def fingerprint(content: bytes | Wave) -> str:
    """SHA-256 of a wave's rate and samples as they are stored (16 bits), equal exactly when the stored sounds are; or of a
    file's bytes, not decoded."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    whole = np.clip(np.rint(np.asarray(content.samples, dtype=np.float64) * STEPS), -STEPS, STEPS - 1).astype("<i2")
    return hashlib.sha256(f"{content.rate}:".encode() + whole.tobytes()).hexdigest()


def loudness(wave: Wave) -> float:
    """The root mean square of the samples, in decibels of full scale; minus infinity for silence."""
    power = float(np.mean(np.square(wave.samples, dtype=np.float64))) if len(wave.samples) else 0.0
    return 10.0 * float(np.log10(power)) if power > 0 else float("-inf")


def silent(wave: Wave) -> bool:
    """Whether there is nothing to hear: no samples, or none above ``SILENT``."""
    return not len(wave.samples) or float(np.abs(wave.samples).max()) < SILENT


def check(content: bytes | Wave) -> str:
    """The fingerprint of a sound's samples, once it is sure to be usable.

    Raises:
        ValueError: not a whole sound (:func:`decode`), a silent one, or a file of more than ``MAX_BYTES``.
    """
    if isinstance(content, bytes) and len(content) > MAX_BYTES:
        raise ValueError(f"a sound file of {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    wave = decode(content)
    if silent(wave):
        raise ValueError(f"a silent sound ({wave.seconds:.2f} s, no sample above {SILENT:g})")
    return fingerprint(wave)


def ending_of(content: bytes) -> str | None:
    """The ending of a sound file's bytes that every program reads as they are; None for other formats."""
    return _ENDINGS.get(header(content).format)
