"""One sparse convolution, 3x3x3, 32 to 32 channels, on the voxels of a scan: ours, spconv's and Open3D's, on the same input.

A peer that does not import here is named with the reason; spconv is measured on a GPU only, where its backward pass works.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyalign.modalities.lidar.sparse import SparseTensor, VoxelGeometry, sparse_convolution
from polyalign.modalities.lidar.spconv_backend import to_spconv

CHANNELS = 32
KERNEL = 3
Timed = Callable[[Callable[[], Any]], tuple[Any, float]]


def inputs_of(voxels: SparseTensor) -> tuple[Tensor, Tensor]:
    """Features (V, C) and a kernel (K^3, C, C), random."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(voxels.coordinates), CHANNELS, generator=generator)
    kernel = torch.randn(KERNEL**3, CHANNELS, CHANNELS, generator=generator) / (CHANNELS * KERNEL**3) ** 0.5
    return features.to(voxels.features.device), kernel.to(voxels.features.device)


def ours(voxels: SparseTensor, timed: Timed) -> dict[str, Any]:
    features, kernel = inputs_of(voxels)
    features.requires_grad_()
    kernel.requires_grad_()

    def made() -> Any:
        fresh = VoxelGeometry(voxels.coordinates, voxels.geometry.batch_size)
        return fresh.kernel_map(KERNEL, 1, 1)

    kernel_map, building = timed(made)
    found, forward = timed(lambda: sparse_convolution(features, kernel, kernel_map))
    _, backward = timed(lambda: torch.autograd.grad(found.sum(), [features, kernel], retain_graph=True))
    return {"map": building, "forward": forward, "backward": backward, "result": found.detach()}


def spconv(voxels: SparseTensor, timed: Timed) -> dict[str, Any]:
    if not voxels.features.is_cuda:
        return {"missing": "measured on a GPU only"}
    try:
        package = importlib.import_module("spconv.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        return {"missing": str(error)}
    features, kernel = inputs_of(voxels)
    features.requires_grad_()
    layer = package.SubMConv3d(CHANNELS, CHANNELS, KERNEL, bias=False, indice_key="scan").cuda()
    with torch.no_grad():
        layer.weight.copy_(to_spconv(kernel))
    places = voxels.coordinates.clone()
    places[:, 1:] -= places[:, 1:].amin(dim=0)
    shape = (places[:, 1:].amax(dim=0) + 1).tolist()

    def given() -> Any:
        return package.SparseConvTensor(features, places.int(), shape, voxels.geometry.batch_size)

    _, whole = timed(lambda: layer(given()))  # its map is a part of the first call
    again = given()
    layer(again)
    again.indice_dict.update(layer(again).indice_dict)
    found, forward = timed(lambda: layer(again).features)
    _, backward = timed(lambda: torch.autograd.grad(found.sum(), [features, layer.weight], retain_graph=True))
    return {"map": max(0.0, whole - forward), "forward": forward, "backward": backward, "result": found.detach()}


def open3d(voxels: SparseTensor, timed: Timed) -> dict[str, Any]:
    try:
        package = importlib.import_module("open3d.ml.torch")
    except (ImportError, OSError, RuntimeError) as error:  # it is made for one version of torch, and needs system libraries
        return {"missing": str(error)}
    features, kernel = inputs_of(voxels)
    features.requires_grad_()
    layer = package.layers.SparseConv(CHANNELS, CHANNELS, [KERNEL] * 3, use_bias=False).to(features.device)
    with torch.no_grad():
        layer.kernel.copy_(kernel.reshape(layer.kernel.shape))
    centres = voxels.coordinates[:, 1:].float() + 0.5
    found, forward = timed(lambda: layer(features, centres, centres, 1.0))
    _, backward = timed(lambda: torch.autograd.grad(found.sum(), [features, layer.kernel], retain_graph=True))
    return {"map": 0.0, "forward": forward, "backward": backward, "result": found.detach()}  # its map is a part of each call


def compared(voxels: SparseTensor, timed: Timed) -> dict[str, dict[str, Any]]:
    """Seconds of each, and the largest difference of its result from ours, relative to the largest number."""
    found = {"ours": ours(voxels, timed), "spconv": spconv(voxels, timed), "open3d": open3d(voxels, timed)}
    reference = found["ours"]["result"]
    for one in found.values():
        result = one.pop("result", None)
        if result is not None:
            one["difference"] = float((result - reference).abs().max() / reference.abs().max())
    found["ours"]["voxels"] = len(voxels.coordinates)
    return found
