"""Rank pairs before training by CHES, and keep those that pull their chosen side down least (Razin et al., arXiv 2410.08847).

The publication trains on the 5 % of pairs with the lowest length-normalised score: displacement then does not happen; up to
15 % was similar, and more did not help. The plain score grows with length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.diagnostics import ches
from polyalign.core.errors import UserError


@torch.no_grad()
def ches_of_pairs(
    adapter: Adapter, model: Model, rows: Sequence[Row], *, batch_size: int = 8, normalised: bool = True
) -> list[float]:
    """The CHES score of each pair under ``model``; high is dangerous. One forward pass over every pair, nothing kept but the
    scores.

    Args:
        adapter: one whose scores keep the states that units are predicted from, (G, 2, U, D) (for text ``dense: hidden``).
        model: the base, before training.
        rows: pairs as in training; the one with the greater target is the chosen one.

    Raises:
        UserError: scores without these states, groups that are no pairs, or a score that is not finite.
    """
    scores: list[float] = []
    was = model.network.training
    model.network.eval()
    try:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            scores += _of_batch(adapter, model, part, normalised)
    finally:
        model.network.train(was)
    wrong = [str(row.get("pair_id")) for row, score in zip(rows, scores, strict=True) if not math.isfinite(score)]
    if wrong:
        raise UserError(
            f"CHES is not finite for {len(wrong)} pairs, the first is {wrong[0]}: the model's states are not finite"
        )
    return scores


def _of_batch(adapter: Adapter, model: Model, rows: Sequence[Row], normalised: bool) -> list[float]:
    device = next(model.network.parameters()).device
    batch = adapter.prepare(model, rows, step=0).to(device)
    found = adapter.score(model, batch, adapter.draws(model, batch, step=0))
    hidden = None if found.dense is None else found.dense.hidden
    if hidden is None:
        raise UserError(
            "CHES compares the hidden states of a model with a linear head over a vocabulary, and this adapter keeps none. It "
            "is for token models: give its likelihood dense: [hidden]"
        )
    if hidden.shape[1] != 2:
        raise UserError(f"CHES compares the two sides of a pair, and these groups have {hidden.shape[1]} candidates")
    order = batch.target.argsort(dim=1, descending=True, stable=True).to(hidden.device)  # (G, 2), the chosen one first
    groups = torch.arange(len(hidden), device=hidden.device)
    states = [hidden[groups, order[:, side]] for side in (0, 1)]
    masks = [found.mask.bool()[groups, order[:, side]] for side in (0, 1)]
    return ches(*states, *masks, normalised=normalised).tolist()


def keep_lowest(scores: Sequence[float], share: float) -> list[int]:
    """Positions of the ``share`` of pairs with the lowest scores, at least one, in the order of the data; equal scores are
    decided by position.

    Raises:
        UserError: a share outside (0, 1], or a score that is not finite.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"the share of pairs to keep must be above 0 and at most 1, found {share}")
    wrong = [place for place, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise UserError(f"the score of pair {wrong[0]} is not finite ({scores[wrong[0]]}), so pairs cannot be ranked by it")
    count = max(1, round(share * len(scores))) if scores else 0
    return sorted(sorted(range(len(scores)), key=lambda place: (scores[place], place))[:count])
