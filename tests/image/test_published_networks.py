"""A trained network published alone (``unet/`` and nothing else) in the place of a base's own."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from image_runs import LORA, polyalign, write_recipe
from image_runs import recipe as small_recipe

from polyalign.core.errors import UserError
from polyalign.modalities.image.adapter import ImageAdapter
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.training import model_files

Make = Callable[..., ImageAdapter]


def publish(base: Path, folder: Path, *, part: str = "unet") -> Path:
    """The base's network with other weights, saved as mhdang/dpo-sd1.5-text2image-v1 is: one sub-folder."""
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    network = getattr(pipeline, part)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder / part, safe_serialization=True)
    return folder


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_published_unet_is_placed_on_its_base(
    family: str, make_adapter: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """With the whole repository, with its inner folder, and without the keys that older files lack."""
    published = publish(tiny_models[family], tmp_path / "dpo")
    expected = UNet2DConditionModel.from_pretrained(published, subfolder="unet").state_dict()
    file = published / "unet" / "config.json"
    config = json.loads(file.read_text())
    later = ("attention_type", "dropout", "reverse_transformer_layers_per_block")
    old = {key: value for key, value in config.items() if key not in later} | {"sample_size": 64, "upcast_attention": None}
    file.write_text(json.dumps(old))
    base = make_adapter(family).load()
    identities = set()
    for place in (published, published / "unet"):
        model = make_adapter(family, network=str(place)).load()
        found = model.network.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not any(p.requires_grad for p in model.network.parameters()) and not model.network.training
        for part in ("vae", "text_encoder"):
            old_part, new_part = base.parts[part].state_dict(), model.parts[part].state_dict()
            assert all(torch.equal(old_part[name], new_part[name]) for name in old_part)
        identities.add(model.identity)
        assert model.identity.startswith(f"{base.identity}+{place.name}@sha256:")
    assert len({identity.split("@")[-1] for identity in identities}) == 1


def test_it_is_sampled_trained_and_exported(
    make_adapter: Make, rows: list[dict[str, Any]], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    published = publish(tiny_models["sd15"], tmp_path / "dpo")
    adapter = make_adapter("sd15", network=str(published), train="full", guidance=4.0, sample_batch=1, resolution=32)
    model = adapter.load()
    picture = adapter.sample(model, ["a red circle"], [3])[0]
    plain = make_adapter("sd15", guidance=4.0, sample_batch=1)
    assert picture.tobytes() != plain.sample(plain.load(), ["a red circle"], [3])[0].tobytes()
    batch = adapter.prepare(model, rows, step=0)
    model = adapter.trainable(model)
    adapter.score(model, batch, adapter.draws(model, batch, step=0)).values.sum().backward()
    adapter.export(model, tmp_path / "out")
    again = make_adapter("sd15", base=str(tmp_path / "out"), guidance=4.0, sample_batch=1, resolution=32)
    assert again.sample(again.load(), ["a red circle"], [3])[0].tobytes() == picture.tobytes()


def test_a_transformer_is_placed_as_well(make_flow: Make, flow_bases: dict[str, Path], tmp_path: Path) -> None:
    published = publish(flow_bases["sd3"], tmp_path / "tuned", part="transformer")
    found = make_flow("sd3", network=str(published)).load().network.state_dict()
    own = make_flow("sd3").load().network.state_dict()
    assert not torch.equal(found["proj_out.weight"], own["proj_out.weight"])
    with pytest.raises(UserError, match="is a SD3Transformer2DModel, and .* has a FluxTransformer2DModel"):
        make_flow("flux-dev", network=str(published)).load()


def test_what_is_no_network_for_the_base_is_refused(make_adapter: Make, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    published = publish(tiny_models["sdxl"], tmp_path / "xl")
    with pytest.raises(UserError, match="made for another kind of base: its addition_embed_type is text_time"):
        make_adapter("sd15", network=str(published)).load()
    with pytest.raises(UserError, match=r"neither unet/config\.json nor config\.json"):
        make_adapter("sd15", network=str(tmp_path)).load()
    with pytest.raises(UserError, match="there is no such folder, and it is no hub id"):
        make_adapter("sd15", network=str(tmp_path / "nowhere")).load()
    cut = shutil.copytree(published, tmp_path / "cut")
    file = cut / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="the network in .*cut/unet cannot be read"):
        make_adapter("sdxl", network=str(cut)).load()
    (cut / "unet" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is no configuration of a network"):
        make_adapter("sdxl", network=str(cut)).load()


def test_a_pickle_that_runs_code_is_refused(make_adapter: Make, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    published = publish(tiny_models["sd15"], tmp_path / "dpo")
    (published / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (published / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Attack()}, protocol=2))
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin is refused.*run code"):
        make_adapter("sd15", network=str(published)).load()
    assert not mark.exists()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_recipe_names_it(train: str, base: Path, tmp_path: Path) -> None:
    """Training goes on from it, and is done again only where its weights are others."""
    published = publish(base, tmp_path / "dpo")
    content = small_recipe(base, model={"base": str(base), "network": str(published), "train": train, "lora": {"rank": 2}})
    content["train"] |= {"reference": {"seat": "adapter_off" if train == "lora" else "frozen"}}
    config, run = write_recipe(tmp_path, content), tmp_path / "run"
    for verb in ("generate", "train", "evaluate"):
        assert polyalign(verb, config, run) == 0, verb
    out = run / LORA if train == "lora" else run / "adapter" / "unet" / "diffusion_pytorch_model.safetensors"
    before = out.stat().st_mtime_ns
    assert polyalign("train", config, run) == 0 and out.stat().st_mtime_ns == before
    if train == "full":
        start = UNet2DConditionModel.from_pretrained(published, subfolder="unet").state_dict()
        end = UNet2DConditionModel.from_pretrained(run / "adapter", subfolder="unet").state_dict()
        moved = max(float((end[name] - start[name]).abs().max()) for name in ("conv_in.weight", "conv_in.bias"))
        assert 0 < moved < 0.02, "three steps of 1e-3 away from the published one, whose noise is of 0.05"
    files = model_files(ImageRecipe(**content))
    weights = published / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert files != model_files(ImageRecipe(**content)), "what decides whether a stage is up to date"
