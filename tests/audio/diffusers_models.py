"""Tiny random folders of AudioLDM2Pipeline and StableAudioPipeline, and their lengths in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from tango_models import audible, loud, tokenizer
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

FAMILIES = ["stable_audio", "audioldm2"]
LENGTH = {"stable_audio": 0.03, "audioldm2": 0.14}
"""The second is an odd number of the denoiser's rows."""

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
        vae, t5(), projection, tokenizer(), loud(transformer), DDIMScheduler(**BETAS, prediction_type="v_prediction")
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
    generator: dict[str, Any] = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
        "vocab_size": 8,
        "max_new_tokens": 4,
    }
    language = GPT2LMHeadModel(GPT2Config(**generator))
    pipeline = AudioLDM2Pipeline(
        vae=vae,
        text_encoder=clap,
        text_encoder_2=t5(),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=8, text_encoder_1_dim=16, langauge_model_dim=8),
        language_model=language,
        tokenizer=roberta(),
        tokenizer_2=tokenizer(),
        feature_extractor=ClapFeatureExtractor(feature_size=16),
        unet=loud(unet),
        scheduler=DDIMScheduler(**BETAS),
        vocoder=audible(SpeechT5HifiGan(voice)),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def build(folder: Path, family: str) -> Any:
    """Write a folder and give its stock pipeline, opened again: the parts of one that was just built are in training mode."""
    made: Any = {"stable_audio": build_stable_audio, "audioldm2": build_audioldm2}[family](folder)
    return type(made).from_pretrained(folder)
