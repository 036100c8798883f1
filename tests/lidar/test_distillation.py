"""Distillation-DPO's losses: the gradient the published one lacks, its direction, and pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyalign.modalities.lidar.completion import CompletionSettings, complete
from polyalign.modalities.lidar.diffusion import SolverSettings
from polyalign.modalities.lidar.distillation import (
    Sides,
    assistant_loss,
    choose,
    first_wins,
    official_value,
    paired_noise,
    student_loss,
)
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides(seed: int) -> Sides:
    return Sides(normal(2, 6, 3, seed=seed).requires_grad_(), normal(2, 6, 3, seed=seed + 1), normal(2, 6, 3, seed=seed + 2))


def test_the_published_loss_moves_nothing_and_ours_does() -> None:
    """Through a student's networks, not only its samples."""
    torch.manual_seed(0)
    student, encoder = MinkUNetDiff(NARROW).double().eval(), MinkGlobalEnc(NARROW).double().eval()
    settings = CompletionSettings(SolverSettings(1), copies=2, guidance=1.0)
    samples = [complete(student, encoder, 2 * normal(1, 20, 3), [seed], settings) for seed in (0, 1)]
    chosen, rejected = (
        Sides(sample, normal(1, 40, 3, seed=n), normal(1, 40, 3, seed=n + 5)) for n, sample in enumerate(samples)
    )
    weights = list(student.parameters())
    published = torch.autograd.grad(
        official_value(chosen, rejected, normal(1, 40, 3, seed=9), 0.5).sum(), weights, retain_graph=True
    )
    ours = torch.autograd.grad(student_loss(chosen, rejected).sum(), weights)
    largest = max(float(gradient.abs().max()) for gradient in ours)
    assert all(float(gradient.abs().max()) < 1e-10 * largest for gradient in published)
    assert all(float(gradient.abs().max()) > 0 for gradient in ours)


def test_descending_moves_towards_the_teacher_and_away_for_the_loser() -> None:
    """Data at 0 for the teacher: its noise is x / s. An assistant around 1 says (x - 1) / s. The preferred sample has to
    fall."""
    sigma, x = 0.5, torch.full((1, 4, 3), 1.2, dtype=torch.float64, requires_grad=True)
    y = torch.full((1, 4, 3), 1.2, dtype=torch.float64, requires_grad=True)
    chosen, rejected = (Sides(sample, sample / sigma, (sample - 1) / sigma) for sample in (x, y))
    to_chosen, to_rejected = torch.autograd.grad(student_loss(chosen, rejected).sum(), [x, y])
    assert bool((to_chosen > 0).all()) and bool((to_rejected < 0).all())


def test_weights_of_the_loser() -> None:
    chosen, rejected = sides(0), sides(10)
    torch.testing.assert_close(student_loss(chosen, rejected, loser_weight=0.0), student_loss(chosen, None))
    half, full = student_loss(chosen, rejected, loser_weight=0.5), student_loss(chosen, rejected)
    torch.testing.assert_close(half, (full + student_loss(chosen, None)) / 2)
    torch.testing.assert_close(student_loss(chosen, chosen), torch.zeros(2, dtype=torch.float64))
    assert full.shape == (2,)


def test_assistants_learn_their_own_side() -> None:
    predicted = [normal(1, 5, 3, seed=seed).requires_grad_() for seed in (0, 1)]
    first, second = assistant_loss(predicted[0], predicted[0].detach() + 2, predicted[1], predicted[1].detach())
    assert (first.item(), second.item()) == pytest.approx((4.0, 0.0))
    gradients = torch.autograd.grad(first + second, predicted)
    assert float(gradients[0].abs().max()) > 0 and float(gradients[1].abs().max()) == 0


def test_pairs() -> None:
    wins, counts = first_wins(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.05, 1.0, 1.0]), margin=0.1)
    assert wins.tolist() == [True, False, False] and counts.tolist() == [False, True, False]
    assert first_wins(torch.tensor([1.0]), torch.tensor([1.0]))[1].tolist() == [False]
    noise, other = normal(1, 3, 3), normal(1, 3, 3, seed=4)
    assert torch.equal(paired_noise(noise)[1], 1.1 * noise) and paired_noise(noise, other=other)[1] is other
    first, second = torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
    chosen, rejected = choose(first, second, torch.tensor([True, False]))
    assert chosen[:, 0, 0].tolist() == [0, 1] and rejected[:, 0, 0].tolist() == [1, 0]
