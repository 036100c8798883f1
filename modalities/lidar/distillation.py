"""Distillation-DPO's losses (arXiv 2504.11447; trains/DistillationDPO.py): pure functions of points and predicted noise.

Letters: B scans, N points. All points and noises are (B, N, 3); x_0 is one of the student's two samples, chosen or
rejected; eps_T is the teacher's noise at x_0 + s_t noise, eps_A that of an assistant which has learnt the student's samples.

The published student loss has no gradient. It is mean((eps_T - eps_A)(x_t - x_0)) with x_t = x_0 + s_t noise, in which x_0
cancels, and the networks are under no_grad: its gradient is exactly 0, and the student's weights stay where they were. What was
meant is the gradient (eps_T - eps_A) of x_0, the difference of two scores, and that is what :func:`student_loss` has. The
published number is :func:`official_value`, to be logged beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def assistant_loss(chosen: Tensor, chosen_noise: Tensor, rejected: Tensor, rejected_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the two assistants, each on its own samples, levels and noise; their sum is the phase's loss.
    Without LiDiff's regularisers, as published."""
    return (chosen - chosen_noise).pow(2).mean(), (rejected - rejected_noise).pow(2).mean()


def score_difference(teacher: Tensor, assistant: Tensor) -> Tensor:
    """eps_T - eps_A without gradient: descending along it moves a sample towards where the teacher finds it likelier than the
    assistant does."""
    return (teacher - assistant).detach()


@dataclass(frozen=True)
class Sides:
    """One of the student's samples and what both networks say at it, noised."""

    sample: Tensor
    teacher: Tensor
    assistant: Tensor

    def surrogate(self) -> Tensor:
        """(B,) mean over points of (eps_T - eps_A) x_0: its gradient in x_0 is the score difference, its value means
        nothing."""
        return (score_difference(self.teacher, self.assistant) * self.sample).flatten(1).mean(dim=1)


def student_loss(chosen: Sides, rejected: Sides | None, *, loser_weight: float = 1.0) -> Tensor:
    """(B,) surrogate(chosen) - loser_weight * surrogate(rejected).

    Without ``rejected`` it is plain score distillation. The losing term pushes away without bound: with weight 1, the
    published one, sampling in several steps has been seen to diverge, with 0.2 to 0.5 not.
    """
    return chosen.surrogate() if rejected is None else chosen.surrogate() - loser_weight * rejected.surrogate()


def official_value(chosen: Sides, rejected: Sides, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """(B,) the scalar that the published code minimises, over the batch: for comparison, without gradient in the samples by its
    own construction.

    Args:
        noise: one noise for both sides.
        sigma: s_t of the one level of both sides, to multiply (B, N, 3).
    """
    values = []
    for side in (chosen, rejected):
        moved = (side.sample + sigma * noise) - side.sample
        values.append((score_difference(side.teacher, side.assistant) * moved).flatten(1).mean(dim=1))
    return values[0] - values[1]


def first_wins(distance_first: Tensor, distance_second: Tensor, *, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """Which of two samples is preferred, by a distance to the ground truth: (B,) whether the first is, (B,) whether the pair
    counts. A pair whose distances differ by no more than ``margin`` is a tie and does not count; the published code gives ties
    to the second."""
    return distance_first < distance_second, (distance_first - distance_second).abs() > margin


def paired_noise(noise: Tensor, *, scale: float = 1.1, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Starting noise of the two samples of a pair.

    The published pair is (noise, 1.1 noise): one draw, and not two, so that the second sample starts farther out and mostly
    loses for that. With ``other``, a draw of its own, the pair is (noise, other).
    """
    return noise, (scale * noise if other is None else other)


def choose(first: Tensor, second: Tensor, first_preferred: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of two (B, N, 3), by (B,)."""
    place = first_preferred.reshape(-1, 1, 1)
    return torch.where(place, first, second), torch.where(place, second, first)
