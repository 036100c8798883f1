"""Sounds for the page: players that hold their sound as a data URI, and a spectrogram of each, within the page's budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from polyalign.evaluation.report.markup import text
from polyalign.evaluation.report.pictures import Album, Picture, inside, picture

BUDGET = 6_000_000
"""Characters of base64 for all players and spectrograms; the page stays below 8 MB."""
LONGEST = 30.0
"""Seconds of a sound that are shown; the whole one lies in samples/."""
FORMATS = (("FLAC", "PCM_16", "audio/flac"), ("OGG", "VORBIS", "audio/ogg"))
"""What players hold, the first at which all fit: exact, then smaller."""
WIDTH, HEIGHT = 256, 96
RANGE = 70.0
"""Decibels below the loudest point that are drawn."""
LEVELS = 32
"""Colours of a spectrogram: a palette, since noise in full colour makes PNG larger than the sound."""
MARKS = (b"fLaC", b"RIFF", b"OggS")

COLOURS = np.array(
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)]
)  # dark to light with evenly growing lightness, so that it reads without colours too


@dataclass(frozen=True)
class Player:
    """A sound ready for the page."""

    uri: str
    spectrogram: Picture
    seconds: float
    rate: int

    def tag(self, alt: str) -> str:
        """The spectrogram and the ``audio`` element; ``alt`` is escaped here."""
        said = f"{alt}: spectrogram, {self.seconds:.1f} s from left to right, 0 to {self.rate / 2000:g} kHz from bottom to top"
        return (
            f'<div class="sound">{self.spectrogram.tag(said)}<audio controls preload="none" src="{self.uri}" '
            f'aria-label="{text(alt, 500)}"></audio></div>'
        )


@dataclass(frozen=True)
class _Read:
    samples: np.ndarray
    rate: int


def looks_like_sound(content: bytes) -> bool:
    """Whether encoded bytes begin as FLAC, WAV or OGG do."""
    return content.startswith(MARKS)


def album(folder: Path, names: Sequence[str], *, budget: int = BUDGET) -> Album[Player]:
    """Sounds of a run as players, as :func:`polyalign.evaluation.report.pictures.album` has pictures; a name that stands twice
    is counted twice. In the first format at which all fit; if none is small enough, the last names are left out."""
    found = {name: sound for name in dict.fromkeys(names) if (sound := _read(folder, name)) is not None}
    unreadable = len(set(names)) - len(found)
    drawn = {name: spectrogram(sound.samples, sound.rate) for name, sound in found.items()}
    players: dict[str, Player] = {}
    for kind in FORMATS:
        players = {name: _player(sound, drawn[name], kind) for name, sound in found.items()}
        if sum(_size(players[name]) for name in names if name in players) <= budget:
            return Album(folder, players, WIDTH, 0, unreadable)
    kept: dict[str, Player] = {}
    used = 0
    for name in names:
        if name in players and used + _size(players[name]) <= budget:
            used += _size(players[name])
            kept[name] = players[name]
    return Album(folder, kept, WIDTH, len(players) - len(kept), unreadable)


def decode(content: bytes) -> Player | None:
    """A player of encoded bytes; None if they are no sound that can be read."""
    sound = _decoded(content)
    return None if sound is None else _player(sound, spectrogram(sound.samples, sound.rate), FORMATS[0])


def spectrogram(samples: np.ndarray, rate: int) -> Picture:
    """Power at each frequency, linear in hertz from bottom to top, over time from left to right, in decibels."""
    size = 512 if rate <= 24_000 else 1024
    padded = np.pad(samples.astype(np.float64), (size // 2, size))
    starts = np.linspace(0, max(0, len(samples) - 1), WIDTH).astype(int)
    frames = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    rows = np.stack([part.max(axis=1) for part in np.array_split(power, HEIGHT, axis=1)])[::-1]
    loudest = max(float(rows.max()), 1e-12)
    shade = np.clip(1 + 10 * np.log10(np.maximum(rows, 1e-20) / loudest) / RANGE, 0, 1)
    places, levels = np.linspace(0, 1, len(COLOURS)), np.linspace(0, 1, LEVELS)
    palette = np.stack([np.interp(levels, places, channel) for channel in COLOURS.T], axis=-1).round().astype(np.uint8)
    drawn = Image.fromarray((shade * (LEVELS - 1)).round().astype(np.uint8), mode="L")
    drawn.putpalette(palette.tobytes())
    return picture(drawn, WIDTH)


def _read(folder: Path, name: str) -> _Read | None:
    """The sound of a run; None if it is absent, unreadable or outside the folder."""
    path = inside(folder, name)
    return None if path is None else _decoded(path.read_bytes())


def _decoded(content: bytes) -> _Read | None:
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as opened:
            samples, rate = opened.read(int(LONGEST * opened.samplerate), dtype="float32", always_2d=True), opened.samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError):
        return None
    if not len(samples) or not np.isfinite(samples).all():
        return None
    return _Read(np.clip(samples.mean(axis=1), -1.0, 1.0), rate)


def _player(sound: _Read, drawn: Picture, kind: tuple[str, str, str]) -> Player:
    form, subtype, mime = kind
    stream = io.BytesIO()
    soundfile.write(stream, sound.samples, sound.rate, format=form, subtype=subtype)
    uri = f"data:{mime};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Player(uri, drawn, len(sound.samples) / sound.rate, sound.rate)


def _size(player: Player) -> int:
    return len(player.uri) + len(player.spectrogram.uri)
