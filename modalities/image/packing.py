"""FLUX.1's view of latents: 2x2 patches as tokens, and where each token lies.

Letters: N samples, C h w latents, L = h w / 4 tokens of 4 C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) to tokens (N, L, 4 C), row by row; a token's channels are ordered channel, down, right."""
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``, for latents of ``height`` x ``width`` elements."""
    count, _, channels = tokens.shape
    patches = tokens.reshape(count, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // PATCH**2, height, width)


def image_positions(height: int, width: int, like: Tensor) -> Tensor:
    """(L, 3) for latents of ``height`` x ``width``: 0, the token's row, its column. Text tokens have three zeros."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(down), down, right], dim=-1).reshape(-1, 3).to(like.device, torch.float32)
