"""Shared by the adapters of files about sequences: log-probabilities of candidates, of their tokens, or logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from golden_adapters.cases import agree, tensor
from golden_adapters.pairs import grouped, pair_batch
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.likelihood.chunked_head import Head, likeliest_others, token_statistics
from polyalign.core.objectives import Objective, Outcome
from polyalign.core.scores import DenseStatistics, Scores, Unit

IGNORED = -100
FLOAT32 = {"rtol": 2e-5, "atol": 1e-7}
"""Agreement with numbers that the original computed in float32."""


def token_scores(values: Tensor, mask: Tensor | None = None, **dense: Tensor) -> Scores:
    """Scores of tokens from (G, K) sums or (G, K, U) log-probabilities."""
    values = values if values.ndim == 3 else values.unsqueeze(-1)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    return Scores(values, mask, Unit("token"), dense=DenseStatistics(**dense) if dense else None)


def columns(inputs: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype = torch.float64) -> Tensor:
    """Several inputs (G, ...) as candidates (G, K, ...)."""
    return torch.stack([tensor(inputs[name], dtype) for name in names], 1)


@dataclass(frozen=True)
class Result:
    """An outcome with the gradient of its summed and of its mean loss by the policy's values."""

    outcome: Outcome
    summed: Tensor

    @property
    def averaged(self) -> Tensor:
        return self.summed / len(self.outcome.loss)


def evaluate(
    objective: Objective,
    policy: Tensor,
    reference: Tensor | None,
    *,
    beta: float | Tensor,
    mask: Tensor | None = None,
    batch: Batch | None = None,
    further: Mapping[str, Scores] | None = None,
    **dense: Tensor,
) -> Result:
    """``objective`` on token scores; the target prefers the first candidate unless ``batch`` says otherwise."""
    policy = policy.detach().clone().requires_grad_(True)
    scores = {"policy": token_scores(policy, mask, **dense), **(further or {})}
    if reference is not None:
        scores["reference"] = token_scores(reference, mask)
    outcome = objective(scores, pair_batch(len(policy), policy.shape[1]) if batch is None else batch, beta=beta)
    (gradient,) = torch.autograd.grad(outcome.loss.sum(), policy)
    assert bool(outcome.loss.isfinite().all()) and bool(gradient.isfinite().all()), "finite, whatever the original gives"
    return Result(outcome, gradient)


def soft_batch(target: Tensor) -> Batch:
    return replace(pair_batch(len(target), target.shape[1]), target=target)


def agree_pairs(case_outputs: Mapping[str, Any], result: Result, **tolerance: float) -> None:
    """Losses, rewards and gradients by the two candidates, by the names that most files use."""
    reward = result.outcome.statistics["reward"]
    ours = {
        "losses": result.outcome.loss,
        "loss_mean": result.outcome.loss.mean(),
        "chosen_rewards": reward[:, 0],
        "rejected_rewards": reward[:, 1],
        "grad_policy_chosen": result.summed[:, 0],
        "grad_policy_rejected": result.summed[:, 1],
        "grad_chosen": result.summed[:, 0],
        "grad_rejected": result.summed[:, 1],
    }
    for name in ours.keys() & case_outputs.keys():
        agree(name, ours[name], case_outputs[name], **tolerance)


@dataclass(frozen=True)
class Labelled:
    """Logits (G, K, T, V) and labels (G, K, T) shifted by one: what position t says of token t + 1."""

    logits: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        return self.labels != IGNORED

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, candidates: int = 2) -> Labelled:
        """From rows, all of candidate 0 first."""

        def by_group(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (candidates, -1)).transpose(0, 1)

        return cls(by_group(logits)[:, :, :-1], by_group(labels)[:, :, 1:])

    def log_probabilities(self, logits: Tensor | None = None) -> Tensor:
        """(G, K, U) of the labels; what stands where nothing is labelled has no meaning."""
        logits = self.logits if logits is None else logits
        return logits.log_softmax(-1).gather(-1, self.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def agree_label_sums(
    case_outputs: Mapping[str, Any], name: str, logits: Tensor, labels: Tensor, *, hardest: bool = False
) -> None:
    """Sums and means of the labels' log-probabilities, by our token statistics, against ``{name}_sum`` and ``_mean``.

    Args:
        logits: (B, T, V); position t says what token t + 1 is.
        hardest: in the label's place the most probable other token, as Re-Align's code has it for the rejected side.
    """
    states, targets = logits[:, :-1], labels[:, 1:]
    mask, tokens = targets != IGNORED, targets.clamp(min=0)
    if hardest:
        tokens = likeliest_others(Head(None), states.flatten(0, 1), tokens.flatten(), rows=3).unflatten(0, tokens.shape)
    values = token_statistics(Head(None), states.flatten(0, 1), tokens.flatten(), rows=3).value.unflatten(0, tokens.shape)
    sums = torch.where(mask, values, torch.zeros_like(values)).sum(-1)
    agree(f"{name}_sum", sums, case_outputs[f"{name}_sum"])
    if f"{name}_mean" in case_outputs:
        agree(f"{name}_mean", sums / mask.sum(-1), case_outputs[f"{name}_mean"])


def divergence(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference || policy) at each position, from logits (..., V), with 0 log 0 = 0."""
    left, right = reference.log_softmax(-1), policy.log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)


def trl_rows(inputs: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(policy, reference, log sum p^2, mask), each (G, 2, U), of TRL's rows [chosen..., rejected...]; its mask is not
    shifted."""
    names = ("policy_per_token_logps", "reference_per_token_logps", "log_sum_sq_probs")
    policy, reference, sharpness = (grouped(tensor(inputs[name], dtype)) for name in names)
    mask = grouped(tensor(inputs["completion_mask"], dtype)[:, 1:]).bool()
    return policy, reference, sharpness, mask
