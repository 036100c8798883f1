"""Tiny random flow models shaped like SD3, SD3.5 and FLUX.1, saved as diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

KINDS = ("sd3", "sd35", "flux-dev", "flux-schnell")
FAMILY_OF = {"sd3": "sd3", "sd35": "sd3", "flux-dev": "flux", "flux-schnell": "flux"}
TOKENS = 24
"""T5 tokens in these tests; the published numbers, 256 and 512, only make them slower."""


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def t5(tokens: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def vae(scale: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def loud(network: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that text, noise level, guidance and position all show in the output."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def sd3(tokenizer: Any, config: CLIPTextConfig, *, later: bool) -> StableDiffusion3Pipeline:
    """SD3, or with ``later`` SD3.5: norms of queries and keys, and (medium) a second attention in the first layer."""
    tokens = t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if later else None,
        dual_attention_layers=(0,) if later else (),
    )
    return StableDiffusion3Pipeline(
        transformer=loud(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, 0.0609),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokens),
        tokenizer_3=tokens,
    )


def flux(tokenizer: Any, config: CLIPTextConfig, *, dev: bool) -> FluxPipeline:
    """FLUX.1-dev (distilled guidance, dynamic shift) or FLUX.1-schnell (neither)."""
    tokens = t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return FluxPipeline(
        transformer=loud(transformer),
        scheduler=scheduler,
        vae=vae(0.3611, 0.1159),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokens),
        tokenizer_2=tokens,
    )


def build(kind: str, folder: Path, tokenizer: Any, config: CLIPTextConfig) -> Path:
    """A diffusers folder of this kind, with the tokenizer and text configuration that all tiny models here share."""
    torch.manual_seed(10 + KINDS.index(kind))
    if kind.startswith("sd3"):
        pipeline: Any = sd3(tokenizer, config, later=kind == "sd35")
    else:
        pipeline = flux(tokenizer, config, dev=kind == "flux-dev")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
