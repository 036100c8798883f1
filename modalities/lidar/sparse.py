"""Voxels by hashing, and sparse 3-D convolution on them, in plain torch: CPU and CUDA, any version, double precision too.

Letters: B clouds of a batch, N points of a cloud, V voxels, K^3 offsets of a kernel, P pairs of an input and an output voxel,
C channels.

A voxel's coordinates are (batch, x, y, z), in units of the finest voxel at every level: at stride s they are multiples of s,
and the voxel of the next coarser level that holds c is floor(c / 2s) * 2s. Voxels lie in the order of one int64 key, which is
linear in the coordinates, so that a neighbour's key is the key plus a constant and neighbours are found by ``searchsorted``.

Conventions of MinkowskiEngine 0.5 (src/kernel_region.hpp), so that kernels trained there serve here unchanged: a kernel is
(K^3, C_in, C_out); offsets run x fastest, then y, then z; an odd K is centred, an even K starts at 0; offsets are in units of
the input's stride; out[c] = sum_k in[c + offset_k] W_k, without a flip; a transposed convolution swaps in and out of the
forward map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from polyalign.core.errors import UserError

AXIS_BITS = 18
HALF = 1 << (AXIS_BITS - 1)
REACH = HALF - 1024
"""Largest coordinate, in voxels, either way; the rest of the 18 bits keeps an offset from running into the next axis. With
voxels of 5 cm that is 6.5 km."""
MAX_BATCH = 1 << (63 - 3 * AXIS_BITS)


def kernel_offsets(kernel_size: int, stride: int = 1) -> Tensor:
    """(K^3, 3) int64 offsets x, y, z of a cubic kernel, in MinkowskiEngine's order, for an input of tensor stride
    ``stride``."""
    start = -(kernel_size // 2) if kernel_size % 2 else 0
    steps = range(start, start + kernel_size)
    return torch.tensor([(x, y, z) for z, y, x in product(steps, steps, steps)], dtype=torch.int64) * stride


def voxel_keys(coordinates: Tensor) -> Tensor:
    """(V,) int64 keys of (V, 4) coordinates. Keys order voxels by batch, x, y, z; key(c + o) = key(c) + :func:`key_of_offset`
    (o).

    Raises:
        UserError: a coordinate beyond ``REACH`` or more than ``MAX_BATCH`` clouds.
    """
    if len(coordinates):
        _check_reach(coordinates)
    batch, x, y, z = coordinates.long().unbind(dim=1)
    key = batch
    for axis in (x, y, z):
        key = (key << AXIS_BITS) + (axis + HALF)
    return key


def _check_reach(coordinates: Tensor) -> None:
    farthest = int(coordinates[:, 1:].abs().max())
    if farthest > REACH:
        raise UserError(
            f"a point lies {farthest} voxels from the origin; at most {REACH} fit. "
            "Check the unit of the points (metres are expected) and the voxel size, or crop the cloud"
        )
    lowest, highest = (int(value) for value in torch.aminmax(coordinates[:, 0]))
    if lowest < 0 or highest >= MAX_BATCH:
        raise UserError(
            f"cloud numbers of a batch lie in 0..{MAX_BATCH - 1}, found {lowest}..{highest}; make the batch smaller"
        )


def key_of_offset(offset: Tensor) -> int:
    """What an offset (3,) of x, y, z adds to a key."""
    x, y, z = (int(value) for value in offset)
    return (((x << AXIS_BITS) + y) << AXIS_BITS) + z


@dataclass(frozen=True)
class KernelMap:
    """Which input voxel meets which output voxel at each offset: per offset (P_k,) indices into either. Within an offset every
    voxel occurs at most once, so scattering is a plain assignment and gives the same sum in every run."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    input_count: int
    output_count: int

    def pairs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Offset, input indices and output indices of every offset that has pairs."""
        for offset, (source, target) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if source.numel():
                yield offset, source, target

    def swapped(self) -> KernelMap:
        """The map of the transposed convolution; always the same object."""
        return self._swapped

    @cached_property
    def _swapped(self) -> KernelMap:
        return KernelMap(self.outputs, self.inputs, self.output_count, self.input_count)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """The same as one int32 table (2, K^3, P), input and output indices, filled up with -1 to the longest offset, and the
        number of pairs of each offset (K^3,) int32."""
        counts = [len(source) for source in self.inputs]
        sides = [pad_sequence(list(side), batch_first=True, padding_value=-1) for side in (self.inputs, self.outputs)]
        return torch.stack(sides).to(torch.int32), torch.tensor(counts, dtype=torch.int32, device=sides[0].device)


def build_kernel_map(inputs: Tensor, outputs: Tensor, offsets: Tensor, *, same: bool) -> KernelMap:
    """The map between two sorted lists of voxel keys.

    Args:
        inputs, outputs: keys (V_in,), (V_out,), ascending.
        offsets: (K^3, 3) as :func:`kernel_offsets` gives them.
        same: both are one list and the offsets are symmetric; then half of them is looked up, since the pairs of -o are those
            of o the other way round.
    """
    count = len(offsets)
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(count // 2 if same else count):
        found.append(_matches(inputs, outputs, key_of_offset(offsets[number])))
    if same:
        every = torch.arange(len(inputs), device=inputs.device)
        found = [*found, (every, every), *[(target, source) for source, target in reversed(found)]]
    return KernelMap(tuple(pair[0] for pair in found), tuple(pair[1] for pair in found), len(inputs), len(outputs))


def _matches(inputs: Tensor, outputs: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    wanted = outputs + shift
    place = torch.searchsorted(inputs, wanted).clamp_(max=len(inputs) - 1)
    target = (inputs[place] == wanted).nonzero().squeeze(1)
    return place[target], target


def _convolve(features: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    """Gather, multiply, add up. Half-precision products are added in float32."""
    wide = torch.promote_types(features.dtype, torch.float32)
    result = torch.zeros(kernel_map.output_count, kernel.shape[2], dtype=wide, device=features.device)
    for offset, source, target in kernel_map.pairs():
        if source is target:  # the middle of a kernel: every voxel with itself, nothing to gather
            result += features @ kernel[offset]
        else:
            result.index_add_(0, target, (features.index_select(0, source) @ kernel[offset]).to(wide))
    return result.to(features.dtype)


class _SparseConvolution(torch.autograd.Function):
    """Keeps only its inputs for the backward pass and gathers again there: autograd's own would keep every gathered copy, about
    as many as a voxel has neighbours."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(features, kernel)
        ctx.kernel_map = kernel_map
        return _convolve(features, kernel, kernel_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, kernel = ctx.saved_tensors
        gradient = gradients[0]
        to_features = to_kernel = None
        if ctx.needs_input_grad[0]:
            to_features = _convolve(gradient, kernel.transpose(1, 2), ctx.kernel_map.swapped())
        if ctx.needs_input_grad[1]:
            to_kernel = torch.zeros_like(kernel)
            for offset, source, target in ctx.kernel_map.pairs():
                to_kernel[offset] = features.index_select(0, source).T @ gradient.index_select(0, target)
        return to_features, to_kernel, None


FAST_PATH: ContextVar[Callable[[Tensor, Tensor, KernelMap], Tensor | None] | None] = ContextVar("FAST_PATH", default=None)
"""What convolves on CUDA instead of ours, where it is set and gives a result; see ``spconv_backend.spconv_convolutions``."""


def sparse_convolution(features: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    """Features (V_in, C_in) and a kernel (K^3, C_in, C_out) to (V_out, C_out), see the module's conventions. Differentiable
    once, in both. Under autocast both are cast as a matrix product's would be."""
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        features, kernel = features.to(dtype), kernel.to(dtype)
    fast = FAST_PATH.get()
    result = None if fast is None or not features.is_cuda else fast(features, kernel, kernel_map)
    if result is None:
        result = _SparseConvolution.apply(features, kernel, kernel_map)
    assert isinstance(result, Tensor)
    return result


class VoxelGeometry:
    """The voxels of a batch of clouds at every stride, and all that depends on them alone: kernel maps and nearest-voxel
    look-ups, each made when first asked for and then shared by every network and guidance branch that works on these
    voxels."""

    def __init__(self, coordinates: Tensor, batch_size: int):
        """``coordinates``: (V, 4) int64, unique, in the order of their keys."""
        self.batch_size = batch_size
        self._coordinates = {1: coordinates}
        self._keys = {1: voxel_keys(coordinates)}
        self._maps: dict[tuple[int, int, int], KernelMap] = {}
        self._nearest: dict[tuple[int, int, int], tuple[VoxelGeometry, Tensor]] = {}

    @classmethod
    def of(cls, coordinates: Tensor) -> tuple[VoxelGeometry, Tensor, Tensor]:
        """Geometry of any (M, 4) integer coordinates; the voxel each of them fell into (M,), and how many fell into each (V,).

        Raises:
            UserError: no coordinates, or coordinates out of reach.
        """
        if not len(coordinates):
            raise UserError("there are no voxels: the cloud is empty")
        keys, inverse, counts = torch.unique(voxel_keys(coordinates), return_inverse=True, return_counts=True)
        return cls(_coordinates_of(keys), int(coordinates[:, 0].max()) + 1), inverse, counts

    def coordinates(self, stride: int = 1) -> Tensor:
        """(V, 4) int64 voxels of that stride, a power of two."""
        if stride not in self._coordinates:
            finer = self.coordinates(stride // 2)
            coarse = torch.cat([finer[:, :1], finer[:, 1:].div(stride, rounding_mode="floor") * stride], dim=1)
            self._keys[stride] = torch.unique(voxel_keys(coarse))
            self._coordinates[stride] = _coordinates_of(self._keys[stride])
        return self._coordinates[stride]

    def keys(self, stride: int = 1) -> Tensor:
        self.coordinates(stride)
        return self._keys[stride]

    def kernel_map(self, kernel_size: int, stride_in: int, stride_out: int) -> KernelMap:
        """Map of a convolution from voxels of ``stride_in`` to those of ``stride_out``, which is the same or twice that."""
        key = (kernel_size, stride_in, stride_out)
        if key not in self._maps:
            same = stride_in == stride_out and kernel_size % 2 == 1
            offsets = kernel_offsets(kernel_size, stride_in)
            self._maps[key] = build_kernel_map(self.keys(stride_in), self.keys(stride_out), offsets, same=same)
        return self._maps[key]

    def nearest(self, stride: int, other: VoxelGeometry, other_stride: int) -> Tensor:
        """(V,) for every voxel of ``stride`` the voxel of the same cloud in ``other`` that is nearest by Euclidean distance of
        coordinates. Ties, which are frequent on a grid, go by direction: see :func:`nearest_voxels`."""
        key = (stride, id(other), other_stride)
        if key not in self._nearest:  # the other geometry is kept with the answer, so its id stays its own
            found = nearest_voxels(self.coordinates(stride), other.coordinates(other_stride), self.batch_size)
            self._nearest[key] = (other, found)
        return self._nearest[key][1]


def _coordinates_of(keys: Tensor) -> Tensor:
    mask = (1 << AXIS_BITS) - 1
    z, y, x = (((keys >> (AXIS_BITS * axis)) & mask) - HALF for axis in range(3))
    return torch.stack([keys >> (3 * AXIS_BITS), x, y, z], dim=1)


TIE_BREAK = (1.0e-5, 1.4142135e-5, 1.7320508e-5)
"""Added to the voxel that asks. Squared distances are whole numbers, so it decides nothing but ties, and those the same way on
every device; the components are not multiples of each other, so that no tie is left."""
_CHUNK = 1 << 27


def nearest_voxels(voxels: Tensor, others: Tensor, batch_size: int) -> Tensor:
    """(V,) index of the nearest of ``others`` (W, 4) to each of ``voxels`` (V, 4), within the same cloud; both sorted by cloud.

    LiDiff and its descendants shift the cloud number by twice the largest coordinate of the batch instead of looking within a
    cloud, which mixes clouds when negative coordinates are the larger ones, and leave ties to the order of the voxels.

    Raises:
        UserError: a cloud has no voxel to be near to.
    """
    starts = torch.tensor([*range(batch_size + 1)], device=voxels.device)
    ours = torch.searchsorted(voxels[:, 0].contiguous(), starts).tolist()
    theirs = torch.searchsorted(others[:, 0].contiguous(), starts).tolist()
    found = torch.empty(len(voxels), dtype=torch.int64, device=voxels.device)
    for cloud in range(batch_size):
        first, last = theirs[cloud], theirs[cloud + 1]
        if first == last:
            raise UserError(f"cloud {cloud} of the batch has no condition: its scan is empty")
        asking = voxels[ours[cloud] : ours[cloud + 1], 1:]
        answer = torch.zeros(1, dtype=torch.int64) if last == first + 1 else _nearest(asking, others[first:last, 1:])
        found[ours[cloud] : ours[cloud + 1]] = answer.to(found.device) + first
    return found


def _nearest(asking: Tensor, others: Tensor) -> Tensor:
    shift = torch.tensor(TIE_BREAK, dtype=torch.float64, device=asking.device)
    points, targets = asking.double() + shift, others.double()
    if asking.device.type == "cpu":
        return torch.from_numpy(np.asarray(KDTree(targets.numpy()).query(points.numpy())[1], dtype=np.int64))
    rows = max(1, _CHUNK // len(targets))
    mode = "use_mm_for_euclid_dist"  # exact enough in double: coordinates are small whole numbers
    return torch.cat([torch.cdist(part, targets, compute_mode=mode).argmin(dim=1) for part in points.split(rows)])


@dataclass(frozen=True)
class SparseTensor:
    """Features (V, C) of the voxels of a geometry at one stride."""

    features: Tensor
    geometry: VoxelGeometry
    stride: int = 1

    def of(self, features: Tensor) -> SparseTensor:
        """Other features of the same voxels."""
        return replace(self, features=features)

    @property
    def coordinates(self) -> Tensor:
        return self.geometry.coordinates(self.stride)


def voxelise(points: Tensor, resolution: float) -> tuple[SparseTensor, Tensor]:
    """Points (B, N, 3) to voxels whose features are the mean of their points, and the voxel (B * N,) of every point.

    The voxel is round(p / resolution), halves to even, as in LiDiff; a network's answer comes back to the points as
    ``features[inverse]``.

    Raises:
        UserError: no points, a coordinate that is not finite, or points out of reach.
    """
    if points.ndim != 3 or points.shape[2] != 3:
        raise ValueError(f"points must be (B, N, 3), found {tuple(points.shape)}")
    if not points.numel():
        raise UserError("the cloud is empty: there is nothing to make voxels of")
    finite = points.isfinite().all(dim=2)
    if not bool(finite.all()):
        raise UserError(
            f"{int((~finite).sum())} of {finite.numel()} points have coordinates that are NaN or infinite; drop them"
        )
    clouds = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
    flat = points.reshape(-1, 3)
    places = torch.round(flat.detach() / resolution).clamp(-(2.0**31), 2.0**31)
    geometry, inverse, counts = VoxelGeometry.of(torch.cat([clouds.unsqueeze(1), places.long()], dim=1))
    # Added in double, so that the order of adding, which is not fixed on CUDA, is lost in rounding.
    sums = torch.zeros(len(counts), 3, dtype=torch.float64, device=points.device).index_add(0, inverse, flat.double())
    return SparseTensor((sums / counts.unsqueeze(1)).to(points.dtype), geometry), inverse
