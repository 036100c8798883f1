"""The events of the world `sounds`: a third of a second each, synthesised, with spectra that differ clearly.

Every event is drawn anew each time: its pitch moves by `PITCH`, its length by `LENGTH`, and its noise is other noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RATE = 16_000
PITCH = 0.015  # relative, to either side
LENGTH = 0.04  # relative, to either side
LOUDNESS = 0.12  # root mean square of the loudest tenth of a second of every event at gain 1
FADE = 0.008  # seconds at both ends, against clicks

Draws = np.random.Generator


def _tone(time: np.ndarray, hertz: float | np.ndarray) -> np.ndarray:
    """A sine of a constant or moving frequency."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz, time.shape)) / RATE)


def _noise(time: np.ndarray, low: float, high: float, draws: Draws) -> np.ndarray:
    """Noise between two frequencies, with soft edges, of unit deviation."""
    spectrum = np.fft.rfft(draws.standard_normal(len(time)))
    hertz = np.fft.rfftfreq(len(time), 1 / RATE)
    spectrum *= 1 / (1 + np.exp((low - hertz) / (0.06 * low))) / (1 + np.exp((hertz - high) / (0.06 * high)))
    noise = np.fft.irfft(spectrum, len(time))
    return noise / noise.std()


def _bell(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    partials = ((1.0, 1.0, 0.16), (1.51, 0.6, 0.12), (2.0, 0.5, 0.10), (2.74, 0.35, 0.07))
    return sum(size * _tone(time, 1150 * pitch * ratio) * np.exp(-time / fall) for ratio, size, fall in partials) + 0 * time


def _drum(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    return _tone(time, pitch * (85 + 110 * np.exp(-time / 0.03))) * np.exp(-time / 0.10)


def _clap(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    strokes = ((0, 0.01), (0.03, 0.01), (0.06, 0.05))
    hits = sum(np.where(time >= start, np.exp(-(time - start) / fall), 0) for start, fall in strokes)
    return hits * _noise(time, 1000 * pitch, 2600 * pitch, draws)


def _whistle(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    return _tone(time, pitch * 500 * 4.0 ** (time / time[-1])) * np.minimum(1, 4 * np.sin(np.pi * time / time[-1]))


def _horn(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    return sum(_tone(time, pitch * base * n) / n**0.7 for base in (247, 311) for n in range(1, 5)) + 0 * time


def _hiss(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    return _noise(time, 4800 * pitch, 7200 * pitch, draws) * np.sin(np.pi * time / time[-1])


def _croak(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    pulses = np.maximum(0, np.sin(2 * np.pi * 20 * pitch * time)) ** 2
    return pulses * sum(_tone(time, hertz * pitch) for hertz in (440, 520, 610))


def _chirp(time: np.ndarray, pitch: float, draws: Draws) -> np.ndarray:
    part = 3 * time / time[-1] % 1.0
    return _tone(time, pitch * (2900 + 1700 * part)) * np.sin(np.pi * part)


EVENTS: dict[str, tuple[Callable[[np.ndarray, float, Draws], np.ndarray], float]] = {
    "bell": (_bell, 0.36),
    "drum": (_drum, 0.30),
    "clap": (_clap, 0.24),
    "whistle": (_whistle, 0.34),
    "horn": (_horn, 0.32),
    "hiss": (_hiss, 0.34),
    "croak": (_croak, 0.30),
    "chirp": (_chirp, 0.33),
}
"""Synthesis and length in seconds of each event."""


def render_event(name: str, draws: Draws) -> np.ndarray:
    """An event at gain 1: float32 samples at `RATE`."""
    synthesis, length = EVENTS[name]
    time = np.arange(int(RATE * length * (1 + draws.uniform(-LENGTH, LENGTH)))) / RATE
    samples = synthesis(time, 1 + draws.uniform(-PITCH, PITCH), draws)
    fade = np.minimum(1, np.minimum(time, time[::-1]) / FADE)
    samples = samples * fade
    window = RATE // 10
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])
    power = (energy[window:] - energy[:-window]).max() / window
    return (samples * LOUDNESS / np.sqrt(power)).astype(np.float32)
