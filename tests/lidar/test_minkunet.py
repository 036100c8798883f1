"""The networks against a plain reading of the original, and its checkpoints: names, shapes, and every tensor of use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.modalities.lidar import checkpoints
from polyalign.modalities.lidar.layers import concatenate, timestep_embedding
from polyalign.modalities.lidar.minkunet import CHANNELS, MinkGlobalEnc, MinkUNet, MinkUNetDiff, scaled
from polyalign.modalities.lidar.sparse import SparseTensor, nearest_voxels, voxelise

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)


def normalisation(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.bn.{part}", (channels,)
    yield f"{name}.bn.num_batches_tracked", ()


def residual(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.net.0.kernel", (27, before, after)
    yield from normalisation(f"{name}.net.1", after)
    yield f"{name}.net.3.kernel", (27, after, after)
    yield from normalisation(f"{name}.net.4", after)
    if before != after:
        yield f"{name}.downsample.0.kernel", (before, after)
        yield from normalisation(f"{name}.downsample.1", after)


def linear(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (after, before)
    yield f"{name}.bias", (after,)


def encoder_names(c: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "stem.0.kernel", (27, 3, c[0])
    yield from normalisation("stem.1", c[0])
    yield "stem.3.kernel", (27, c[0], c[0])
    yield from normalisation("stem.4", c[0])
    for stage in (1, 2, 3, 4):
        yield f"stage{stage}.0.net.0.kernel", (8, c[stage - 1], c[stage - 1])
        yield from normalisation(f"stage{stage}.0.net.1", c[stage - 1])
        yield from residual(f"stage{stage}.1", c[stage - 1], c[stage])
        yield from residual(f"stage{stage}.2", c[stage], c[stage])


def unet_names(c: tuple[int, ...], outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from encoder_names(c)
    for stage, skip in ((1, c[3]), (2, c[2]), (3, c[1]), (4, c[0])):
        yield f"up{stage}.0.net.0.kernel", (8, c[3 + stage], c[4 + stage])
        yield from normalisation(f"up{stage}.0.net.1", c[4 + stage])
        yield from residual(f"up{stage}.1.0", c[4 + stage] + skip, c[4 + stage])
        yield from residual(f"up{stage}.1.1", c[4 + stage], c[4 + stage])
    yield from linear("last.0", c[8], 20)
    yield from linear("last.2", 20, outputs)


def denoiser_names(c: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from unet_names(c, 3)
    sizes = {"stage1": (c[4], c[0]), "stage2": (c[4], c[1]), "stage3": (c[4], c[2]), "stage4": (c[4], c[3])}
    sizes |= {"up1": (c[4], c[4]), "up2": (c[5], c[5]), "up3": (c[6], c[6]), "up4": (c[7], c[7])}
    for stage, (hidden, out) in sizes.items():
        yield from linear(f"latent_{stage}.0", c[4], c[4])
        yield from linear(f"latent_{stage}.2", c[4], c[4])
        yield from linear(f"{stage}_temp.0", c[8], c[8])
        yield from linear(f"{stage}_temp.2", c[8], c[4])
        yield from linear(f"latemp_{stage}.0", 2 * c[4], hidden)
        yield from linear(f"latemp_{stage}.2", hidden, out)


def drawn(prefix: str, names: Iterator[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in names:
        if name.endswith("num_batches_tracked"):
            tensors[prefix + name] = torch.tensor(17)
        elif name.endswith("running_var"):
            tensors[prefix + name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            tensors[prefix + name] = 0.3 * torch.randn(shape, generator=generator)
    return tensors


@pytest.fixture
def published() -> dict[str, Tensor]:
    """A student's checkpoint as Lightning saves it, with the other networks of its training run in it."""
    generator = torch.Generator().manual_seed(0)
    return {
        **drawn("generator.", denoiser_names(NARROW), generator),
        **drawn("partial_enc.", encoder_names(NARROW), generator),
        **drawn("teacher.", denoiser_names(NARROW), generator),
    }


def clouds(batch: int = 2, points: int = 60, spread: float = 1.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))


