"""The embedded base's architecture: Stable Diffusion XL in every part, small in every size.

UNet2DConditionModel with ``text_time`` conditioning, two CLIP text encoders (the second with a projection), AutoencoderKL and
CLIP tokenizers, put together in diffusers' StableDiffusionXLPipeline: what loads, trains and exports this loads SDXL.

Three things differ from SDXL beside size, since 32-pixel pictures and a vocabulary of thirty words call for them: the
prediction type is v (SDXL: epsilon), the noise schedule is the cosine one, and text is padded to 16 tokens (SDXL: 77).

With a frozen sentence encoder in the place of CLIP it is a StableDiffusionPipeline: the same autoencoder, schedule and UNet,
told the encoder's last hidden states and nothing besides.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from polyalign.core.errors import UserError

PIXELS = 32
TEXT_LENGTH = 16
LATENT_CHANNELS = 4
VAE_FACTOR = 4
TEXT_WIDTH = 48  # of each encoder; the UNet sees both side by side
POOLED_WIDTH = 48
TIME_ID_WIDTH = 8  # each of SDXL's six size and crop numbers


def tokenizer(words: list[str]) -> CLIPTokenizer:
    """CLIP's own tokenizer over whole words: each word is one token, built from merges as CLIP's byte-pair encoding is.

    Raises:
        UserError: a word with other letters than ASCII's, whose bytes are several.
    """
    strange = [word for word in words if not word.isascii()]
    if strange:
        raise UserError(f"this base's tokenizer knows ASCII letters only; found {strange[0]!r} in the captions")
    vocabulary: dict[str, int] = {}
    merges: list[tuple[str, str]] = []

    def add(token: str) -> None:
        vocabulary.setdefault(token, len(vocabulary))

    for letter in sorted({letter for word in words for letter in word}):
        add(letter)
        add(letter + "</w>")
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right, so that no word's merges disturb another's ending
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
            add(parts[-1])
    add("<|startoftext|>")
    add("<|endoftext|>")
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH, pad_token="<|endoftext|>")


def text_config(tokens: CLIPTokenizer, *, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH * 4,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=POOLED_WIDTH,
        hidden_act=activation,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )


def unet(text_width: int = TEXT_WIDTH * 2, *, told_size: bool = True) -> UNet2DConditionModel:
    """Told states of ``text_width``; with ``told_size`` SDXL's pooled text and picture size too."""
    size: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * TIME_ID_WIDTH,
    }
    return UNet2DConditionModel(
        sample_size=PIXELS // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads
        use_linear_projection=True,
        **(size if told_size else {}),
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def initialise_text(encoder: nn.Module) -> None:
    """Matrices by fan-in, embeddings and positions at a scale that the first layer can see.

    transformers' 0.02 is made for widths of thousands; at width 48 the first of two objects could not be told from the second.
    """
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))


def build(words: list[str], seed: int) -> StableDiffusionXLPipeline:
    """The untrained pipeline, initialised from ``seed``."""
    torch.manual_seed(seed)
    tokens = tokenizer(words)
    encoder = CLIPTextModel(text_config(tokens, activation="quick_gelu"))
    encoder_2 = CLIPTextModelWithProjection(text_config(tokens, activation="gelu"))
    initialise_text(encoder)
    initialise_text(encoder_2)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokens,
        tokenizer_2=tokenizer(words),
        unet=unet(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def build_on(sentences: Path, seed: int) -> StableDiffusionPipeline:
    """The untrained pipeline on the frozen sentence encoder (BERT's kind, such as MiniLM) that lies in ``sentences``; its mask
    hides the padding from the encoder itself.

    Raises:
        UserError: no such encoder can be read there.
    """
    try:
        tokens = AutoTokenizer.from_pretrained(sentences, local_files_only=True)
        encoder: Any = AutoModel.from_pretrained(sentences, local_files_only=True, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{sentences}: no sentence encoder can be read there ({str(error).splitlines()[0]})") from error
    tokens.model_max_length = TEXT_LENGTH
    encoder.config.use_attention_mask = True
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=encoder.eval().requires_grad_(False),
        tokenizer=tokens,
        unet=unet(encoder.config.hidden_size, told_size=False),
        scheduler=DDIMScheduler.from_config(
            scheduler().config, steps_offset=1
        ),  # as the pipeline wants; trailing has no offset
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
