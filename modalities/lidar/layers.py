"""Layers on sparse tensors, with the parameter names of MinkowskiEngine's, so that its checkpoints open by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polyalign.modalities.lidar.sparse import SparseTensor, sparse_convolution


class SparseConv3d(nn.Module):
    """Sparse convolution without bias. ``kernel`` is (K^3, C_in, C_out), and (C_in, C_out) for K = 1, as in MinkowskiEngine.

    With ``stride`` 2 it goes to voxels of twice the stride; ``transposed`` goes back onto the finer voxels, which are those the
    geometry already has: nothing is invented where no voxel was.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, stride: int = 1, transposed: bool = False):
        super().__init__()
        if stride not in (1, 2) or (transposed and stride == 1):
            raise ValueError(f"the stride is 1 or 2, and 2 where it is transposed; found {stride}")
        self.kernel_size, self.stride, self.transposed = kernel_size, stride, transposed
        volume = kernel_size**3
        shape = (channels_in, channels_out) if volume == 1 else (volume, channels_in, channels_out)
        bound = 1 / math.sqrt((channels_out if transposed else channels_in) * volume)  # MinkowskiEngine's initialisation
        self.kernel = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.kernel.ndim == 2:
            return x.of(x.features @ self.kernel)
        if self.transposed:
            finer = x.stride // self.stride
            kernel_map = x.geometry.kernel_map(self.kernel_size, finer, x.stride).swapped()
            return SparseTensor(sparse_convolution(x.features, self.kernel, kernel_map), x.geometry, finer)
        coarser = x.stride * self.stride
        kernel_map = x.geometry.kernel_map(self.kernel_size, x.stride, coarser)
        return SparseTensor(sparse_convolution(x.features, self.kernel, kernel_map), x.geometry, coarser)

    def extra_repr(self) -> str:
        return f"{tuple(self.kernel.shape)}, stride={self.stride}, transposed={self.transposed}"


class SparseBatchNorm(nn.Module):
    """Batch normalisation over all voxels of a batch; the parameters lie under ``bn``.

    ``frozen``: the running statistics are used and left alone in training too, see :func:`freeze_statistics`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, eps=1e-5, momentum=0.1)
        self.frozen = False

    def train(self, mode: bool = True) -> SparseBatchNorm:
        super().train(mode)
        self.bn.train(mode and not self.frozen)
        return self

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.of(self.bn(x.features))


def freeze_statistics(network: nn.Module) -> None:
    """Let every batch normalisation of a network use its running statistics from now on, in training as in evaluation; scale
    and shift stay trainable. Clouds of a batch are then independent of each other, and so are a policy and its reference."""
    for module in network.modules():
        if isinstance(module, SparseBatchNorm):
            module.frozen = True
            module.train(module.training)


class SparseReLU(nn.Module):
    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.of(torch.relu(x.features))


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, stride: int = 1, transposed: bool = False):
        super().__init__()
        convolution = SparseConv3d(channels_in, channels_out, kernel_size, stride=stride, transposed=transposed)
        self.net = nn.Sequential(convolution, SparseBatchNorm(channels_out), SparseReLU())

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.net(x)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut, which is a 1x1x1 convolution where the channels differ."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.net = nn.Sequential(
            SparseConv3d(channels_in, channels_out, 3),
            SparseBatchNorm(channels_out),
            SparseReLU(),
            SparseConv3d(channels_out, channels_out, 3),
            SparseBatchNorm(channels_out),
        )
        shortcut = (SparseConv3d(channels_in, channels_out, 1), SparseBatchNorm(channels_out))
        self.downsample = nn.Sequential(*(shortcut if channels_in != channels_out else ()))

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.of(torch.relu(self.net(x).features + self.downsample(x).features))


def concatenate(first: SparseTensor, second: SparseTensor) -> SparseTensor:
    """Features of both side by side; the voxels have to be the same."""
    return first.of(torch.cat([first.features, second.features], dim=1))


def mlp(channels_in: int, hidden: int, channels_out: int, *, activation: type[nn.Module] | None = None) -> nn.Sequential:
    """Linear, LeakyReLU of slope 0.1, Linear, and ``activation`` at the end."""
    last = () if activation is None else (activation(),)
    return nn.Sequential(nn.Linear(channels_in, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, channels_out), *last)


def timestep_embedding(timesteps: Tensor, dimension: int) -> Tensor:
    """(B,) timesteps to (B, D): sine, then cosine, of t * 10000^(-i / (D/2 - 1)); an odd D gets a zero at the end."""
    half = dimension // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float().unsqueeze(1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dimension % 2))
