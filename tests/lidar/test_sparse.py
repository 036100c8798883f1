"""Voxels and sparse convolution: against dense convolutions in value and gradient, and the rules of the voxel grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, conv_transpose3d

from polyalign.core.errors import UserError
from polyalign.modalities.lidar.layers import ResidualBlock, SparseConv3d, timestep_embedding
from polyalign.modalities.lidar.sparse import (
    REACH,
    SparseTensor,
    VoxelGeometry,
    kernel_offsets,
    key_of_offset,
    nearest_voxels,
    sparse_convolution,
    voxel_keys,
    voxelise,
)

torch.set_num_threads(1)
SIDE = 8
"""The dense grid of a test spans -4..3 on each axis, so that negative coordinates occur."""


def scattered(count: int = 70, clouds: int = 2, seed: int = 0) -> VoxelGeometry:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.randint(-SIDE // 2, SIDE // 2, (count, 3), generator=generator)
    batch = torch.randint(0, clouds, (count, 1), generator=generator)
    batch[0] = clouds - 1
    return VoxelGeometry.of(torch.cat([batch, xyz], dim=1))[0]


def features_of(geometry: VoxelGeometry, channels: int, stride: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = len(geometry.coordinates(stride))
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64).requires_grad_()


def layer(*arguments: int, **options: object) -> SparseConv3d:
    torch.manual_seed(3)
    return SparseConv3d(*arguments, **options).double()


def places(geometry: VoxelGeometry, stride: int) -> tuple[Tensor, ...]:
    """Index into a dense (B, side, side, side) grid of that stride."""
    coordinates = geometry.coordinates(stride)
    return coordinates[:, 0], *((coordinates[:, 1:] // stride + SIDE // (2 * stride)).unbind(dim=1))


def dense(features: Tensor, geometry: VoxelGeometry, stride: int) -> Tensor:
    side = SIDE // stride
    grid = torch.zeros(geometry.batch_size, side, side, side, features.shape[1], dtype=features.dtype)
    return grid.index_put(places(geometry, stride), features).permute(0, 4, 1, 2, 3)


def dense_kernel(kernel: Tensor, size: int) -> Tensor:
    """(K^3, in, out), x fastest, to torch's (out, in, x, y, z)."""
    return kernel.reshape(size, size, size, *kernel.shape[1:]).permute(4, 3, 2, 1, 0)


def compare(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of a random weighting of them."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class TestAgainstDense:
    @pytest.mark.parametrize("size", [3, 5])
    def test_stride_one(self, size: int) -> None:
        geometry, convolution = scattered(), layer(3, 4, size)
        features = features_of(geometry, 3)
        found = convolution(SparseTensor(features, geometry))
        kernel = dense_kernel(convolution.kernel, size)
        expected = conv3d(dense(features, geometry, 1), kernel, padding=size // 2).permute(0, 2, 3, 4, 1)
        compare(found.features, expected[places(geometry, 1)], [features, convolution.kernel])

    @pytest.mark.parametrize(("size", "padding"), [(2, 0), (3, 1)])
    def test_stride_two(self, size: int, padding: int) -> None:
        geometry, convolution = scattered(), layer(3, 4, size, stride=2)
        features = features_of(geometry, 3)
        found = convolution(SparseTensor(features, geometry))
        assert found.stride == 2
        kernel = dense_kernel(convolution.kernel, size)
        expected = conv3d(dense(features, geometry, 1), kernel, stride=2, padding=padding).permute(0, 2, 3, 4, 1)
        compare(found.features, expected[places(geometry, 2)], [features, convolution.kernel])

    def test_transposed(self) -> None:
        geometry, convolution = scattered(), layer(3, 4, 2, stride=2, transposed=True)
        features = features_of(geometry, 3, stride=2)
        found = convolution(SparseTensor(features, geometry, 2))
        assert found.stride == 1
        kernel = dense_kernel(convolution.kernel, 2).transpose(0, 1)
        expected = conv_transpose3d(dense(features, geometry, 2), kernel, stride=2).permute(0, 2, 3, 4, 1)
        compare(found.features, expected[places(geometry, 1)], [features, convolution.kernel])

    def test_coarser_levels_use_their_own_stride(self) -> None:
        geometry, convolution = scattered(), layer(2, 2, 3)
        features = features_of(geometry, 2, stride=2)
        found = convolution(SparseTensor(features, geometry, 2))
        kernel = dense_kernel(convolution.kernel, 3)
        expected = conv3d(dense(features, geometry, 2), kernel, padding=1).permute(0, 2, 3, 4, 1)
        compare(found.features, expected[places(geometry, 2)], [features, convolution.kernel])

    def test_size_one_is_a_matrix(self) -> None:
        geometry, convolution = scattered(), layer(3, 4, 1)
        features = features_of(geometry, 3)
        assert convolution.kernel.shape == (3, 4)
        torch.testing.assert_close(convolution(SparseTensor(features, geometry)).features, features @ convolution.kernel)

    def test_numerical_gradient(self) -> None:
        geometry = scattered(12, 1)
        kernel_map = geometry.kernel_map(3, 1, 1)
        features, kernel = features_of(geometry, 2), torch.randn(27, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, w: sparse_convolution(x, w, kernel_map), (features, kernel))


class TestGeometry:
    def test_offsets_run_x_fastest(self) -> None:
        offsets = kernel_offsets(3)
        assert offsets[:4].tolist() == [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [-1, 0, -1]]
        assert offsets[13].tolist() == [0, 0, 0]
        assert kernel_offsets(2, 4)[:3].tolist() == [[0, 0, 0], [4, 0, 0], [0, 4, 0]]

    def test_keys_are_linear_and_give_the_coordinates_back(self) -> None:
        geometry = scattered()
        coordinates = geometry.coordinates()
        for offset in kernel_offsets(3, 2):
            moved = coordinates + torch.cat([torch.zeros(1, dtype=torch.int64), offset])
            assert torch.equal(voxel_keys(moved), voxel_keys(coordinates) + key_of_offset(offset))
        assert torch.equal(VoxelGeometry.of(coordinates.flip(0))[0].coordinates(), coordinates)

    def test_the_edge_of_reach(self) -> None:
        corner = torch.tensor([[0, REACH, -REACH, REACH]])
        assert VoxelGeometry.of(corner)[0].coordinates().tolist() == corner.tolist()
        with pytest.raises(UserError, match="at most"):
            voxel_keys(torch.tensor([[0, 0, REACH + 1, 0]]))
        with pytest.raises(UserError, match="batch smaller"):
            voxel_keys(torch.tensor([[512, 0, 0, 0]]))

    def test_neighbours_do_not_cross_clouds_or_axes(self) -> None:
        edge = torch.tensor([[0, REACH, 0, 0], [1, -REACH, 0, 0], [0, 0, REACH, 0], [0, 1, -REACH, 0]])
        pairs = [offset for offset, *_ in VoxelGeometry.of(edge)[0].kernel_map(3, 1, 1).pairs()]
        assert pairs == [13]

    def test_coarse_voxels_round_down(self) -> None:
        geometry = VoxelGeometry.of(torch.tensor([[0, -1, 0, 1], [0, -4, 3, 5], [0, -3, 2, 4]]))[0]
        assert geometry.coordinates(2)[:, 1:].tolist() == [[-4, 2, 4], [-2, 0, 0]]
        assert geometry.coordinates(4)[:, 1:].tolist() == [[-4, 0, 0], [-4, 0, 4]]

    def test_maps_are_made_once(self) -> None:
        geometry = scattered()
        assert geometry.kernel_map(3, 2, 2) is geometry.kernel_map(3, 2, 2)
        other = scattered(20, 2, seed=5)
        assert geometry.nearest(2, other, 4) is geometry.nearest(2, other, 4)

    def test_nearest_against_all_pairs(self) -> None:
        geometry, other = scattered(), scattered(25, 2, seed=5)
        found = geometry.nearest(1, other, 2)
        ours, theirs = geometry.coordinates(), other.coordinates(2)
        squared = (ours[:, None, 1:] - theirs[None, :, 1:]).pow(2).sum(dim=2)
        squared[ours[:, None, 0] != theirs[None, :, 0]] = 10**9
        assert torch.equal(squared.gather(1, found[:, None]).squeeze(1), squared.amin(dim=1))

    def test_ties_go_the_same_way_in_any_order(self) -> None:
        asking = torch.tensor([[0, 2, 0, 0]])
        both = torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0]])
        assert nearest_voxels(asking, both, 1).item() == 1
        assert nearest_voxels(asking, both.flip(0), 1).item() == 0

    def test_a_cloud_without_condition(self) -> None:
        with pytest.raises(UserError, match="cloud 1 of the batch has no condition"):
            nearest_voxels(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 0, 0]]), 2)


