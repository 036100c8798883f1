"""Exports that stock diffusers opens, in another process, to the same pixels."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.references import adapter_chosen
from polyalign.modalities.image import lora
from polyalign.modalities.image.adapter import ImageAdapter

Make = Callable[..., ImageAdapter]

STOCK = """
import sys
import numpy, torch
from diffusers import DDIMScheduler, DiffusionPipeline
torch.set_num_threads(1)
*jobs, out = sys.argv[1:]
pictures = []
for job in jobs:
    base, adapter = job.split("|")
    pipeline = DiffusionPipeline.from_pretrained(base)
    if adapter:
        pipeline.load_lora_weights(adapter)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    picture = pipeline("a red circle", height=32, width=32, num_inference_steps=3, guidance_scale=4.0,
                       generator=torch.Generator().manual_seed(3)).images[0]
    pictures.append(numpy.asarray(picture))
numpy.save(out, numpy.stack(pictures))
assert "polyalign" not in sys.modules
"""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


def disturb(model: Model, *, seed: int = 0) -> None:
    """What training would do: every trainable number moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained(adapter: ImageAdapter) -> Model:
    model = adapter.trainable(adapter.load())
    disturb(model)
    return model


def test_stock_diffusers_draws_the_same_pixels(make_adapter: Make, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """LoRA of all three families, of every layer that a recipe of ours names, alpha unlike rank, and a full export; one other
    process without polyalign."""
    jobs, expected = [], []
    named = {"sd15": TARGETS, "sd2": TARGETS, "sdxl": (*TARGETS, "conv1", "conv2", "conv_shortcut", "time_emb_proj")}
    for family, train in (("sd15", "lora"), ("sd2", "lora"), ("sdxl", "lora"), ("sdxl", "full")):
        adapter = make_adapter(family, train=train, targets=named[family], alpha=6.0, guidance=4.0, sample_batch=1)
        model = trained(adapter)
        picture = adapter.sample(model, ["a red circle"], [3])[0]
        base = adapter.load()
        assert not np.array_equal(np.asarray(picture), np.asarray(adapter.sample(base, ["a red circle"], [3])[0]))
        expected.append(np.asarray(picture))
        folder = tmp_path / f"{family}-{train}"
        adapter.export(model, folder)
        jobs.append(f"{tiny_models[family]}|{folder}" if train == "lora" else f"{folder}|")
    out = tmp_path / "pixels.npy"
    subprocess.run([sys.executable, "-c", without_wheels(STOCK), *jobs, str(out)], check=True, timeout=300)
    assert np.array_equal(np.load(out), np.stack(expected))


def without_wheels(script: str) -> str:
    """Hide torchvision and torchaudio, whose CPU wheels only import where polyalign repairs them."""
    return "import sys\nsys.modules['torchvision'] = sys.modules['torchaudio'] = None\n" + script


def test_a_lora_comes_back(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sdxl", alpha=6.0)
    model = trained(adapter)
    adapter.export(model, tmp_path / "out")
    again = adapter.load_lora(adapter.load(), tmp_path / "out")
    found, expected = lora.state_dict(again.network), lora.state_dict(model.network)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    pictures = [np.asarray(adapter.sample(m, ["x"], [0])[0]) for m in (model, again)]
    assert np.array_equal(*pictures)


def test_a_low_precision_base_keeps_its_lora_exact(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sd15", dtype="bfloat16")
    model = trained(adapter)
    adapter.export(model, tmp_path)
    again = adapter.load_lora(adapter.load(), tmp_path)
    found, expected = lora.state_dict(again.network), lora.state_dict(model.network)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32 for name in expected)
    assert np.array_equal(*(np.asarray(adapter.sample(m, ["x"], [0])[0]) for m in (model, again)))


@pytest.mark.parametrize("first", ["trained", "reference"])
def test_a_reference_adapter_lies_beside_the_trained_one(
    first: str, make_adapter: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Frozen and inactive, in whichever order they come; the policy starts at the base, the reference is what was saved."""
    adapter = make_adapter("sdxl")
    saved = trained(adapter)
    adapter.export(saved, tmp_path)
    model = adapter.load()
    batch = adapter.prepare(model, rows, step=0)
    draws = adapter.draws(model, batch, step=0)
    base, expected = adapter.score(model, batch, draws).values, adapter.score(saved, batch, draws).values
    if first == "trained":
        model = adapter.load_lora(adapter.trainable(model), tmp_path, name="reference")
    else:
        model = adapter.trainable(adapter.load_lora(model, tmp_path, name="reference"))
    moving = [name for name, parameter in model.network.named_parameters() if parameter.requires_grad]
    assert moving and all(".default." in name for name in moving)
    assert torch.equal(adapter.score(model, batch, draws).values, base)
    with adapter_chosen(model.network, "reference"):
        assert torch.equal(adapter.score(model, batch, draws).values, expected)


def test_equal_loras_are_equal_files(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sd15")
    hashes = set()
    for place in range(4):
        adapter.export(trained(adapter), tmp_path / str(place))
        hashes.add(hashlib.sha256((tmp_path / str(place) / lora.FILE).read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_full_export_is_the_network(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sd2", train="full")
    model = trained(adapter)
    adapter.export(model, tmp_path / "out", {"objective": "dpo"})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    expected = model.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_the_card_says_what_it_is_made_of(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sdxl")
    model = trained(adapter)
    adapter.export(model, tmp_path, {"title": "Mine", "objective": "dpo", "beta": "5000 (mean_half)"})
    card = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "diffusers" and "lora" in header["tags"]
    assert "# Mine" in card and "| beta | 5000 (mean_half) |" in card and model.identity in card
    assert "StableDiffusionXLPipeline" in card and "load_lora_weights" in card


def test_an_earlier_export_survives_a_failed_one(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("sd15")
    adapter.export(trained(adapter), tmp_path / "out")
    before = (tmp_path / "out" / lora.FILE).read_bytes()

    class Unprintable:
        def __str__(self) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        adapter.export(adapter.trainable(adapter.load()), tmp_path / "out", {"beta": Unprintable()})
    assert (tmp_path / "out" / lora.FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_lora_is_refused(make_adapter: Make, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    adapter = make_adapter("sdxl")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    (tmp_path / "lora.bin").write_bytes(b"\x80")
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "plain.safetensors")
    other = make_adapter("sd15", rank=2)
    other.export(other.trainable(other.load()), tmp_path / "sd15")
    for file, message in (
        (tmp_path / "nowhere", "there is no LoRA file"),
        (tmp_path / "cut.safetensors", "not a readable safetensors file"),
        (tmp_path / "lora.bin", "safetensors files only"),
        (tmp_path / "plain.safetensors", "holds no LoRA"),
        (tmp_path / "sd15", "does not fit this base"),
    ):
        with pytest.raises(UserError, match=message):
            adapter.load_lora(adapter.load(), file)


def test_lora_targets_that_match_nothing_are_named(make_adapter: Make) -> None:
    adapter = make_adapter("sd15", targets=("to_nothing",))
    with pytest.raises(UserError, match=r"targets \['to_nothing'\].*Usual targets: to_q"):
        adapter.trainable(adapter.load())


def test_a_second_lora_is_refused(make_adapter: Make) -> None:
    adapter = make_adapter("sd15")
    model = adapter.trainable(adapter.load())
    with pytest.raises(UserError, match="has a LoRA already"):
        adapter.trainable(model)
