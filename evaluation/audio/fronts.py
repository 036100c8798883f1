"""From samples to the log-mel pictures that four published networks were trained on, in torch alone.

The feature extractors of transformers are not used: that of AST goes through torchaudio where it imports and through NumPy
where not, that of CLAP crops at random, and a score must not depend on either. Filters are transformers' ``mel_filter_bank``.

Letters: B sounds, n samples, T frames, M mel bins.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=16)
def filters(bins: int, mels: int, low: float, high: float, rate: int, kind: str) -> Tensor:
    """(bins, M) float32 triangles. ``kind``: ``slaney`` (librosa's default), ``kaldi`` (triangles in mel, no norm), ``vggish``
    (as kaldi, without the constant bin)."""
    from transformers.audio_utils import mel_filter_bank

    slaney = kind == "slaney"
    made = mel_filter_bank(
        num_frequency_bins=bins,
        num_mel_filters=mels,
        min_frequency=low,
        max_frequency=high,
        sampling_rate=rate,
        norm="slaney" if slaney else None,
        mel_scale="slaney" if slaney else "kaldi",
        triangularize_in_mel_space=not slaney,
    )
    if kind == "vggish":
        made[0] = 0.0
    return torch.from_numpy(np.asarray(made, dtype=np.float32))


def power(samples: Tensor, size: int, hop: int) -> Tensor:
    """(B, T, size / 2 + 1) squared magnitudes of (B, n): periodic Hann window, reflected by half a window at both ends."""
    window = torch.hann_window(size, device=samples.device)
    found = torch.stft(samples, size, hop, window=window, center=True, pad_mode="reflect", return_complex=True)
    return found.abs().square().transpose(1, 2)


def decibels(values: Tensor) -> Tensor:
    """10 log10 of powers, not below -100."""
    return 10.0 * torch.log10(values.clamp(min=1e-10))


def frames(samples: Tensor, size: int, hop: int) -> Tensor:
    """(B, T, size) whole frames of (B, n), nothing added at the ends."""
    return samples.unfold(-1, size, hop)


def vggish(samples: Tensor) -> Tensor:
    """(B, T, 64): log(mel of the magnitudes + 0.01) of 25 ms frames every 10 ms at 16 kHz, 125 to 7,500 Hz."""
    window = torch.hann_window(400, device=samples.device)
    magnitude = torch.fft.rfft(frames(samples, 400, 160) * window, 512).abs()
    return torch.log(magnitude @ filters(257, 64, 125.0, 7500.0, 16_000, "vggish").to(samples.device) + 0.01)


def kaldi(samples: Tensor, mels: int, rate: int = 16_000) -> Tensor:
    """(B, T, M): Kaldi's filter bank energies as AST was trained on: frames of 400 every 160 samples, less their mean,
    pre-emphasis 0.97, symmetric Hann window, log of mel of the power of 512 points, from 20 Hz."""
    pieces = frames(samples, 400, 160)
    pieces = pieces - pieces.mean(-1, keepdim=True)
    before = torch.cat([pieces[..., :1], pieces[..., :-1]], dim=-1)
    window = torch.hann_window(400, periodic=False, device=samples.device)
    spectrum = torch.fft.rfft((pieces - 0.97 * before) * window, 512).abs().square()
    mel = spectrum @ filters(257, mels, 20.0, rate // 2, rate, "kaldi").to(samples.device)
    return torch.log(mel.clamp(min=torch.finfo(torch.float32).eps))
