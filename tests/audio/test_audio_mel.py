"""The mel front end against its formulas, and against transformers' own spectrogram."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave
from polyalign.modalities.audio.mel import FrontEnd, clips, filter_bank, log_mel, prepared

torch.set_num_threads(1)

TANGO = FrontEnd()


def noise(seconds: float, rate: int = 16000, seed: int = 0) -> Wave:
    generator = np.random.default_rng(seed)
    return Wave((0.1 * generator.standard_normal(round(seconds * rate)) + 0.05).astype(np.float32), rate)


def test_ten_seconds_are_1024_frames() -> None:
    assert TANGO.frames(10.0, 32) == TANGO.frames(10.24, 32) == 1024 and TANGO.frames(0.01, 4) == 4
    assert clips([noise(10.0)], TANGO, 1024).shape == (1, 1024, 64)


def test_log_mel_is_the_formula() -> None:
    """Frame by frame by hand: 512 mirrored samples, a periodic Hann window, magnitudes, slaney's basis, ln of at least 1e-5."""
    samples = prepared(noise(0.3), TANGO, 30)
    found = log_mel(samples.unsqueeze(0), TANGO)[0]
    padded = np.pad(samples.numpy().astype(np.float64), 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[160 * place : 160 * place + 1024] * window for place in range(30)])
    mels = np.abs(np.fft.rfft(frames)) @ filter_bank(TANGO).numpy().astype(np.float64)
    np.testing.assert_allclose(found.numpy(), np.log(np.maximum(mels, 1e-5)), atol=2e-3)
    bank = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    theirs = spectrogram(
        samples.numpy(), window, 1024, 160, power=1.0, center=True, mel_filters=bank, log_mel="log", mel_floor=1e-5
    )
    np.testing.assert_allclose(found.numpy(), theirs.T[:30], atol=2e-3)


def test_loudness_as_published() -> None:
    """Mean away, peak to one half, cut, and the peak of what is left to one half again; the mean is of the whole clip."""
    wave = noise(1.0)
    found = prepared(wave, TANGO, 50).numpy()
    centred = wave.samples - wave.samples.mean()
    half = centred / (np.abs(centred).max() + 1e-8) * 0.5
    expected = half[:8000] / np.abs(half[:8000]).max() * 0.5
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found).max() == pytest.approx(0.5)
    short = prepared(wave, TANGO, 150).numpy()
    assert len(short) == 24000 and not short[16000:].any()


def test_silence_stays_silent_and_nothing_is_refused() -> None:
    silence = Wave(np.full(4000, 0.25, dtype=np.float32), 16000)
    assert not prepared(silence, TANGO, 25).any()
    assert torch.allclose(clips([silence], TANGO, 25), torch.tensor(math.log(1e-5)))
    with pytest.raises(UserError, match="no samples"):
        prepared(Wave(np.zeros(0, dtype=np.float32), 16000), TANGO, 25)


def test_other_rates_are_resampled() -> None:
    seconds = np.arange(44100) / 44100
    tone = Wave((0.4 * np.sin(2 * math.pi * 1000 * seconds)).astype(np.float32), 44100)
    spectrum = np.abs(np.fft.rfft(prepared(tone, TANGO, 100).numpy()))
    assert len(spectrum) == 8001 and int(spectrum.argmax()) == 1000