class TestVoxelise:
    def test_means_and_the_way_back(self) -> None:
        points = torch.tensor([[[0.01, 0.0, 0.0], [0.02, 0.0, 0.0], [1.0, 1.0, 1.0]], [[0.01, 0.0, 0.0]] * 3])
        voxels, inverse = voxelise(points, 0.05)
        assert voxels.coordinates.tolist() == [[0, 0, 0, 0], [0, 20, 20, 20], [1, 0, 0, 0]]
        torch.testing.assert_close(voxels.features[0], torch.tensor([0.015, 0.0, 0.0]))
        assert inverse.tolist() == [0, 0, 1, 2, 2, 2]

    def test_halves_round_to_even(self) -> None:
        voxels, _ = voxelise(torch.tensor([[[0.5, 1.5, -0.5]]]), 1.0)
        assert voxels.coordinates.tolist() == [[0, 0, 2, 0]]

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            (torch.zeros(1, 0, 3), "the cloud is empty"),
            (torch.tensor([[[0.0, float("nan"), 0.0], [0.0, 0.0, 0.0]]]), "1 of 2 points have coordinates that are NaN"),
            (torch.tensor([[[1e9, 0.0, 0.0]]]), "metres are expected"),
        ],
    )
    def test_bad_points(self, points: Tensor, message: str) -> None:
        with pytest.raises(UserError, match=message):
            voxelise(points, 0.05)


def test_autocast_multiplies_in_half_precision() -> None:
    geometry, convolution = scattered(), layer(3, 4, 3).float()
    features = features_of(geometry, 3).float().detach()
    exact = convolution(SparseTensor(features, geometry)).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = convolution(SparseTensor(features, geometry)).features
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


def test_a_residual_block_trains() -> None:
    geometry = scattered()
    torch.manual_seed(0)
    block = ResidualBlock(3, 5)
    block(SparseTensor(features_of(geometry, 3).float(), geometry)).features.pow(2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in block.parameters())
    assert isinstance(block.downsample[0], nn.Module) and len(ResidualBlock(5, 5).downsample) == 0


def test_timestep_embedding() -> None:
    found = timestep_embedding(torch.tensor([0, 1]), 6)
    assert found[0].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(found[1, :3], torch.tensor([1.0, 0.01, 0.0001]).sin())
    assert timestep_embedding(torch.tensor([3]), 7)[0, 6] == 0
