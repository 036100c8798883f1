"""sparse_conv.json: MinkowskiEngine's kernel offsets, and convolutions in its kernel order from dense ones (float64)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from torch import Tensor

from polyalign.modalities.lidar.layers import SparseConv3d
from polyalign.modalities.lidar.sparse import SparseTensor, VoxelGeometry, kernel_offsets


def method_of(content: Mapping[str, Any]) -> str:
    return content["params"]["kind"]


def _offsets(case: Case) -> None:
    params = case.params
    assert (kernel_offsets(params["kernel_size"], params["tensor_stride"]) * params["dilation"]).tolist() == case.outputs[
        "offsets"
    ]


def _voxels(coordinates: list[list[int]]) -> tuple[VoxelGeometry, Tensor]:
    xyz = torch.tensor(coordinates)
    geometry, inverse, _ = VoxelGeometry.of(torch.cat([torch.zeros_like(xyz[:, :1]), xyz], dim=1))
    return geometry, inverse


def _sorted_like(geometry: VoxelGeometry, stride: int, coordinates: list[list[int]]) -> Tensor:
    """Place of each golden voxel among ours."""
    ours = {tuple(row): place for place, row in enumerate(geometry.coordinates(stride)[:, 1:].tolist())}
    assert len(ours) == len(coordinates)
    return torch.tensor([ours[tuple(row)] for row in coordinates])


def _layer(case: Case, *, transposed: bool) -> SparseConv3d:
    kernel = tensor(case.inputs["kernel"])
    size, stride = case.params["kernel_size"], case.params["stride"]
    layer = SparseConv3d(kernel.shape[1], kernel.shape[2], size, stride=stride, transposed=transposed)
    layer.kernel.data = kernel
    return layer


def _convolution(case: Case) -> None:
    geometry, inverse = _voxels(case.inputs["coords"])
    feats = tensor(case.inputs["feats"])
    features = torch.zeros_like(feats).index_copy(0, inverse, feats)
    found = _layer(case, transposed=False)(SparseTensor(features, geometry))
    order = _sorted_like(geometry, found.stride, case.outputs["coords"])
    agree("features", found.features[order], case.outputs["feats"], rtol=1e-12)


def _transposed(case: Case) -> None:
    geometry, inverse = _voxels(case.inputs["fine_coords"])
    feats = tensor(case.inputs["feats"])
    features = torch.zeros_like(feats).index_copy(0, _sorted_like(geometry, 2, case.inputs["coarse_coords"]), feats)
    found = _layer(case, transposed=True)(SparseTensor(features, geometry, 2))
    assert found.stride == 1
    agree("features", found.features[inverse], case.outputs["feats"], rtol=1e-12)


METHODS: dict[str, Callable[[Case], None]] = {
    "kernel_offsets": _offsets,
    "conv": _convolution,
    "conv_transpose": _transposed,
}
NOT_IN_PLACE: dict[str, str] = {}
