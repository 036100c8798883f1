"""Diffusers folders of AudioLDM2 and Stable Audio: the same text states and the same sound as the stock pipelines."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    DDIMScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from tango_models import adapter_of, audible, loud, pairs, tokenizer
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from polyalign.core.errors import UserError
from polyalign.core.references import adapters_off
from polyalign.modalities.audio import sampling, stable_audio
from polyalign.modalities.audio.loading import parts_of

torch.set_num_threads(1)

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def build_stable_audio(folder: Path) -> StableAudioPipeline:
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[4, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=8000,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=8)
    pipeline = StableAudioPipeline(
        vae, t5(), projection, tokenizer(), loud(transformer), DDIMScheduler(**BETAS, prediction_type="v_prediction")  # type: ignore[arg-type]
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def roberta() -> RobertaTokenizer:
    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *"abcdefghijklmnopqrstuvwxyz",
        "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
    ]
    return RobertaTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=24)


def build_audioldm2(folder: Path) -> AudioLDM2Pipeline:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 40, "max_position_embeddings": 32, "projection_dim": 8}
    audio = {
        "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16, "window_size": 4, "hidden_size": 64,
        "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [1, 1], "projection_dim": 8,
        "num_hidden_layers": 2, "num_classes": 4,
    }  # fmt: skip
    clap = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=((None, 8, 16), (None, 8, 16)),
    )
    voice = SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=16000, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False,
    )  # fmt: skip
    language = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=128, vocab_size=8, max_new_tokens=4))
    pipeline = AudioLDM2Pipeline(
        vae=vae,
        text_encoder=clap,
        text_encoder_2=t5(),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=8, text_encoder_1_dim=16, langauge_model_dim=8),
        language_model=language,
        tokenizer=roberta(),
        tokenizer_2=tokenizer(),
        feature_extractor=ClapFeatureExtractor(feature_size=16),
        unet=loud(unet),  # type: ignore[arg-type]
        scheduler=DDIMScheduler(**BETAS),  # type: ignore[arg-type]
        vocoder=audible(SpeechT5HifiGan(voice)),  # type: ignore[arg-type]
    )
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("folders")
    makers: dict[str, Any] = {"stable_audio": build_stable_audio, "audioldm2": build_audioldm2}
    found = {}
    for name, make in makers.items():
        kind = type(make(root / name))  # opened again, since the parts of one that was just built are in training mode
        found[name] = (root / name, kind.from_pretrained(root / name))
    return found


FAMILIES = ["stable_audio", "audioldm2"]
LENGTH = {"stable_audio": 0.03, "audioldm2": 0.14}
"""The second is an odd number of the denoiser's rows."""


@pytest.mark.parametrize("negative", [None, "noise", "a cat meows while rain falls"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_makes_the_same_sound(
    family: str, guidance: float, negative: str | None, bases: dict[str, tuple[Path, Any]]
) -> None:
    """Also against a text that is shorter or longer than the prompt, which AudioLDM2 cuts or pads to the prompt's tokens."""
    folder, pipeline = bases[family]
    adapter = adapter_of(folder, seconds=LENGTH[family], guidance=guidance, sample_batch=1, negative_prompt=negative)
    model = adapter.load()
    assert parts_of(model).family == family
    found, other = (adapter.sample(model, [prompt], [5])[0].samples for prompt in ("a dog", "rain on a roof"))
    latents = sampling._denoise(model, adapter.settings, [adapter._job(model, 0, "a dog", 5)])
    length = {"audio_end_in_s" if family == "stable_audio" else "audio_length_in_s": LENGTH[family]}
    pipeline.set_progress_bar_config(disable=True)
    stock = [
        pipeline(
            "a dog",
            negative_prompt=negative,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5),
            output_type=kind,
            **length,
        ).audios
        for kind in ("latent", "np")
    ]
    torch.testing.assert_close(latents, stock[0], rtol=1e-5, atol=1e-5)
    expected = np.asarray(stock[1][0])
    expected = expected.mean(0) if family == "stable_audio" else expected
    assert len(found) == round(LENGTH[family] * parts_of(model).codec.rate) and 0.01 < found.std() < 0.5
    np.testing.assert_allclose(found, expected.clip(-1, 1)[: len(found)], atol=1e-5)
    assert np.abs(found - other).max() > 1e-3  # a hundred times as far as it may be from the stock one


@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_zero_and_an_export_opens(family: str, bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    adapter = adapter_of(bases[family][0], seconds=LENGTH[family])
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, pairs(), step=0)
    draws = adapter.draws(model, batch, step=0)
    policy = adapter.score(model, batch, draws).values
    with torch.no_grad(), adapters_off(model.network):
        assert torch.equal(policy, adapter.score(model, batch, draws).values)
    policy.sum().backward()
    full = adapter_of(bases[family][0], seconds=LENGTH[family], train="full")
    trained = full.trainable(full.load())
    with torch.no_grad():
        next(trained.network.parameters()).add_(0.1)
    full.export(trained, tmp_path / "out")
    again = adapter_of(tmp_path / "out", seconds=LENGTH[family])
    first, second = (a.sample(m, ["rain", "a dog"], [0, 1]) for a, m in ((full, trained), (again, again.load())))
    assert all(np.array_equal(one.samples, other.samples) for one, other in zip(first, second, strict=True))
    stock = type(bases[family][1]).from_pretrained(tmp_path / "out")
    network = stock.transformer if family == "stable_audio" else stock.unet
    assert all(torch.equal(tensor, trained.network.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_cosine_scheduler_is_its_schedule_in_sigmas(bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["stable_audio"][0], tmp_path / "cosine"))
    described = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    adapter = adapter_of(folder, seconds=0.03)
    model = adapter.load()
    schedule = parts_of(model).schedule
    sigma = schedule.noise.double() / schedule.signal.double()
    torch.testing.assert_close(sigma.arctan() / math.pi * 2, schedule.timestep.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000))
    scheduler: Any = DDIMScheduler.from_config(stable_audio.solver_config(schedule))
    torch.testing.assert_close(scheduler.alphas_cumprod.sqrt(), schedule.signal, rtol=1e-3, atol=1e-6)
    for solver in ("ddim", "dpmpp", "ddpm"):
        one = adapter_of(folder, seconds=0.03, solver=solver)
        assert np.isfinite(one.sample(model, ["a dog"], [0])[0].samples).all()
    described["_class_name"] = "EDMDPMSolverMultistepScheduler"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="whose noise levels"):
        adapter.load()


def test_what_a_folder_lacks_is_named(bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["stable_audio"][0], tmp_path / "base"))
    with pytest.raises(UserError, match="at most 0.03"):
        adapter_of(folder, seconds=3.0).load()
    with pytest.raises(UserError, match="it is for Tango's layout only"):
        adapter_of(folder, seconds=0.03, tokenizer="x").load()
    shutil.rmtree(folder / "projection_model")
    with pytest.raises(UserError, match="lacks projection_model/, its StableAudioProjectionModel"):
        adapter_of(folder, seconds=0.03).load()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MusicLDMPipeline"}))
    with pytest.raises(UserError, match="describes a MusicLDMPipeline"):
        adapter_of(folder, seconds=0.03).load()
