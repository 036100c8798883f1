"""Three numbers of a sound that need no model: alarms for over-optimisation, which shows first as clipping, hiss and silence.

None is good or bad alone; what counts is how far the aligned model's sounds move from the base's on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from polyalign.evaluation.audio.sound import Sound

FULL = 0.999
QUIET = 1e-3
FRAME = 512


def clipping(sound: Sound) -> float:
    """Share of the samples at the very ends of the range. In [0, 1]."""
    return float((np.abs(sound.samples) >= FULL).mean())


def silence(sound: Sound) -> float:
    """Share of the frames of 512 samples whose root mean square is below -60 dB of full scale. In [0, 1]."""
    frames = _frames(sound)
    return float((np.sqrt((frames**2).mean(1)) < QUIET).mean())


def flatness(sound: Sound) -> float:
    """Geometric over arithmetic mean of the power at each frequency, the mean over frames that are not silent: 0 for tones,
    near 0.56 for white noise. 0 if all is silent."""
    frames = _frames(sound)
    loud = frames[np.sqrt((frames**2).mean(1)) >= QUIET]
    if not len(loud):
        return 0.0
    power = np.abs(np.fft.rfft(loud * np.hanning(FRAME), axis=1)[:, 1:]) ** 2 + 1e-20
    return float((np.exp(np.log(power).mean(1)) / power.mean(1)).mean())


def _frames(sound: Sound) -> np.ndarray:
    samples = np.asarray(sound.samples, dtype=np.float64)
    return np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)


SOUND_STATISTICS: Mapping[str, Callable[[Sound], float]] = {"clipping": clipping, "silence": silence, "flatness": flatness}
