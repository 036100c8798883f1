"""Tango's own layout: what a download holds opens in stock classes with the same outputs, and comes back out the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tango_models
import torch
from safetensors.torch import save_file
from transformers import T5Tokenizer

from polyalign.core.errors import UserError
from polyalign.modalities.audio import tango_layout, tango_names
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.audio.mel import FrontEnd

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tango(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tango") / "tango-tiny"
    return folder, tango_models.build(folder)


def outputs(modules: Any) -> list[torch.Tensor]:
    """What the four networks answer to fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    latents, mel = torch.randn(2, 8, 16, 8, generator=generator), torch.randn(1, 1, 32, 16, generator=generator)
    ids = torch.tensor([[4, 5, 6, 1], [7, 1, 0, 0]])
    mask = ids != 0
    with torch.no_grad():
        states = modules["text_encoder"](input_ids=ids, attention_mask=mask.long())[0]
        noise = modules["unet"](
            latents, torch.tensor([5, 900]), encoder_hidden_states=states, encoder_attention_mask=mask
        ).sample
        posterior = modules["vae"].encode(mel).latent_dist
        decoded = modules["vae"].decode(latents).sample
        sound = modules["vocoder"](decoded[:, 0])
    return [states, noise, posterior.mean, posterior.std, decoded, sound]


def test_a_download_opens_in_stock_classes(tango: tuple[Path, dict[str, Any]]) -> None:
    folder, original = tango
    found = tango_layout.read(folder)
    for mine, theirs in zip(outputs(vars(found)), outputs(original), strict=True):
        assert torch.equal(mine, theirs)
    assert found.scheduler_config["prediction_type"] == "v_prediction" and found.text_name == "google/flan-t5-large"
    assert found.mel == FrontEnd(window=256, mels=16)
    modules = (found.unet, found.text_encoder, found.vae, found.vocoder)
    for module in modules:
        tensors = [*module.parameters(), *module.buffers()]
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors) and not module.training
    shared = found.text_encoder.encoder.embed_tokens.weight
    assert shared is found.text_encoder.shared.weight


def test_a_folder_comes_back_out_bit_for_bit(tango: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = tango
    adapter = tango_models.adapter_of(folder, train="full")
    model = adapter.trainable(adapter.load())
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.01)
    adapter.export(model, tmp_path / "out", {"objective": "dpo"})
    assert "Tango" in (tmp_path / "out" / "README.md").read_text()
    for name in ("pytorch_model_main.bin", "pytorch_model_vae.bin"):
        before, after = (torch.load(place / name, weights_only=True) for place in (folder, tmp_path / "out"))
        assert before.keys() == after.keys()
        for key in before:
            moved = key.startswith("unet.")
            assert after[key].shape == before[key].shape and torch.equal(after[key], before[key]) is not moved, key
    for name, expected in (
        ("vae_config", tango_models.VAE),
        ("stft_config", tango_models.STFT),
        ("main_config", tango_models.MAIN),
    ):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == expected
    again = tango_models.adapter_of(tmp_path / "out")
    first, second = (a.sample(m, ["rain"], [4])[0] for a, m in ((adapter, model), (again, again.load())))
    assert (first.samples == second.samples).all()


def test_the_front_end_tables_are_written_and_compared(tango: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The convolution with the written basis is torch's own STFT; another mel basis beside the configuration is refused."""
    folder = Path(shutil.copytree(tango[0], tmp_path / "tango"))
    tables = tango_layout.stft_tables(FrontEnd(window=256, mels=16))
    assert tables["stft_fn.forward_basis"].shape == (258, 1, 256) and tables["mel_basis"].shape == (16, 129)
    sound = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(sound.unsqueeze(1), (128, 128), mode="reflect")
    real, imaginary = torch.nn.functional.conv1d(padded, tables["stft_fn.forward_basis"], stride=160).chunk(2, dim=1)
    expected = torch.stft(sound, 256, 160, window=torch.hann_window(256), return_complex=True).abs()
    torch.testing.assert_close((real**2 + imaginary**2).sqrt(), expected, rtol=1e-4, atol=1e-4)
    torch.save(tables, folder / "pytorch_model_stft.bin")
    tango_layout.read(folder)
    torch.save({"mel_basis": tables["mel_basis"] * 2}, folder / "pytorch_model_stft.bin")
    with pytest.raises(UserError, match="mel_basis is another one"):
        tango_layout.read(folder)


def _lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def _drop_key(name: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content[key] = None
        (folder / name).write_text(json.dumps(content))

    return change


def _set_key(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))

    return change


def _tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        change(content)
        torch.save(content, folder / name)

    return apply


MAIN, VAE = "pytorch_model_main.bin", "pytorch_model_vae.bin"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_lose(VAE), "lacks pytorch_model_vae.bin"),
        (_lose("stft_config.json"), "lacks stft_config.json"),
        (_lose(MAIN), "lacks pytorch_model_main.bin"),
        (_drop_key("stft_config.json", "hop_length"), "lacks hop_length"),
        (_set_key("stft_config.json", "hop_length", "160"), r"stft_config\.json: hop_length is '160'; expected a number"),
        (_set_key("stft_config.json", "win_length", 512), "win_length 512 is not filter_length 256"),
        (_write("stft_config.json", "{"), r"stft_config\.json is no configuration in JSON"),
        (_drop_key("vae_config.json", "ddconfig"), r"vae_config\.json: a value is of another kind"),
        (_set_key("vae_config.json", "ddconfig", {"z_channels": 8}), r"vae_config\.json lacks ch_mult"),
        (_set_key("vae_config.json", "ddconfig", {**tango_models.VAE["ddconfig"], "ch": 40}), r"vae_config\.json describes no"),
        (_set_key("configs/diffusion_model_config.json", "block_out_channels", [8]), r"config\.json describes no UNet2DCon"),
        (_set_key("configs/diffusion_model_config.json", "cross_attention_dim", 8), r"unet\.\S+ has the shape .* asks for"),
        (_drop_key("main_config.json", "scheduler_name"), "lacks scheduler_name"),
        (_set_key("main_config.json", "scheduler_name", "other/model"), "only the configuration of stabilityai"),
        (_set_key("main_config.json", "unet_model_name", "other/model"), "between two projections"),
        (_set_key("main_config.json", "unet_model_config_path", "../../x.json"), "lacks 478 tensors, first unet"),
        (_set_key("vae_config.json", "subband", 4), "subband as in no AudioLDM"),
        (_set_key("stft_config.json", "n_mel_channels", 32), "frames of 16 bins .* says 32 bins"),
        (_tensors(MAIN, lambda t: t.pop("unet.conv_in.bias")), "lacks 1 tensors, first unet.conv_in.bias"),
        (_tensors(MAIN, lambda t: t.pop("text_encoder.shared.weight")), "text_encoder.shared.weight"),
        (_tensors(MAIN, lambda t: t.update({"unet.more": torch.zeros(1)})), "first unet.more"),
        (_tensors(MAIN, lambda t: t.update({"unet.conv_in.bias": torch.zeros(3)})), r"unet.conv_in.bias has the shape \(3,\)"),
        (_tensors(VAE, lambda t: t.pop("decoder.up.1.block.1.conv1.weight")), "first decoder.up.1.block.1.conv1.weight"),
        (_tensors(VAE, lambda t: t.pop("vocoder.ups.0.weight")), "first vocoder.ups"),
        (_tensors(VAE, lambda t: t.pop("vocoder.conv_pre.weight")), "vocoder.conv_pre.weight"),
        (lambda folder: (folder / MAIN).write_bytes((folder / MAIN).read_bytes()[:5000]), "is refused"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    break_it: Callable[[Path], None], message: str, tango: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tango[0], tmp_path / "tango"))
    break_it(folder)
    with pytest.raises(UserError, match=message):
        tango_layout.read(folder)


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path(sys.prefix) / "never",))


