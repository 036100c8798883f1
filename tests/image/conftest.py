"""Tiny random models shaped like SD1.5 (epsilon), SD2 (v-prediction) and SDXL, built once a session in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from polyalign.modalities.image.adapter import ImageAdapter
from polyalign.modalities.image.settings import ImageModelSettings

sys.path.insert(0, str(Path(__file__).resolve().parent))

import flow_models  # noqa: E402
from image_runs import save_base  # noqa: E402

FAMILIES = ("sd15", "sd2", "sdxl")
PROMPTS = ("a red circle", "a blue square", "two green dots")


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz "
    tokens = [*letters, *[letter + "</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: place for place, token in enumerate(tokens)}, merges=[], model_max_length=24, pad_token="<|endoftext|>"
    )


def text_config(tokens: CLIPTokenizer, projection: int = 8) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=projection,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        initializer_range=0.3,
    )


def vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def unet(width: int, **extra: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=2,
        **extra,
    )


def build(family: str, folder: Path) -> Path:
    torch.manual_seed({"sd15": 1, "sd2": 2, "sdxl": 3}[family])
    tokens = tokenizer()
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    encoder = CLIPTextModel(text_config(tokens))
    if family == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(
            vae=vae(0.13025),
            text_encoder=encoder,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokens)),
            tokenizer=tokens,
            tokenizer_2=tokenizer(),
            unet=unet(
                32, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 24
            ),
            scheduler=DDIMScheduler(**betas, timestep_spacing="leading", steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    else:
        if family == "sd2":
            scheduler: Any = DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
        else:
            scheduler = PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
        pipeline = StableDiffusionPipeline(
            vae=vae(0.18215),
            text_encoder=encoder,
            tokenizer=tokens,
            unet=unet(16),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> diffusers folder; families sd15, sd2, sdxl."""
    root = tmp_path_factory.mktemp("tiny_models")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded architecture with random weights, which no test may change."""
    return save_base(tmp_path_factory.mktemp("base") / "tiny-xl")


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(numbers.numpy())


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Three pairs of random pictures, 32 pixels."""
    return [
        {
            "pair_id": f"pair-{place}",
            "condition": {"prompt": prompt},
            "chosen": picture(2 * place),
            "rejected": picture(2 * place + 1),
        }
        for place, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def make_picture() -> Callable[..., Image.Image]:
    """``make_picture(seed, size=(width, height))``: random pixels."""
    return picture


@pytest.fixture(scope="session")
def flow_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> diffusers folder; kinds sd3, sd35, flux-dev, flux-schnell."""
    root, tokens = tmp_path_factory.mktemp("flow_models"), tokenizer()
    return {kind: flow_models.build(kind, root / kind, tokens, text_config(tokens)) for kind in flow_models.KINDS}


@pytest.fixture
def make_flow(flow_bases: dict[str, Path]) -> Callable[..., ImageAdapter]:
    """``make_flow(kind, **settings)``: an adapter of a tiny flow model at 32 pixels."""

    def make(kind: str, **settings: Any) -> ImageAdapter:
        cheap = {"sampler": "base", "sampling_steps": 3, "rank": 4, "resolution": 32, "text_tokens": flow_models.TOKENS}
        return ImageAdapter(ImageModelSettings(**{"base": str(flow_bases[kind]), **cheap, **settings}))

    return make


@pytest.fixture
def make_adapter(tiny_models: dict[str, Path]) -> Callable[..., ImageAdapter]:
    """``make_adapter(family, **settings)``: an adapter of a tiny model, with few and cheap sampling steps."""

    def make(family: str, **settings: Any) -> ImageAdapter:
        return ImageAdapter(
            ImageModelSettings(**{"base": str(tiny_models[family]), "sampling_steps": 3, "rank": 4, **settings})
        )

    return make
