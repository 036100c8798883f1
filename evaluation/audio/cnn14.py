"""CNN14 of PANNs (Kong et al., arXiv 1912.10211): 2,048 features and 527 AudioSet logits of a whole sound.

Opens the published files (``Cnn14_mAP=0.431.pth`` at 32 kHz, ``Cnn14_16k_mAP=0.438.pth`` at 16 kHz and the one at 8 kHz), which
hold a state dictionary under ``model``. Which of the three a file is stands in it: its window has 1,024, 512 or 256 samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import fronts

MELS = 64
LEAST_FRAMES = 64
"""Five poolings by two need 32 frames; shorter sounds are continued with silence to twice that."""
BASIS = ("spectrogram_extractor.stft.conv_real.weight", "spectrogram_extractor.stft.conv_imag.weight")
FILTERS = "logmel_extractor.melW"


@dataclass(frozen=True)
class Front:
    """One of the three published front ends: samples a second, window, hop, and the lowest and highest frequency."""

    rate: int
    window: int
    hop: int
    low: float
    high: float


FRONTS = (
    Front(32_000, 1024, 320, 50.0, 14_000.0),
    Front(16_000, 512, 160, 50.0, 8_000.0),
    Front(8_000, 256, 80, 50.0, 4_000.0),
)


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and ReLU, then the mean of ``pool`` x ``pool``."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor, pool: int) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return nn.functional.avg_pool2d(torch.relu(self.bn2(self.conv2(x))), pool)


class CNN14(nn.Module):
    """Samples (B, n) at ``front.rate`` to features (B, D) and logits (B, C); D = 2,048, C = 527 in the published weights.

    The mel filters are those of the file. Its transform is a Fourier transform written as a convolution, so the file's basis is
    checked for its size and the transform is torch's.
    """

    mel: Tensor

    def __init__(self, front: Front, widths: tuple[int, ...], features: int, classes: int):
        super().__init__()
        self.front = front
        self.bn0 = nn.BatchNorm2d(MELS)
        for number, (before, after) in enumerate(zip((1, *widths), widths, strict=False), start=1):
            setattr(self, f"conv_block{number}", Block(before, after))
        self.fc1, self.fc_audioset = nn.Linear(widths[-1], features), nn.Linear(features, classes)
        self.register_buffer("mel", fronts.filters(front.window // 2 + 1, MELS, front.low, front.high, front.rate, "slaney"))

    @property
    def least(self) -> int:
        """Samples of the shortest sound that the poolings can take."""
        return LEAST_FRAMES * self.front.hop

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        x = fronts.decibels(fronts.power(samples, self.front.window, self.front.hop) @ self.mel)[:, None]
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for number in range(1, 7):
            x = getattr(self, f"conv_block{number}")(x, 2 if number < 6 else 1)
        x = x.mean(3)
        features = torch.relu(self.fc1(x.amax(2) + x.mean(2)))
        return features, self.fc_audioset(features)


def read(path: Path) -> CNN14:
    """The network in a file of PANNs' layout.

    Raises:
        UserError: it cannot be read, or is in another layout.
    """
    weights = files.tensors(path)
    absent = [name for name in (*BASIS, FILTERS, "fc1.weight", "fc_audioset.weight") if name not in weights]
    if absent:
        raise UserError(f"{path} is not in the published layout of CNN14: it lacks {', '.join(absent[:3])}")
    bins = len(weights[FILTERS])
    front = next((one for one in FRONTS if one.window // 2 + 1 == bins), None)
    if front is None or any(weights[name].shape != (bins, 1, front.window) for name in BASIS):
        known = ", ".join(f"{one.rate} Hz with {one.window}" for one in FRONTS)
        raise UserError(f"{path}: its front end has {bins} frequencies; CNN14 is known at {known} samples a window")
    widths = tuple(len(weights.get(f"conv_block{number}.conv1.weight", (0,))) for number in range(1, 7))
    network = CNN14(front, widths, len(weights["fc1.weight"]), len(weights["fc_audioset.weight"]))
    own = {name: value for name, value in weights.items() if name not in (*BASIS, FILTERS)}
    files.fill(network, {**own, "mel": weights[FILTERS]}, str(path))
    return network.eval().requires_grad_(False)
