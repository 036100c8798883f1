"""Linear combinations of low-rank updates: the products are combined, exactly, and not the factors.

With updates B_k A_k, sum_k c_k B_k A_k = [c_1 B_1 ... c_K B_K] [A_1; ...; A_K]: the ranks add up. Combining factor by factor,
(sum c_k B_k)(sum c_k A_k), is something else, with cross terms. COFS-DPO (arXiv 2406.05534) combines the adapters of past
domains so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine_low_rank(down: Sequence[Tensor], up: Sequence[Tensor], coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = sum_k c_k B_k A_k.

    Args:
        down: A_k, each (rank_k, inputs).
        up: B_k, each (outputs, rank_k).

    Raises:
        ValueError: numbers of factors and coefficients that differ.
    """
    if not len(down) == len(up) == len(coefficients):
        found = f"{len(down)} A, {len(up)} B and {len(coefficients)} coefficients"
        raise ValueError(f"found {found}; an update needs one of each")
    scaled = [coefficient * factor for coefficient, factor in zip(coefficients, up, strict=True)]
    return torch.cat(list(down), 0), torch.cat(scaled, 1)
