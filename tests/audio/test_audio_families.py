"""What every family of audio models has to do: half precision, LoRAs that come back, an identity of all that is read, and
refusals that name the file and the key."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_models
import numpy as np
import pytest
import tango_models
import torch
from audio_runs import save_base
from safetensors.torch import load_file, save_file
from tango_models import adapter_of, pairs

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.references import adapters_off
from polyalign.modalities.audio import loading
from polyalign.modalities.audio.adapter import AudioAdapter
from polyalign.modalities.audio.export import export_merged
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.audio.settings import DTYPES

torch.set_num_threads(1)

SECONDS = {"tango": tango_models.SECONDS, "tiny": 2.048, **diffusers_models.LENGTH}
DIFFUSERS = diffusers_models.FAMILIES


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    tango_models.build(root / "tango")
    save_base(root / "tiny")
    for family in DIFFUSERS:
        diffusers_models.build(root / family, family)
    return {family: root / family for family in SECONDS}


def opened(family: str, folder: Path, **settings: Any) -> AudioAdapter:
    return adapter_of(folder, **{"seconds": SECONDS[family], "sampling_steps": 2, "posterior": "mode", **settings})


def values(adapter: AudioAdapter, model: Model) -> torch.Tensor:
    batch = adapter.prepare(model, pairs(), step=0)
    return adapter.score(model, batch, adapter.draws(model, batch, step=0)).values


def trained(adapter: AudioAdapter) -> Model:
    """What training would do: every trainable number moves."""
    model, generator = adapter.trainable(adapter.load()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def rounded_time(model: Model, weights: torch.dtype, dtype: torch.dtype) -> Model:
    """A float32 Stable Audio that counts time as one with other ``weights``, or in mixed precision of ``dtype``, does: its
    transformer, as in the stock pipeline, computes the angle 2 pi t w there, and everything else of it is far more exact."""
    time: Any = model.network.get_submodule("time_proj")
    other = copy.deepcopy(time).to(weights)

    def hook(module: Any, given: Any, found: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return other(given[0].to(weights)).float()

    time.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("family", SECONDS)
def test_clips_come_to_the_rate_by_the_resampler_that_is_asked_for(family: str, bases: dict[str, Path]) -> None:
    """Told by the refusal of one that there is not: none is taken in its place."""
    adapter = opened(family, bases[family], resampler="nearest")
    odd = {**pairs()[0], "chosen": tango_models.wave(3, rate=22_050)}
    with pytest.raises(UserError, match="unknown resampler 'nearest'"):
        adapter.prepare(adapter.load(), [odd], step=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", SECONDS)
def test_margins_are_zero_in_half_precision_too(family: str, dtype: str, bases: dict[str, Path]) -> None:
    """Latents and states are kept in float32 whatever the weights are, and the errors are float32, to within two spacings of
    the type as a float32 model has them."""
    plain, half = opened(family, bases[family]), DTYPES[dtype]
    exact = rounded_time(plain.load(), half, half) if family == "stable_audio" else plain.load()
    expected = values(plain, exact)
    adapter = opened(family, bases[family], dtype=dtype)
    model = adapter.trainable(adapter.load())
    frozen = {parameter.dtype for parameter in model.network.parameters() if not parameter.requires_grad}
    assert frozen == {half}
    policy = values(adapter, model)
    with torch.no_grad(), adapters_off(model.network):
        reference = values(adapter, model)
    ratio = policy - reference
    assert torch.equal(ratio[:, 0] - ratio[:, 1], torch.zeros(3, 1))
    assert policy.dtype == torch.float32 and not torch.equal(policy, expected)
    torch.testing.assert_close(policy, expected, rtol=2 * torch.finfo(half).eps, atol=0.0)
    policy.sum().backward()
    gradients = [parameter.grad for parameter in model.network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    (clip,) = adapter.sample(model, ["rain"], [0])
    assert np.isfinite(clip.samples).all() and len(clip.samples) == round(SECONDS[family] * clip.rate)


@pytest.mark.parametrize("family", SECONDS)
def test_full_training_in_mixed_precision_keeps_float32_masters(family: str, bases: dict[str, Path]) -> None:
    adapter = opened(family, bases[family], dtype="bfloat16", train="full")
    model = adapter.trainable(adapter.load())
    found = values(adapter, model)
    found.sum().backward()
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32} == {found.dtype}
    plain = opened(family, bases[family])
    exact = rounded_time(plain.load(), torch.float32, torch.bfloat16) if family == "stable_audio" else plain.load()
    expected = values(plain, exact)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found.detach(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.0)


@pytest.mark.parametrize("family", SECONDS)
def test_a_lora_comes_back_and_goes_into_the_weights(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = opened(family, bases[family])
    model = trained(adapter)
    expected, plain = values(adapter, model), values(adapter, adapter.load())
    adapter.export(model, tmp_path / "lora")
    assert torch.equal(values(adapter, adapter.load_lora(adapter.load(), tmp_path / "lora")), expected)
    assert (expected - plain).abs().max() > 1e-3
    export_merged(model, tmp_path / "whole")
    whole = opened(family, tmp_path / "whole")
    again = whole.load()
    assert parts_of(again).family == family
    torch.testing.assert_close(values(whole, again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SECONDS)
def test_a_whole_model_comes_back_bit_for_bit(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = opened(family, bases[family], train="full")
    model = trained(adapter)
    adapter.export(model, tmp_path / "whole")
    again = opened(family, tmp_path / "whole")
    assert torch.equal(values(again, again.load()), values(adapter, model).detach())
    clips = [one.sample(m, ["rain"], [1])[0].samples for one, m in ((adapter, model), (again, again.load()))]
    assert np.array_equal(*clips)


@pytest.mark.parametrize("family", SECONDS)
def test_the_identity_is_of_every_file_that_is_read(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Also of a tokenizer's merges.txt and vocab.txt: other tokens are another model, and cached states are not its."""
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    inner = next(file.parent for file in sorted(folder.glob("*/tokenizer_config.json")))
    (inner / "merges.txt").write_text("#version: 0.2\n")
    (inner / "vocab.txt").write_text("a\n")
    settings = opened(family, folder).settings
    before = opened(family, folder).load().identity
    assert before.startswith("base@sha256:") and loading._identity(folder, settings, None) == before
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes(content + b"\n")
            assert loading._identity(folder, settings, None) != before, file.name
            file.write_bytes(content)
    (folder / "notes.md").write_text("read by nobody")
    assert opened(family, folder).load().identity == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