def test_a_pickle_with_code_is_refused(tango: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tango[0], tmp_path / "tango"))
    torch.save({"unet.x": Trap()}, folder / MAIN)
    with pytest.raises(UserError, match="is refused"):
        tango_layout.read(folder)
    assert not (Path(sys.prefix) / "never").exists()


def test_a_training_folder_takes_the_place_of_the_base(tango: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """accelerate's numbering, and the same file beside a base without its own."""
    tensors = torch.load(tango[0] / MAIN, weights_only=True)
    tensors["unet.conv_out.bias"] += 1.0
    (tmp_path / "best").mkdir()
    torch.save(tensors, tmp_path / "best" / "pytorch_model_2.bin")
    plain, other = (
        tango_models.adapter_of(tango[0]).load(),
        tango_models.adapter_of(tango[0], checkpoint=str(tmp_path / "best")).load(),
    )
    difference = other.network.state_dict()["conv_out.bias"] - plain.network.state_dict()["conv_out.bias"]
    torch.testing.assert_close(difference, torch.ones(8))
    assert other.identity != plain.identity
    with pytest.raises(UserError, match="checkpoint is"):
        tango_models.adapter_of(tango[0], checkpoint=str(tmp_path)).load()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model_2.safetensors")
    again = tango_models.adapter_of(tango[0], checkpoint=str(tmp_path)).load()
    assert torch.equal(again.network.state_dict()["conv_out.bias"], other.network.state_dict()["conv_out.bias"])
    content = (tmp_path / "model_2.safetensors").read_bytes()
    (tmp_path / "model_2.safetensors").write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"model_2\.safetensors is not a readable safetensors file"):
        tango_models.adapter_of(tango[0], checkpoint=str(tmp_path)).load()


def test_the_embedded_configurations_are_the_published_sizes() -> None:
    """865.93 million parameters in 686 tensors, as declare-lab's checkpoint has them; the VAE's 55.4 million."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(tango_names.UNET_CONFIG)
        inner = {**tango_models.VAE["ddconfig"], "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2}
        described = {**tango_models.VAE, "ddconfig": inner}
        vae: Any = AutoencoderKL.from_config(tango_names.vae_config(described, Path("vae_config.json")))
    assert len(unet.state_dict()) == 686
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(865.93e6, rel=1e-5)
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(55.4e6, rel=1e-2)


def test_the_tokenizer_is_asked_for(tango: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tango[0], tmp_path / "tango"))
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="Tango's files hold none"):
        tango_models.adapter_of(folder, tokenizer=str(tmp_path / "nowhere")).load()
    model = tango_models.adapter_of(folder, tokenizer=str(tmp_path / "elsewhere")).load()
    assert parts_of(model).text.encode(["a dog"], seconds=1.0).states.shape[2] == 16
    (tmp_path / "elsewhere" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="elsewhere' cannot be had"):
        tango_models.adapter_of(folder, tokenizer=str(tmp_path / "elsewhere")).load()
    larger = T5Tokenizer(vocab=[(f"<{n}>", -1.0) for n in range(40)], extra_ids=0)
    larger.save_pretrained(str(tmp_path / "larger"))
    with pytest.raises(UserError, match=r"has \d+ tokens, and the base's text encoder knows 32"):
        tango_models.adapter_of(folder, tokenizer=str(tmp_path / "larger")).load()
