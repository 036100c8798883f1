"""The networks of LiDiff (Nunes et al., CVPR 2024), which ScoreLiDAR and Distillation-DPO use unchanged, on our sparse
convolution and under the original parameter names.

Letters: B clouds, V voxels of a level, W voxels of the encoded scan (stride 16), C channels.

Where the original computes the condition's weights for every voxel of every level, here they are computed once per voxel of
the encoded scan, of which there are fewer, and looked up: a weight depends on nothing but the encoded voxel and the timestep,
so the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyalign.modalities.lidar.layers import (
    ConvBlock,
    ResidualBlock,
    SparseBatchNorm,
    SparseConv3d,
    SparseReLU,
    concatenate,
    mlp,
    timestep_embedding,
)
from polyalign.modalities.lidar.sparse import SparseTensor

CHANNELS = (32, 32, 64, 128, 256, 256, 128, 96, 96)
"""Of the stem, four stages down and four up."""
STAGES = ("stage1", "stage2", "stage3", "stage4", "up1", "up2", "up3", "up4")
LAST_HIDDEN = 20


def scaled(width: float) -> tuple[int, ...]:
    """The original channels times ``width`` (its ``cr``), rounded down."""
    return tuple(int(width * channels) for channels in CHANNELS)


def _add_encoder(network: nn.Module, channels: Sequence[int], channels_in: int) -> None:
    network.add_module(
        "stem",
        nn.Sequential(
            SparseConv3d(channels_in, channels[0], 3),
            SparseBatchNorm(channels[0]),
            SparseReLU(),
            SparseConv3d(channels[0], channels[0], 3),
            SparseBatchNorm(channels[0]),
            SparseReLU(),
        ),
    )
    for stage in range(4):
        before, after = channels[stage], channels[stage + 1]
        down = ConvBlock(before, before, 2, stride=2)
        network.add_module(f"stage{stage + 1}", nn.Sequential(down, ResidualBlock(before, after), ResidualBlock(after, after)))


def _add_decoder(network: nn.Module, channels: Sequence[int]) -> None:
    for stage in range(4):
        before, after, skip = channels[4 + stage], channels[5 + stage], channels[3 - stage]
        up = ConvBlock(before, after, 2, stride=2, transposed=True)
        blocks = nn.Sequential(ResidualBlock(after + skip, after), ResidualBlock(after, after))
        network.add_module(f"up{stage + 1}", nn.ModuleList([up, blocks]))


def _up(network: nn.Module, stage: str, x: SparseTensor, skip: SparseTensor) -> SparseTensor:
    transposed, blocks = getattr(network, stage)
    return blocks(concatenate(transposed(x), skip))


class MinkGlobalEnc(nn.Module):
    """Encodes a scan: stem and four stages down, from voxels of xyz in metres to (W, C) at stride 16."""

    def __init__(self, channels: Sequence[int] = CHANNELS, channels_in: int = 3):
        super().__init__()
        _add_encoder(self, channels, channels_in)

    def forward(self, x: SparseTensor) -> SparseTensor:
        for part in ("stem", *STAGES[:4]):
            x = getattr(self, part)(x)
        return x


class MinkUNet(nn.Module):
    """The refinement network: voxels of xyz to ``channels_out`` numbers per voxel in (-1, 1), six offsets in metres of each
    point by default. The answer for a point is that of its voxel."""

    def __init__(self, channels: Sequence[int] = CHANNELS, channels_in: int = 3, channels_out: int = 18):
        super().__init__()
        _add_encoder(self, channels, channels_in)
        _add_decoder(self, channels)
        self.last = mlp(channels[8], LAST_HIDDEN, channels_out, activation=nn.Tanh)

    def forward(self, x: SparseTensor) -> Tensor:
        skips = []
        for part in ("stem", *STAGES[:4]):
            x = getattr(self, part)(x)
            skips.append(x)
        for stage, skip in zip(STAGES[4:], skips[-2::-1], strict=True):
            x = _up(self, stage, x, skip)
        return self.last(x.features)


@dataclass(frozen=True)
class Condition:
    """An encoded scan, and its projection for each stage of one network: whatever does not change from step to step."""

    encoded: SparseTensor
    latents: tuple[Tensor, ...]


class MinkUNetDiff(nn.Module):
    """The denoiser: predicts the noise (3 numbers) of every voxel of a noisy cloud, given an encoded scan and the timestep.

    Before each stage, features are multiplied by weights: with e the encoded voxel nearest to v,
    w_v = latemp([latent(F_e), temp(embedding(t))]). The features after the last stage are not weighted. In ``up1`` the original
    has the two parts the other way round, and so has this, for the sake of its checkpoints.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, channels_in: int = 3):
        super().__init__()
        self.embedding_size = channels[8]
        _add_encoder(self, channels, channels_in)
        _add_decoder(self, channels)
        middle = channels[4]
        for number, stage in enumerate(STAGES):
            out = channels[number]
            self.add_module(f"latent_{stage}", mlp(middle, middle, middle))
            self.add_module(f"{stage}_temp", mlp(self.embedding_size, self.embedding_size, middle))
            self.add_module(f"latemp_{stage}", mlp(2 * middle, middle if number < 4 else out, out))
        self.last = mlp(channels[8], LAST_HIDDEN, 3)

    def condition(self, encoded: SparseTensor) -> Condition:
        """An encoded scan made ready for this network. Once per scan is enough, for all steps."""
        return Condition(encoded, tuple(getattr(self, f"latent_{stage}")(encoded.features) for stage in STAGES))

    def begin(self, x: SparseTensor) -> SparseTensor:
        """The first layers, which know neither condition nor timestep: the branches of guidance may share them."""
        return self.stem(x)  # type: ignore[operator]  (added by name)

    def forward(self, x: SparseTensor, condition: Condition, timesteps: Tensor, *, begun: SparseTensor | None = None) -> Tensor:
        """Noise (V, 3) of the voxels.

        Args:
            x: voxels of xyz in metres, at stride 1.
            condition: see :meth:`condition`; of the same number of clouds.
            timesteps: (B,).
            begun: ``begin(x)``, where it has been computed already.
        """
        embedding = timestep_embedding(timesteps, self.embedding_size).to(x.features.dtype)
        x = self.begin(x) if begun is None else begun
        skips = [x]
        for number, stage in enumerate(STAGES):
            x = self._weighted(x, number, condition, embedding)
            if number < 4:
                x = getattr(self, stage)(x)
                skips.append(x)
            else:
                x = _up(self, stage, x, skips[7 - number])
        return self.last(x.features)

    def _weighted(self, x: SparseTensor, number: int, condition: Condition, embedding: Tensor) -> SparseTensor:
        stage, encoded, latent = STAGES[number], condition.encoded, condition.latents[number]
        time = getattr(self, f"{stage}_temp")(embedding)[encoded.coordinates[:, 0]]
        both = (time, latent) if stage == "up1" else (latent, time)
        weights = getattr(self, f"latemp_{stage}")(torch.cat(both, dim=1))
        return x.of(x.features * weights[x.geometry.nearest(x.stride, encoded.geometry, encoded.stride)])
