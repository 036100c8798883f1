"""What is loaded, what it is called, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.image import loading
from polyalign.modalities.image.adapter import ImageAdapter
from polyalign.modalities.image.settings import ImageModelSettings

Make = Callable[..., ImageAdapter]


def load(base: Path | str, **settings: Any) -> Any:
    return ImageAdapter(ImageModelSettings(base=str(base), sampling_steps=3, **settings)).load()


class Attack:
    """Pickles to a call: loading it with plain pickle would create ``path``."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_identity_follows_the_weights(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = load(tiny_models["sd15"])
    assert re.fullmatch(r"sd15@sha256:[0-9a-f]{16}", model.identity)
    copy = shutil.copytree(tiny_models["sd15"], tmp_path / "sd15")
    assert load(copy).identity == model.identity
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert load(copy).identity != model.identity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "sdxl"}, "family is set to 'sdxl'.*is 'sd'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is set to 'v_prediction'.*says 'epsilon'"),
        ({"resolution": 30}, "resolution is 30; this base needs a multiple of 4"),
        ({"attention": "xformers"}, "xformers"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        load(tiny_models["sd15"], **settings)


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("caption_dropout", 1.5), ("sample_batch", 0)])
def test_impossible_settings_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is {value}; allowed"):
        ImageModelSettings(**{key: value})


def test_what_is_not_there_or_no_pipeline_is_refused(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no such file or folder, and it is no hub id"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no diffusers pipeline: model_index.json"):
        load(tmp_path)
    other = shutil.copytree(tiny_models["sd15"], tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(UserError, match="describes a PixArtAlphaPipeline; this modality trains StableDiffusionPipeline"):
        load(other)


def test_an_unreadable_checkpoint_is_a_clear_error(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    broken = shutil.copytree(tiny_models["sd15"], tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="broken cannot be read"):
        load(broken)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(file)


@pytest.mark.parametrize("place", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "single.ckpt"])
def test_a_pickle_that_runs_code_is_refused(place: str, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    mark = tmp_path / "executed"
    folder = shutil.copytree(tiny_models["sd15"], tmp_path / "model")
    file = folder / place
    for weights in file.parent.glob("*.safetensors"):
        weights.unlink()
    file.write_bytes(pickle.dumps({"state_dict": Attack(mark)}, protocol=2))
    with pytest.raises(UserError, match=f"{file.name} is refused.*run code"):
        load(file if place == "single.ckpt" else folder)
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # the attack is a real one
    assert mark.exists()


def test_pickled_weights_without_code_load(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = tmp_path / "pickled"
    StableDiffusionPipeline.from_pretrained(tiny_models["sd15"], safety_checker=None).save_pretrained(
        folder, safe_serialization=False
    )
    if not list(folder.glob("unet/*.bin")):
        pytest.skip("this diffusers writes no pickles any more")
    found, expected = load(folder).network.state_dict(), load(tiny_models["sd15"]).network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def original_layout(folder: Path) -> dict[str, Tensor]:
    """The weights of a tiny SD1.5 folder (two levels, one layer each) under the names of the original single files."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    top = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    top |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipeline.unet.state_dict().items():
        match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
        middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
        if match:
            side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if kind in ("downsamplers", "upsamplers"):
                layer, rest = 1, rest.replace("conv", "op" if side == "down" else "conv")
            inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1}[kind]
            number = block * 2 + layer + (side == "down")
            prefix = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}"
        elif middle:
            kind, rest = middle[1], middle[3]
            prefix = f"middle_block.{1 if kind == 'attentions' else 2 * int(middle[2])}"
        else:
            kind, (old, new) = "top", next(pair for pair in top.items() if name.startswith(pair[0] + "."))
            prefix, rest = new, name.removeprefix(old + ".")
        if kind == "resnets":
            part, leaf = rest.rsplit(".", 1)
            rest = f"{resnet[part]}.{leaf}"
        tensors[f"model.diffusion_model.{prefix}.{rest}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{1 - int(found[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        tensors[f"first_stage_model.{name}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_single_file_is_the_same_model(kind: str, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder, file = tiny_models["sd15"], tmp_path / f"tiny.{kind}"
    if kind == "safetensors":
        save_file(original_layout(folder), file)
    else:
        torch.save({"state_dict": original_layout(folder)}, file)
    found, expected = load(file, single_file_config=str(folder)), load(folder)
    assert found.identity.startswith(f"tiny.{kind}@sha256:")
    for part in ("network", "vae", "text_encoder"):
        old, new = ((m.network if part == "network" else m.parts[part]).state_dict() for m in (expected, found))
        assert all(torch.equal(old[name], new[name]) for name in old), part


def test_a_file_that_is_no_whole_checkpoint_is_refused(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no whole Stable Diffusion.*A LoRA, a VAE or a UNet alone is not a base"):
        load(tiny_models["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a single-file checkpoint is a \.safetensors"):
        load(tmp_path / "model.gguf")


def test_a_single_file_may_be_told_its_prediction_type(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    save_file(original_layout(tiny_models["sd15"]), tmp_path / "tiny.safetensors")
    settings = {"single_file_config": str(tiny_models["sd15"]), "prediction_type": "v_prediction"}
    assert load(tmp_path / "tiny.safetensors", **settings).parts["scheduler"].config.prediction_type == "v_prediction"


def test_an_assembled_pipeline_has_the_current_network(make_adapter: Make) -> None:
    model = make_adapter("sdxl").load()
    other = make_adapter("sdxl").load().network
    assert loading.assemble(model).unet is model.network
    assert loading.assemble(model.with_network(other)).unet is other
