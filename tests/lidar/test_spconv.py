"""spconv's weights in our order, our kernel maps in its layout, and, where spconv and a GPU are there, the same results."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv3d

from polyalign.core.errors import UserError
from polyalign.modalities.lidar.layers import SparseConv3d
from polyalign.modalities.lidar.sparse import FAST_PATH, SparseTensor, VoxelGeometry, kernel_offsets, sparse_convolution
from polyalign.modalities.lidar.spconv_backend import from_spconv, offset_order, spconv_convolutions, to_spconv

torch.set_num_threads(1)
READY = torch.cuda.is_available() and importlib.util.find_spec("spconv") is not None


def geometry(count: int = 60) -> VoxelGeometry:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(-4, 4, (count, 3), generator=generator)
    return VoxelGeometry.of(torch.cat([torch.zeros(count, 1, dtype=torch.int64), places], dim=1))[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_weight_keeps_its_offset(size: int) -> None:
    """Offsets themselves as a kernel: the weight at [:, x, y, z] has to be the offset x, y, z."""
    start = -(size // 2) if size % 2 else 0
    kernel = kernel_offsets(size).double().unsqueeze(1)  # (K^3, 1, 3)
    weight = to_spconv(kernel)
    assert weight.shape == (3, size, size, size, 1)
    steps = torch.arange(size, dtype=torch.float64) + start
    expected = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"))
    assert torch.equal(weight.squeeze(-1), expected)
    assert torch.equal(from_spconv(weight), kernel)
    assert torch.equal(kernel[offset_order(size)].flatten(1).T, weight.flatten(1))


def test_a_weight_of_spconv_as_a_dense_one() -> None:
    """(out, x, y, z, in) is torch's dense weight but for the place of ``in``."""
    size, kernel, grid = 8, normal(27, 3, 4), geometry()
    features = normal(len(grid.coordinates()), 3, seed=1)
    places = (grid.coordinates()[:, 1:] + size // 2).unbind(dim=1)
    dense = torch.zeros(size, size, size, 3, dtype=torch.float64).index_put(places, features).permute(3, 0, 1, 2)
    expected = conv3d(dense.unsqueeze(0), to_spconv(kernel).permute(0, 4, 1, 2, 3), padding=1)[0].permute(1, 2, 3, 0)[places]
    torch.testing.assert_close(sparse_convolution(features, kernel, grid.kernel_map(3, 1, 1)), expected)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (2, 2)])
def test_the_table_says_what_the_map_says(size: int, stride: int) -> None:
    """The convolution as spconv does it, from table, counts and weight alone."""
    grid = geometry()
    for kernel_map in (grid.kernel_map(size, 1, stride), grid.kernel_map(size, 1, stride).swapped()):
        features, kernel = normal(kernel_map.input_count, 3), normal(size**3, 3, 4, seed=2)
        pairs, counts = kernel_map.table
        assert pairs.dtype == counts.dtype == torch.int32 and pairs.shape[:2] == (2, size**3)
        assert pairs.shape[2] == int(counts.max())
        order, weight = offset_order(size), to_spconv(kernel).flatten(1, 3)
        found = torch.zeros(kernel_map.output_count, 4, dtype=torch.float64)
        for place, ours in enumerate(order.tolist()):
            pair = pairs[:, ours, : int(counts[ours])].long()
            assert bool((pairs[:, ours, int(counts[ours]) :] == -1).all())
            found.index_add_(0, pair[1], features[pair[0]] @ weight[:, place].T)
        torch.testing.assert_close(found, sparse_convolution(features, kernel, kernel_map))
        assert kernel_map.table is kernel_map.table and kernel_map.swapped() is kernel_map.swapped()


def test_weights_of_another_shape() -> None:
    with pytest.raises(UserError, match="is \\(out, K, K, K, in\\), found"):
        from_spconv(torch.zeros(4, 3, 3, 1, 2))
    with pytest.raises(ValueError, match="K\\^3 offsets, found 9"):
        to_spconv(torch.zeros(9, 2, 2))


@pytest.mark.skipif(READY, reason="spconv and a GPU are there")
def test_asked_for_and_missing() -> None:
    with pytest.raises(UserError, match="spconv was asked for"), spconv_convolutions():
        raise AssertionError("not reached")
    assert FAST_PATH.get() is None


@pytest.mark.skipif(not READY, reason="needs spconv and a GPU")
@pytest.mark.parametrize(("size", "stride", "transposed"), [(3, 1, False), (2, 2, False), (2, 2, True)])
def test_the_same_results(size: int, stride: int, transposed: bool) -> None:
    torch.manual_seed(0)
    layer = SparseConv3d(16, 32, size, stride=stride, transposed=transposed).cuda()
    places = torch.randint(-40, 40, (20_000, 3))
    grid = VoxelGeometry.of(torch.cat([torch.zeros(len(places), 1, dtype=torch.int64), places], dim=1).cuda())[0]
    start = 2 if transposed else 1
    features = torch.randn(len(grid.coordinates(start)), 16, device="cuda", requires_grad=True)

    def outcome() -> list[Tensor]:
        found = layer(SparseTensor(features, grid, start)).features
        return [found, *torch.autograd.grad(found.square().sum(), [features, layer.kernel])]

    ours = outcome()
    with spconv_convolutions():
        theirs = outcome()
    assert FAST_PATH.get() is None
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-5
