"""Tiny random models in the layouts that judges are published in, written by transformers or tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIDE = 28
PROMPTS = ("a red circle", "two blue squares and more", "x")
PREPARATION = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": SIDE},
}


def conditions(prompts: Any = PROMPTS) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def pictures(sizes: Any = ((SIDE, SIDE), (40, 31), (29, 64)), seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures of the given (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [picture.resize(size, Image.Resampling.BILINEAR) for picture, size in zip(coarse, sizes, strict=True)]


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*letters, *[letter + "</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[], model_max_length=16)


def save_processor(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def tiny_clip(seed: int = 0, hidden_act: str = "gelu") -> CLIPModel:
    torch.manual_seed(seed)
    vocabulary = len(clip_tokenizer())
    tower = {"hidden_act": hidden_act, "intermediate_size": 96, "num_hidden_layers": 2}
    config = CLIPConfig(
        projection_dim=24,
        vision_config={**tower, "hidden_size": 128, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14},
        text_config={
            **tower,
            "hidden_size": 64,
            "num_attention_heads": 1,
            "vocab_size": vocabulary,
            "max_position_embeddings": 16,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # initialised norms and biases are ones and zeros, and would hide a wrong name
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(float(np.log(100.0)))
    return model


def save_clip(folder: Path, seed: int = 0, *, processor: bool = True) -> CLIPModel:
    model = tiny_clip(seed)
    model.save_pretrained(folder)
    if processor:
        save_processor(folder)
    return model


def head_weights(width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """The five linear layers of LAION aesthetics and ImageReward, narrower."""
    generator = torch.Generator().manual_seed(seed)
    widths = [width, 20, 12, 8, 4, 1]
    weights = {}
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weights[f"layers.{place}.weight"] = torch.randn(narrow, wide, generator=generator) * 2 / wide**0.5
        weights[f"layers.{place}.bias"] = torch.randn(narrow, generator=generator)
    return weights
