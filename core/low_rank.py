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


def reduce_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, squared norm of what was lost, squared norm of all) with B A the best approximation of ``up`` ``down`` by ``rank``
    (truncated singular values, Frobenius norm), computed from the factors alone.

    Args:
        down: (r, inputs). up: (outputs, r).

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"a rank is at least 1, found {rank}")
    left, small_left = torch.linalg.qr(up.double())
    right, small_right = torch.linalg.qr(down.double().T)
    u, sizes, v = torch.linalg.svd(small_left @ small_right.T)
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    new_up = (left @ u[:, :kept]) * root
    new_down = root.unsqueeze(1) * (v[:kept] @ right.T)
    squares = sizes.square()
    return new_down.to(down), new_up.to(up), float(squares[kept:].sum()), float(squares.sum())
