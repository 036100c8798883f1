"""The head that LAION aesthetics and ImageReward share in layout, though not in weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files

PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers; dropout is at 1, 3 and 5, and does nothing here."""


class LinearHead(nn.Module):
    """(B, D) to (B,): linear layers one after the other, with no activation between them, as published."""

    def __init__(self, widths: list[int]):
        super().__init__()
        pairs = zip(PLACES, widths, widths[1:], strict=False)
        self.layers = nn.ModuleDict({str(place): nn.Linear(wide, narrow) for place, wide, narrow in pairs})

    @classmethod
    def read(cls, weights: Mapping[str, torch.Tensor], what: str) -> LinearHead:
        """The head of tensors ``layers.{0,2,4,6,7}.{weight,bias}``, frozen, in float32.

        Raises:
            UserError: other tensors, or layers that do not fit each other.
        """
        matrices = [weights.get(f"layers.{place}.weight") for place in PLACES]
        if any(matrix is None or matrix.ndim != 2 for matrix in matrices):
            raise UserError(
                f"{what} is not in the published layout: layers.{{{','.join(map(str, PLACES))}}}.{{weight,bias}} are expected, "
                f"found {', '.join(sorted(weights)[:4])}"
            )
        shapes = [matrix.shape for matrix in matrices if matrix is not None]
        head = cls([shapes[0][1], *(shape[0] for shape in shapes)])
        files.fill(head, {name: value.float() for name, value in weights.items()}, what)
        return head.eval().requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)
