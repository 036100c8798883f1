"""spconv (Yan Yan, Apache-2.0; wheels ``spconv-cuNNN``) as a faster way to convolve on NVIDIA GPUs, where it is asked for.

Our kernel maps are handed to spconv's gather-multiply-scatter kernels, so voxels, their order and what is shared between
networks and guidance branches stay ours; only the arithmetic is spconv's. Its own voxel hashing is not used. On the CPU its
backward pass fails for want of a CUDA stream, so there ours is used whatever is asked for.

Letters: K^3 offsets of a kernel, P pairs of the offset that has most, C channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.lidar.sparse import FAST_PATH, KernelMap

SERVED = (torch.float32, torch.float16)
"""What spconv has kernels for; the rest is ours."""


def to_spconv(kernel: Tensor) -> Tensor:
    """A kernel (K^3, C_in, C_out), offsets x fastest, as spconv's weight (C_out, K, K, K, C_in), axes x, y, z."""
    size = _size_of(kernel)
    return kernel.reshape(size, size, size, *kernel.shape[1:]).permute(4, 2, 1, 0, 3).contiguous()


def from_spconv(weight: Tensor) -> Tensor:
    """What :func:`to_spconv` was given: opens spconv's weights in our networks."""
    if weight.ndim != 5 or len(set(weight.shape[1:4])) != 1:
        raise UserError(f"a weight of spconv is (out, K, K, K, in), found {tuple(weight.shape)}")
    return weight.permute(3, 2, 1, 4, 0).flatten(0, 2).contiguous()


def offset_order(size: int) -> Tensor:
    """(K^3,) our number of each of spconv's offsets, which run z fastest."""
    return torch.arange(size**3).reshape(size, size, size).permute(2, 1, 0).flatten()


def _size_of(kernel: Tensor) -> int:
    size = round(len(kernel) ** (1 / 3))
    if size**3 != len(kernel):
        raise ValueError(f"a kernel has K^3 offsets, found {len(kernel)}")
    return size


def _convolve(
    functional: ModuleType, algorithm: object, features: Tensor, kernel: Tensor, kernel_map: KernelMap
) -> Tensor | None:
    if features.dtype not in SERVED:
        return None
    pairs, counts = kernel_map.table
    order = offset_order(_size_of(kernel)).to(pairs.device)
    pairs, counts = pairs[:, order].contiguous(), counts[order]
    # The precision is settled; under autocast spconv would take float16 whatever is asked for.
    with torch.autocast("cuda", enabled=False):
        return functional.indice_conv(features, to_spconv(kernel), pairs, counts, kernel_map.output_count, algorithm)


@contextmanager
def spconv_convolutions() -> Iterator[None]:
    """Within this, sparse convolutions of tensors on CUDA are spconv's.

    Raises:
        UserError: spconv is not there, does not load, or there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("spconv was asked for, and there is no CUDA device here; leave it out, ours runs anywhere")
    functional, core = _modules()
    token = FAST_PATH.set(partial(_convolve, functional, core.ConvAlgo.Native))
    try:
        yield
    finally:
        FAST_PATH.reset(token)


def _modules() -> tuple[ModuleType, ModuleType]:
    """``spconv.pytorch.functional`` and ``spconv.core``."""
    try:
        return importlib.import_module("spconv.pytorch.functional"), importlib.import_module("spconv.core")
    except (ImportError, OSError, RuntimeError) as error:  # wheels for another CUDA fail in any of these ways
        raise UserError(
            f"spconv was asked for and does not load here ({error}). Install the wheel for your CUDA, for instance "
            "pip install spconv-cu126 (there are cu114, 118, 120, 121, 124 and 126), or leave it out: ours runs anywhere"
        ) from error
