"""A CLIP as the judges need it: unit embeddings of pictures and of prompts, from transformers' classes or from open_clip's.

Letters: B pictures or prompts, D the width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import pixels
from polyalign.evaluation.network_judge import pretrained


@dataclass(frozen=True)
class Clip:
    """Two towers and what goes before them. ``scale`` is the learned logit scale, already exponentiated (about 100)."""

    embed_pictures: Callable[[torch.Tensor], torch.Tensor]
    embed_tokens: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    tokenize: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor | None]]
    prepare: pixels.Preparation
    scale: float
    device: torch.device
    dtype: torch.dtype

    def pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(B, D) float32 of unit length."""
        values = self.prepare(pictures).to(self.device, self.dtype)
        return torch.nn.functional.normalize(self.embed_pictures(values).float(), dim=-1)

    def prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, D) float32 of unit length. Prompts of more than the text tower's length (77 tokens) are cut, as published."""
        ids, mask = self.tokenize(list(prompts))
        ids, mask = ids.to(self.device), None if mask is None else mask.to(self.device)
        return torch.nn.functional.normalize(self.embed_tokens(ids, mask).float(), dim=-1)

    def cosine(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(B,) cosine of each picture with its own prompt."""
        return (self.pictures(pictures) * self.prompts(prompts)).sum(-1)


def of_transformers(
    model: CLIPModel, tokenizer: CLIPTokenizer, prepare: pixels.Preparation, *, device: torch.device, dtype: torch.dtype
) -> Clip:
    """A CLIP of transformers' class, moved to the device in the dtype. ``attention_mask`` hides the padding; the text tower is
    causal and pooled at the end token, so it changes nothing."""
    network: Any = model.eval().requires_grad_(False)
    network.to(device=device, dtype=dtype)
    config: Any = model.config
    length = config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"]

    return Clip(
        embed_pictures=lambda values: embedding(network.get_image_features(pixel_values=values)),
        embed_tokens=lambda ids, mask: embedding(network.get_text_features(input_ids=ids, attention_mask=mask)),
        tokenize=tokenize,
        prepare=prepare,
        scale=float(network.logit_scale.float().exp()),
        device=device,
        dtype=dtype,
    )


def embedding(output: Any) -> torch.Tensor:
    """The embedding of ``get_image_features``: a tensor before transformers 5, ``pooler_output`` of an object since."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def read_model(folder: Path) -> CLIPModel:
    """The CLIPModel of a folder, see :func:`~polyalign.evaluation.network_judge.pretrained`."""
    return pretrained(CLIPModel, folder)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder.

    Raises:
        UserError: there is none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{folder} has no CLIP tokenizer (tokenizer.json, or vocab.json with merges.txt); name a folder or hub id that has "
            "one with the option 'processor'"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error


def of_open_clip(checkpoint: Path, architecture: str, *, device: torch.device, dtype: torch.dtype) -> Clip:
    """A CLIP of the package open_clip: its architecture by name, the checkpoint's weights, its own preprocessing and tokenizer.

    Raises:
        UserError: the package is not installed, does not know the architecture, or the weights are not its.
    """
    open_clip = require("open_clip", extra="image", purpose="backend: open_clip")
    if architecture not in open_clip.list_models():
        raise UserError(f"architecture is {architecture!r}, which open_clip does not know; it lists its names by list_models()")
    network, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=None)
    files.fill(network, files.tensors(checkpoint), str(checkpoint))
    network = network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    tokenizer = open_clip.get_tokenizer(architecture)
    return Clip(
        embed_pictures=network.encode_image,
        embed_tokens=lambda ids, _: network.encode_text(ids),
        tokenize=lambda prompts: (tokenizer(prompts), None),
        prepare=lambda pictures: torch.stack([prepare(picture) for picture in pictures]),
        scale=float(network.logit_scale.float().exp()),
        device=device,
        dtype=dtype,
    )