def lose(file: Path) -> None:
    file.unlink()


def garble(file: Path) -> None:
    file.write_text("{")


def without(key: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensors = load_file(file)
        del tensors[key]
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def with_more(file: Path) -> None:
    save_file({**load_file(file), "more": torch.zeros(1)}, file, metadata={"format": "pt"})


def says(**keys: Any) -> Callable[[Path], Any]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def says_no(key: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))

    return change


WEIGHTS, MODEL, CONFIG = "diffusion_pytorch_model.safetensors", "model.safetensors", "config.json"


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        ("audioldm2", f"unet/{CONFIG}", lose, r"unet lacks config\.json"),
        ("audioldm2", f"unet/{WEIGHTS}", lose, "unet lacks weights"),
        ("audioldm2", f"unet/{WEIGHTS}", cut, rf"unet/{WEIGHTS} is not a readable safetensors file"),
        ("audioldm2", f"unet/{WEIGHTS}", without("conv_in.bias"), r"unet lacks 1 tensors of a Audio.*, first conv_in\.bias"),
        ("audioldm2", f"unet/{WEIGHTS}", with_more, "unet has 1 tensors that no .*, first more"),
        (
            "audioldm2",
            f"unet/{CONFIG}",
            says(block_out_channels=[16, 16]),
            r"unet: conv_in\.bias has .*\(8,\).* \(16,\)",
        ),
        ("audioldm2", f"unet/{CONFIG}", says(block_out_channels=[8]), "unet cannot be read .*block_out_channels"),
        ("audioldm2", f"unet/{CONFIG}", garble, r"unet cannot be read .*config\.json"),
        ("audioldm2", f"text_encoder_2/{CONFIG}", lose, r"text_encoder_2 lacks config\.json"),
        ("audioldm2", f"text_encoder_2/{CONFIG}", says(num_layers="x"), "text_encoder_2 cannot be read .*num_layers"),
        (
            "audioldm2",
            f"text_encoder_2/{CONFIG}",
            says(num_layers=2),
            r"text_encoder_2 lacks 8 .* encoder\.block\.1",
        ),
        ("audioldm2", f"text_encoder_2/{MODEL}", cut, rf"text_encoder_2/{MODEL} is not a readable"),
        (
            "audioldm2",
            f"language_model/{MODEL}",
            without("transformer.h.0.ln_1.bias"),
            r"language_model .*h\.0\.ln_1\.bias",
        ),
        ("audioldm2", f"vocoder/{MODEL}", without("conv_pre.bias"), r"vocoder lacks 1 tensors .*conv_pre\.bias"),
        ("audioldm2", f"vocoder/{CONFIG}", says(sampling_rate=24000), "its vocoder makes 24000 Hz"),
        ("audioldm2", "tokenizer/tokenizer.json", garble, "tokenizer cannot be read as a tokenizer"),
        ("audioldm2", "scheduler/scheduler_config.json", lose, "lacks a readable scheduler/scheduler_config.json"),
        ("audioldm2", "scheduler/scheduler_config.json", garble, "lacks a readable scheduler/scheduler_config.json"),
        ("audioldm2", "scheduler/scheduler_config.json", says(beta_schedule="wavy"), "beta_schedule 'wavy'"),
        ("audioldm2", "scheduler/scheduler_config.json", says(prediction_type="mood"), "prediction_type 'mood'"),
        ("audioldm2", "model_index.json", garble, r"model_index\.json names no pipeline"),
        ("stable_audio", f"transformer/{WEIGHTS}", cut, rf"transformer/{WEIGHTS} is not a readable"),
        ("stable_audio", f"transformer/{WEIGHTS}", without("preprocess_conv.weight"), r"first preprocess_conv\.weight"),
        ("stable_audio", f"transformer/{CONFIG}", says(in_channels=6), r"transformer: \S+ has the shape"),
        ("stable_audio", f"vae/{WEIGHTS}", lose, "vae lacks weights"),
        ("stable_audio", f"projection_model/{WEIGHTS}", without("text_projection.weight"), r"first text_projection\.weight"),
        ("tiny", "codec.json", says(hop="x"), r"codec\.json: no settings .*hop is 'x'"),
        ("tiny", "codec.json", says(hop=0), r"codec\.json: no settings .*hop is 0"),
        ("tiny", "codec.json", says_no("patch"), r"codec\.json: no settings .*patch"),
        ("tiny", "codec.safetensors", cut, r"codec\.safetensors: no weights"),
        ("tiny", "codec.safetensors", without("up"), r"codec\.safetensors: no weights .*'up'"),
        ("tiny", f"denoiser/{WEIGHTS}", cut, rf"denoiser/{WEIGHTS} is not a readable"),
        (
            "tiny",
            f"denoiser/{WEIGHTS}",
            without("proj_out.bias"),
            r"denoiser lacks 1 .*first proj_out\.bias",
        ),
        (
            "tiny",
            f"text_encoder/{MODEL}",
            without("shared.weight"),
            r"text_encoder lacks 2 .*\.embed_tokens\.weight",
        ),
        ("tiny", f"text_encoder/{CONFIG}", says(d_model=32), r"text_encoder: \S+ has the shape"),
        ("tiny", "tokenizer/tokenizer.json", lose, "tokenizer cannot be read as a tokenizer"),
        ("tiny", "scheduler/scheduler_config.json", lose, "lacks a readable scheduler/scheduler_config.json"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    family: str, file: str, change: Callable[[Path], Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bases[family], tmp_path / "base"))
    change(folder / file)
    with pytest.raises(UserError, match=message):
        opened(family, folder).load()
