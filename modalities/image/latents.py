"""Latents: what the frozen VAE makes of pictures, and back.

The posterior (mean and deviation) is cached and not one sample of it, so that cached training draws fresh samples as live
training does. Each picture is encoded alone: its latents then do not depend on which others were already in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyalign.core.adapter import Model


def factor_of(vae: Any) -> int:
    """Pixels along one side of a latent element."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _moments(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale of the latents the network knows: z' = (z - shift) * scale."""
    scale: Tensor | float = config["scaling_factor"]
    shift: Tensor | float = config.get("shift_factor") or 0.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shape = (1, -1, 1, 1)
        shift = torch.tensor(config["latents_mean"], dtype=like.dtype, device=like.device).view(shape)
        scale = scale / torch.tensor(config["latents_std"], dtype=like.dtype, device=like.device).view(shape)
    return shift, scale


def to_network(latents: Tensor, vae: Any) -> Tensor:
    """VAE latents (N, C, h, w) on the network's scale."""
    shift, scale = _moments(vae.config, latents)
    return (latents - shift) * scale


def from_network(latents: Tensor, vae: Any) -> Tensor:
    """The inverse of ``to_network``."""
    shift, scale = _moments(vae.config, latents)
    return latents / scale + shift


@torch.no_grad()
def posterior(model: Model, pixels: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (C, h, w), float32, of the posterior of one picture (3, H, W)."""
    vae = model.parts["vae"]
    found = vae.encode(pixels.unsqueeze(0).to(vae.device, vae.dtype)).latent_dist
    return {"mean": found.mean[0].float(), "std": found.std[0].float()}


@torch.no_grad()
def decode(model: Model, latents: Tensor, *, batch: int) -> Tensor:
    """Pixels (N, 3, H, W), float32 in about [-1, 1], of latents on the network's scale, ``batch`` at a time."""
    vae = model.parts["vae"]
    parts = [
        vae.decode(from_network(part.to(vae.device, vae.dtype), vae), return_dict=False)[0].float()
        for part in latents.split(batch)
    ]
    return torch.cat(parts)
