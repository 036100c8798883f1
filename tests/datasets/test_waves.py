"""Sounds as bytes: there and back, and what is refused."""

import io

import numpy as np
import pytest
import soundfile

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave, check, decode, encode_flac, fingerprint, header, read, resampled, silent

RATE = 16000


def tone(seconds=0.5, hertz=440.0, rate=RATE):
    return Wave((0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32), rate)


def file_of(samples, rate=RATE, form="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def test_a_stored_sound_stays_the_same_from_then_on():
    wave = tone()
    once = decode(encode_flac(wave))
    assert np.abs(once.samples - wave.samples).max() <= 0.5 / 32768 + 1e-9
    assert encode_flac(once) == encode_flac(wave)
    assert fingerprint(once) == fingerprint(wave) != fingerprint(tone(hertz=441.0))
    assert once.rate == RATE and once.samples.dtype == np.float32 and once.seconds == 0.5


def test_full_scale_does_not_wrap():
    """A sample of exactly +1 is cut to the largest that 16 bits hold; published code lets it become -1."""
    found = decode(encode_flac(Wave(np.array([1.0, 2.0, -1.0, -3.0], dtype=np.float32), RATE)))
    assert found.samples.tolist() == [32767 / 32768, 32767 / 32768, -1.0, -1.0]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_several_channels_are_heard_as_their_mean_or_as_the_first(form):
    left = tone(rate=44100).samples
    content = file_of(np.stack([left, 0 * left], axis=1), 44100, form)
    mean, first = decode(content), decode(content, mono="first")
    assert header(content).channels == 2 and mean.rate == 44100
    assert np.abs(first.samples - 2 * mean.samples).max() < 0.02
    assert len(resampled(mean, RATE).samples) == RATE // 2


def test_resampling_keeps_a_tone():
    high = tone(rate=44100)
    low = resampled(high, RATE)
    assert np.abs(low.samples[500:-500] - tone().samples[500:-500]).max() < 0.01
    assert resampled(low, RATE) is low
    with pytest.raises(UserError, match="unknown resampler 'soxr'.*scipy.resample_poly"):
        resampled(low, 8000, by="soxr")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a sound in a format"),
        (b"RIFFabcdWAVE", "not a sound in a format"),
        (encode_flac(tone())[:200], "does not decode|cut short"),
        (encode_flac(tone())[:-20], "does not decode|cut short"),
        (file_of(tone().samples)[:4000], "cut short: its header says"),
        (file_of(np.zeros(0)), "of no length"),
        (file_of(np.zeros(100)), "silent"),
        (file_of(np.array([0.1, np.nan]), subtype="FLOAT"), "NaN or infinite"),
        (file_of(np.array([0.1, 9000.0]), subtype="FLOAT"), "up to 9000"),
        (file_of(np.array([0.1, 0.2]), rate=100), "100 samples a second"),
    ],
)
def test_what_is_no_sound_is_refused_in_words(content, words):
    with pytest.raises(ValueError, match=words):
        check(content)


def test_a_file_that_is_not_there_or_none_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.flac")
    (tmp_path / "text.flac").write_text("no sound")
    with pytest.raises(UserError, match="text.flac: not a sound"):
        read(tmp_path / "text.flac")


def test_silence_is_known():
    assert silent(Wave(np.zeros(5, dtype=np.float32), RATE)) and silent(Wave(np.zeros(0, dtype=np.float32), RATE))
    assert not silent(tone())
