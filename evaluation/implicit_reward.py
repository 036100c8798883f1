"""Does the aligned model itself prefer what was chosen? Accuracy of its implicit reward on pairs, best on held-out ones.

The protocol is Diffusion-DPO's (Wallace et al., arXiv 2311.12908, Table 2): several draws of noise level and noise for each
pair, the same for both candidates and for policy and reference, and the mean over them decides. Letters: G pairs, K
candidates, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.candidates import Batch
from polyalign.core.randomness import seed_of
from polyalign.core.references import Seat
from polyalign.core.scores import Scores
from polyalign.evaluation.statistics import bootstrap_mean

DRAWS = 10
"""As in the paper."""


def implicit_reward_accuracy(
    adapter: Adapter,
    model: Model,
    reference: Seat | None,
    rows: Sequence[Row],
    *,
    draws: int = DRAWS,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of pairs whose chosen candidate has the higher implicit reward, ties counting half.

    The reward of a candidate is the log-likelihood ratio of policy and reference, summed over units and averaged over draws;
    beta and the likelihood's scale do not change its sign. Without a reference it is the policy's likelihood.

    Args:
        adapter: the modality, set up as for training but without caption dropout.
        model: the policy. Its network is in evaluation mode meanwhile.
        reference: a seat of :mod:`polyalign.core.references`, or None.
        rows: pairs as in training; those whose target is a tie are left out and counted.
        draws: of each pair. They are keyed by steps below 0, which training never takes.
        batch_size: pairs in a forward pass.
        seed: keys the bootstrap, which resamples prompts.

    Returns:
        ``accuracy`` with its 95 % ``interval``; ``pairs``, ``draws``, ``ties_left_out``; ``mean_margin``, reward of the chosen
        less that of the rejected in units of the likelihood; ``accuracy_of_one_draw``, what one draw gives on average.

    Raises:
        ValueError: no draws, no pairs, or nothing but ties.
    """
    if draws < 1 or not rows:
        raise ValueError(f"an accuracy needs pairs and draws, found {len(rows)} pairs and {draws} draws")
    found, decided = implicit_margins(adapter, model, reference, rows, draws=draws, batch_size=batch_size)
    every, ties = found[decided], int((~decided).sum())  # (G, draws)
    prompts = [_prompt(row) for row, kept in zip(rows, decided.tolist(), strict=True) if kept]
    if not len(every):
        raise ValueError(f"all {ties} pairs are ties, so there is nothing to be right about")
    mean, interval = bootstrap_mean(
        _right(every.mean(1)).tolist(), seed=seed_of(seed, "implicit reward accuracy"), clusters=prompts
    )
    return {
        "accuracy": mean,
        "interval": list(interval),
        "pairs": len(every),
        "draws": draws,
        "ties_left_out": ties,
        "mean_margin": float(every.mean()),
        "accuracy_of_one_draw": float(_right(every).mean()),
    }


def implicit_margins(
    adapter: Adapter, model: Model, reference: Seat | None, rows: Sequence[Row], *, draws: int = DRAWS, batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """(G, draws) implicit rewards of the chosen less those of the rejected, without beta, in float64 on the CPU; (G,) whether
    the pair is no tie. Arguments are those of :func:`implicit_reward_accuracy`."""
    with _evaluating(model.network), torch.no_grad():
        parts = [
            _margins(adapter, model, reference, rows[start : start + batch_size], draws)
            for start in range(0, len(rows), batch_size)
        ]
    return torch.cat([margins for margins, _ in parts]), torch.cat([decided for _, decided in parts])


def _margins(adapter: Adapter, model: Model, reference: Seat | None, rows: Sequence[Row], draws: int) -> tuple[Tensor, Tensor]:
    """(G, draws) rewards of the chosen less those of the rejected, in float64 on the CPU; (G,) whether the pair is no tie."""
    columns: list[Tensor] = []
    decided = torch.empty(0, dtype=torch.bool)
    for draw in range(draws):
        step = -1 - draw
        batch = adapter.prepare(model, rows, step=step)
        noise = adapter.draws(model, batch, step=step)
        reward = _total(adapter.score(model, batch, noise))
        if reference is not None:
            found = reference.scores(adapter, model, batch, noise, index=step)
            reward = reward - _total(found) if found is not None else reward
        chosen, rejected, decided = _sides(batch)
        columns.append((reward.gather(1, chosen) - reward.gather(1, rejected)).squeeze(1))
    return torch.stack(columns, dim=1), decided


def _total(scores: Scores) -> Tensor:
    """(G, K) sums over units."""
    values = scores.values.double()  # replaced under the mask and not multiplied by 0, which is no number for an infinity
    return torch.where(scores.mask.bool(), values, torch.zeros_like(values)).sum(-1).cpu()


def _sides(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Places (G, 1) of the most and the least wanted candidate, and (G,) whether they differ."""
    target = batch.target.cpu()
    chosen, rejected = target.argmax(1, keepdim=True), target.argmin(1, keepdim=True)
    return chosen, rejected, (target.gather(1, chosen) != target.gather(1, rejected)).squeeze(1)


def _right(margins: Tensor) -> Tensor:
    return torch.where(margins == 0, 0.5, (margins > 0).double())


def _prompt(row: Row) -> str:
    condition = row.get("condition")
    return str(condition.get("prompt", condition) if isinstance(condition, dict) else condition)


@contextmanager
def _evaluating(network: nn.Module):
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)
