"""Shared by the adapters of denoising files, whose rows are [w_1..w_B, l_1..l_B]."""

from __future__ import annotations

from typing import Any

import torch
from golden_adapters.cases import tensor
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.likelihood.denoising import squared_error_scores
from polyalign.core.objectives import Beta, Outcome, build
from polyalign.core.objectives.table import Parameters
from polyalign.core.scores import Scores

STEPS = 1000


def grouped(rows: Tensor) -> Tensor:
    """(2B, ...) -> (B, 2, ...), chosen first."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1)


def ungrouped(pairs: Tensor) -> Tensor:
    """(B, 2, ...) -> (2B, ...)."""
    return pairs.transpose(0, 1).flatten(0, 1)


def scores_of(prediction: Tensor, target: Tensor, keep_residual: bool = False) -> Scores:
    return squared_error_scores(grouped(prediction), grouped(target), steps=STEPS, keep_residual=keep_residual)


def pair_batch(size: int, candidates: int = 2) -> Batch:
    target = torch.zeros(size, candidates)
    target[:, 0] = 1.0
    return Batch(tuple(f"group-{index}" for index in range(size)), target)


def run(spec: Parameters, inputs: dict[str, Any], target: Tensor, *, effective: float | None = None) -> tuple[Outcome, Tensor]:
    """The outcome of ``spec`` on a golden case, and the gradient of its mean loss by the prediction.

    ``effective`` replaces beta where the case has a value that a recipe may not state (0).
    """
    objective = build(spec)
    prediction = tensor(inputs["model_pred"]).requires_grad_(True)
    keep = "output_gradient" in objective.needs
    policy = scores_of(prediction, target, keep_residual=keep)
    scores = {"policy": policy, "reference": scores_of(tensor(inputs["ref_pred"]), target, keep_residual=keep)}
    beta = Beta.of(spec.beta).effective(policy.unit) if effective is None else effective
    outcome = objective(scores, pair_batch(policy.values.shape[0]), beta=beta)
    outcome.loss.mean().backward()
    assert prediction.grad is not None
    return outcome, prediction.grad