def lightning(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": tensors, "epoch": 9, "hyper_parameters": {"model": {"out_dim": 96}}, "callbacks": {}}, path)
    return path


class TestNetworks:
    def test_full_width_has_the_published_size(self) -> None:
        with torch.device("meta"):
            networks = [MinkUNetDiff(), MinkGlobalEnc(), MinkUNet()]
        sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
        assert round(sizes[0] / 1e6 + sizes[1] / 1e6, 2) == 32.67
        assert round(sizes[2] / 1e6, 1) == 21.7

    @pytest.mark.parametrize("channels", [CHANNELS, NARROW, scaled(0.25)])
    def test_names_and_shapes(self, channels: tuple[int, ...]) -> None:
        with torch.device("meta"):
            networks = [MinkUNetDiff(channels), MinkGlobalEnc(channels), MinkUNet(channels)]
        tables = [denoiser_names(channels), encoder_names(channels), unet_names(channels, 18)]
        for network, table in zip(networks, tables, strict=True):
            assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == dict(table)

    def test_condition_as_the_original_applies_it(self) -> None:
        """Every voxel takes the feature of its nearest encoded voxel and goes through the MLPs alone."""
        torch.manual_seed(0)
        network, encoder = MinkUNetDiff(NARROW).double().eval(), MinkGlobalEnc(NARROW).double().eval()
        voxels, _ = voxelise(clouds().double(), 0.05)
        encoded = encoder(voxelise(clouds(seed=1).double(), 0.05)[0])
        timesteps = torch.tensor([999, 3])
        found = network(voxels, network.condition(encoded), timesteps)
        torch.testing.assert_close(found, plain_forward(network, voxels, encoded, timesteps), rtol=1e-10, atol=1e-10)

    def test_clouds_of_a_batch_do_not_touch(self) -> None:
        torch.manual_seed(0)
        network, encoder = MinkUNetDiff(NARROW).double().eval(), MinkGlobalEnc(NARROW).double().eval()

        def noise(noisy: Tensor, scan: Tensor, timesteps: Tensor) -> Tensor:
            voxels, inverse = voxelise(noisy, 0.05)
            return network(voxels, network.condition(encoder(voxelise(scan, 0.05)[0])), timesteps)[inverse]

        noisy, scan, timesteps = clouds().double(), clouds(points=30, seed=1).double(), torch.tensor([10, 500])
        together = noise(noisy, scan, timesteps)
        for cloud in (0, 1):
            alone = noise(noisy[cloud : cloud + 1], scan[cloud : cloud + 1], timesteps[cloud : cloud + 1])
            torch.testing.assert_close(together[cloud * 60 : (cloud + 1) * 60], alone, rtol=1e-10, atol=1e-10)

    def test_refinement_stays_within_a_metre(self) -> None:
        torch.manual_seed(0)
        voxels, inverse = voxelise(clouds(), 0.05)
        offsets = MinkUNet(NARROW).eval()(voxels)[inverse]
        assert offsets.shape == (120, 18) and float(offsets.detach().abs().max()) < 1


def plain_forward(network: MinkUNetDiff, x: SparseTensor, encoded: SparseTensor, timesteps: Tensor) -> Tensor:
    embedding = timestep_embedding(timesteps, network.embedding_size).to(x.features.dtype)

    def part(name: str) -> nn.Module:
        return getattr(network, name)

    def weighted(x: SparseTensor, stage: str) -> SparseTensor:
        matched = encoded.features[nearest_voxels(x.coordinates, encoded.coordinates, 2)]
        p = part(f"latent_{stage}")(matched)
        t = part(f"{stage}_temp")(embedding)[x.coordinates[:, 0]]
        return x.of(x.features * part(f"latemp_{stage}")(torch.cat([t, p] if stage == "up1" else [p, t], dim=1)))

    x0 = part("stem")(x)
    x1 = part("stage1")(weighted(x0, "stage1"))
    x2 = part("stage2")(weighted(x1, "stage2"))
    x3 = part("stage3")(weighted(x2, "stage3"))
    y = part("stage4")(weighted(x3, "stage4"))
    for stage, skip in (("up1", x3), ("up2", x2), ("up3", x1), ("up4", x0)):
        transposed, blocks = getattr(network, stage)
        y = blocks(concatenate(transposed(weighted(y, stage)), skip))
    return network.last(y.features)


class TestCheckpoints:
    def test_every_tensor_is_used(self, published: dict[str, Tensor], tmp_path: Path) -> None:
        opened = checkpoints.open_completion(lightning(tmp_path / "student.ckpt", published))
        assert opened.layout == "distilled" and not opened.denoiser.training and not opened.encoder.training
        assert set(opened.unused) == {name for name in published if name.startswith("teacher.")}
        for network, prefix in ((opened.denoiser, "generator."), (opened.encoder, "partial_enc.")):
            for name, tensor in network.state_dict().items():
                assert torch.equal(tensor, published[prefix + name])
        voxels, _ = voxelise(clouds(points=200, spread=0.3), 0.05)
        encoded = opened.encoder(voxelise(clouds(points=150, spread=0.3, seed=1), 0.05)[0])
        noise = opened.denoiser(voxels, opened.denoiser.condition(encoded), torch.tensor([700, 20]))
        noise.pow(2).sum().backward()
        for network in (opened.denoiser, opened.encoder):
            idle = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.abs().sum()]
            assert not idle

    def test_layouts(self, published: dict[str, Tensor], tmp_path: Path) -> None:
        student = {name.replace("generator.", ""): value for name, value in published.items() if name.startswith("generator.")}
        encoder = {name: value for name, value in published.items() if name.startswith("partial_enc.")}
        lidiff = encoder | {f"model.{name}": value for name, value in student.items()}
        assert checkpoints.open_completion(lightning(tmp_path / "a.ckpt", lidiff)).layout == "lidiff"
        both = lidiff | {f"generator.{name}": value for name, value in student.items()}
        file = lightning(tmp_path / "b.ckpt", both)
        assert checkpoints.open_completion(file).layout == "distilled"
        assert checkpoints.open_completion(file, "lidiff").layout == "lidiff"
        aligned = {f"DiffModel.{name}": value for name, value in student.items()}
        aligned |= {name.replace("partial_enc.", "DM_encoder."): value for name, value in encoder.items()}
        save_file(aligned, tmp_path / "c.safetensors")
        assert checkpoints.open_completion(tmp_path / "c.safetensors").layout == "diffusion_dpo"

    def test_refinement(self, tmp_path: Path) -> None:
        tensors = drawn("model_refine.", unet_names(NARROW, 18), torch.Generator().manual_seed(1))
        network = checkpoints.open_refinement(lightning(tmp_path / "refine.ckpt", tensors))
        assert torch.equal(network.state_dict()["up4.1.1.net.4.bn.bias"], tensors["model_refine.up4.1.1.net.4.bn.bias"])
        checkpoints.save_refinement(tmp_path / "ours.safetensors", network)
        again = checkpoints.open_refinement(tmp_path / "ours.safetensors").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())

    def test_ours_open_again(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        denoiser, encoder = MinkUNetDiff(NARROW), MinkGlobalEnc(NARROW)
        checkpoints.save_completion(tmp_path / "ours.safetensors", denoiser, encoder)
        opened = checkpoints.open_completion(tmp_path / "ours.safetensors")
        assert opened.layout == "lidiff" and not opened.unused
        assert torch.equal(opened.denoiser.state_dict()["last.2.weight"], denoiser.state_dict()["last.2.weight"])

    def test_what_does_not_fit_is_named(self, published: dict[str, Tensor], tmp_path: Path) -> None:
        published.pop("generator.latemp_up2.0.bias")
        published["generator.latemp_up9.0.bias"] = torch.zeros(2)
        published["generator.last.2.bias"] = torch.zeros(5)
        with pytest.raises(UserError) as error:
            checkpoints.open_completion(lightning(tmp_path / "a.ckpt", published))
        assert "1 missing: generator.latemp_up2.0.bias; 1 unknown: generator.latemp_up9.0.bias" in str(error.value)
        assert "generator.last.2.bias is (5,) and should be (3,)" in str(error.value)
        published.pop("partial_enc.stage3.1.net.0.kernel")
        with pytest.raises(UserError, match=r"lacks 'partial_enc.stage3.1.net.0.kernel'"):
            checkpoints.open_completion(lightning(tmp_path / "b.ckpt", published))

    def test_other_files(self, published: dict[str, Tensor], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints.open_completion(tmp_path / "nowhere.ckpt")
        with pytest.raises(UserError, match="there is no checkpoint layout 'lidif'"):
            checkpoints.open_completion(tmp_path / "nowhere.ckpt", "lidif")
        with pytest.raises(UserError, match="its prefixes are generator, partial_enc, teacher"):
            checkpoints.open_completion(lightning(tmp_path / "a.ckpt", published), "lidiff")
        with pytest.raises(UserError, match="has no refinement network"):
            checkpoints.open_refinement(tmp_path / "a.ckpt")
        (tmp_path / "cut.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:3000])
        with pytest.raises(UserError, match="cut.ckpt"):
            checkpoints.open_completion(tmp_path / "cut.ckpt")
        torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Path("x")}, tmp_path / "code.ckpt")
        with pytest.raises(UserError, match="holds more than tensors"):
            checkpoints.open_completion(tmp_path / "code.ckpt")
        torch.save([1, 2], tmp_path / "list.ckpt")
        with pytest.raises(UserError, match="has no table of tensors"):
            checkpoints.open_completion(tmp_path / "list.ckpt")
