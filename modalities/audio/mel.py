"""Mel front ends in plain torch: log-mel frames of sound, and the loudness and length that AudioLDM and Tango bring it to.

Letters: N clips, S samples, T frames, M mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave, resampled

PEAK = 0.5
"""Of a prepared clip."""


@dataclass(frozen=True)
class FrontEnd:
    """Window and hop in samples, ``mels`` slaney-scaled bins from ``low`` to ``high`` hertz, and the ``floor``
    that magnitudes are clamped to before the logarithm. The values are AudioLDM's and Tango's."""

    rate: int = 16000
    window: int = 1024
    hop: int = 160
    mels: int = 64
    low: float = 0.0
    high: float = 8000.0
    floor: float = 1e-5

    def frames(self, seconds: float, multiple: int) -> int:
        """Frames of a clip, filled up to a ``multiple``: 10 s of Tango's are 1000 frames, and 1024 with a multiple of 32."""
        return max(1, math.ceil(round(seconds * self.rate / self.hop, 6) / multiple)) * multiple


def prepared(wave: Wave, settings: FrontEnd, frames: int, resampler: str = "scipy.resample_poly") -> Tensor:
    """Samples (frames * hop,) of one clip as Tango hears it.

    Resampled, the mean taken away, divided by the largest absolute value (+ 1e-8) and halved, cut or filled with zeros at its
    end, and once more brought to a peak of one half, since the cut may have taken the peak away. The original divides silence
    by zero and then puts zeros for NaN; silence stays zero here.

    Raises:
        UserError: a clip of no length.
    """
    if not len(wave.samples):
        raise UserError("a clip has no samples; drop its row, or give a clip with sound")
    samples = torch.from_numpy(np.asarray(resampled(wave, settings.rate, resampler).samples, dtype=np.float32))
    samples = samples - samples.mean()
    samples = samples / (samples.abs().max() + 1e-8) * PEAK
    wanted = frames * settings.hop
    samples = torch.nn.functional.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
    peak = samples.abs().max()
    return samples / peak * PEAK if peak > 0 else samples


def log_mel(samples: Tensor, settings: FrontEnd) -> Tensor:
    """ln(max(|STFT| mel, floor)): samples (N, S) to frames (N, S / hop, M).

    Magnitudes and not powers, of windows centred on the multiples of the hop with the sound mirrored at both ends, under a
    periodic Hann window; the one frame beyond S / hop is left out.
    """
    window = torch.hann_window(settings.window, device=samples.device)
    spectrum = torch.stft(
        samples, settings.window, settings.hop, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    magnitude = spectrum.abs()[..., : samples.shape[1] // settings.hop].transpose(1, 2)
    return (magnitude @ filter_bank(settings).to(samples)).clamp_min(settings.floor).log()


@lru_cache(maxsize=4)
def filter_bank(settings: FrontEnd) -> Tensor:
    """The mel basis (window // 2 + 1, M), slaney's scale and area."""
    bank: Any = mel_filter_bank(
        num_frequency_bins=settings.window // 2 + 1,
        num_mel_filters=settings.mels,
        min_frequency=settings.low,
        max_frequency=settings.high,
        sampling_rate=settings.rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank).float()


def clips(waves: Sequence[Wave], settings: FrontEnd, frames: int, resampler: str = "scipy.resample_poly") -> Tensor:
    """Log-mel frames (N, frames, M) of clips."""
    return log_mel(torch.stack([prepared(wave, settings, frames, resampler) for wave in waves]), settings)
