"""VGGish (Hershey et al., arXiv 1609.09430) as FAD uses it: 128 numbers for every 0.96 s of sound.

Opens torchvggish's weights (``vggish-10086976.pth``: ``features.N``, ``embeddings.N``). As published for FAD the last ReLU and
the PCA are left out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import fronts

RATE, PATCH, MELS = 16_000, 96, 64
LEAST = 400 + (PATCH - 1) * 160
"""Samples of the shortest sound that has a patch; shorter ones are continued with silence."""
CONVOLUTIONS = (0, 3, 6, 8, 11, 13)
POOLED = (0, 3, 8, 13)
"""The convolutions after which height and width are halved."""


class VGGish(nn.Module):
    """(P, 96, 64) log-mel patches to (P, E), E = 128 in the published weights; widths are taken from the weights."""

    def __init__(self, widths: tuple[int, ...], hidden: int, out: int):
        super().__init__()
        layers: dict[str, nn.Module] = {}
        before = 1
        for place, width in zip(CONVOLUTIONS, widths, strict=True):
            layers[str(place)] = nn.Conv2d(before, width, 3, padding=1)
            before = width
        self.features = nn.ModuleDict(layers)
        sizes = (before * (PATCH // 16) * (MELS // 16), hidden, hidden, out)
        linear = {str(2 * place): nn.Linear(*pair) for place, pair in enumerate(zip(sizes, sizes[1:], strict=False))}
        self.embeddings = nn.ModuleDict(linear)

    def forward(self, patches: Tensor) -> Tensor:
        x = patches[:, None]
        for place in CONVOLUTIONS:
            x = torch.relu(self.features[str(place)](x))
            if place in POOLED:
                x = nn.functional.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as the original of another framework flattened them
        first, second, last = self.embeddings.values()
        return last(torch.relu(second(torch.relu(first(x)))))


def patches(samples: Tensor) -> Tensor:
    """(P, 96, 64) of (n,) at 16 kHz: whole patches one after the other, what is left over is dropped."""
    if len(samples) < LEAST:
        samples = nn.functional.pad(samples, (0, LEAST - len(samples)))
    mel = fronts.vggish(samples[None])[0]
    count = len(mel) // PATCH
    return mel[: count * PATCH].reshape(count, PATCH, MELS)


def read(path: Path) -> VGGish:
    """The network in a file of torchvggish's layout.

    Raises:
        UserError: it cannot be read, or is in another layout.
    """
    weights = files.tensors(path)
    widths = tuple(len(weights.get(f"features.{place}.weight", ())) for place in CONVOLUTIONS)
    hidden, out = (len(weights.get(f"embeddings.{place}.weight", ())) for place in (0, 4))
    network = VGGish(*((widths, hidden, out) if min(*widths, hidden, out) else ((64, 128, 256, 256, 512, 512), 4096, 128)))
    files.fill(network, weights, str(path))
    return network.eval().requires_grad_(False)
