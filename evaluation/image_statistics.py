"""Three numbers of a picture that need no model: alarms for over-optimisation, which shows first as glare, grids and stipple.

Letters: H W C. Pictures are read as RGB in [0, 1]. None of the three is good or bad alone; what counts is how far the aligned
model's pictures move from the base model's on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G, B in the luma of ITU-R BT.601."""


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) float64 in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def saturation(picture: Image.Image) -> float:
    """Mean HSV saturation: (max - min) / max of the three channels at each pixel, 0 where the pixel is black. In [0, 1]."""
    rgb = pixels(picture)
    top, bottom = rgb.max(axis=-1), rgb.min(axis=-1)
    return float(np.divide(top - bottom, top, out=np.zeros_like(top), where=top > 0).mean())


def high_frequency(picture: Image.Image) -> float:
    """Share of the luma's variance at spatial frequencies above half the Nyquist frequency. In [0, 1].

    With F the discrete Fourier transform of the luma less its mean and (f_y, f_x) in cycles per pixel:
    sum of |F|^2 where max(|f_y|, |f_x|) > 1/4, over the sum of |F|^2. A flat picture gives 0, a chessboard of pixels 1,
    white noise about 3/4.
    """
    luma = pixels(picture) @ LUMA
    power = np.abs(np.fft.fft2(luma - luma.mean())) ** 2
    total = power.sum()
    if total <= 1e-12 * luma.size:
        return 0.0
    rows, columns = np.abs(np.fft.fftfreq(luma.shape[0])), np.abs(np.fft.fftfreq(luma.shape[1]))
    high = np.maximum(rows[:, None], columns[None, :]) > 0.25
    return float(power[high].sum() / total)


def clipping(picture: Image.Image) -> float:
    """Share of the channel values at the very ends of the range (0 or 255). In [0, 1]."""
    values = np.asarray(picture.convert("RGB"))
    return float(((values == 0) | (values == 255)).mean())


IMAGE_STATISTICS: Mapping[str, Callable[[Image.Image], float]] = {
    "saturation": saturation,
    "high_frequency": high_frequency,
    "clipping": clipping,
}


class _StatisticJudge:
    """A statistic as a judge: its value is the score, so a recipe that wants less of it gives the judge a negative weight."""

    name: str
    version = "1"

    def score(self, conditions: Sequence[Any], outputs: Sequence[Image.Image]) -> list[float]:
        if len(conditions) != len(outputs):
            raise ValueError(f"{len(outputs)} pictures for {len(conditions)} conditions")
        return [IMAGE_STATISTICS[self.name](picture) for picture in outputs]


class SaturationJudge(_StatisticJudge):
    """Mean HSV saturation, see :func:`saturation`."""

    name = "saturation"


class HighFrequencyJudge(_StatisticJudge):
    """Share of energy in fine detail, see :func:`high_frequency`."""

    name = "high_frequency"


class ClippingJudge(_StatisticJudge):
    """Share of channel values that are clipped, see :func:`clipping`."""

    name = "clipping"
