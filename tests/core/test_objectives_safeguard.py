"""The winner safeguard of Diffusion-SDPO."""

from __future__ import annotations

import pytest
import torch

from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import squared_error_scores
from polyalign.core.objectives import build
from polyalign.core.objectives.safeguard import WinnerSafeguard
from polyalign.core.objectives.table import DPO, SDPO
from polyalign.core.objectives.view import View

torch.set_num_threads(1)


def pair_batch(size: int, target=(1.0, 0.0)) -> Batch:
    return Batch(tuple(str(n) for n in range(size)), torch.tensor([target] * size))


def predictions(size: int = 3, conflict: float = 2.0):
    """(prediction, target) (G, 2, C, H, W) whose two residuals point the same way, the loser's ``conflict`` times as long."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(size, 1, 2, 3, 3, dtype=torch.float64, generator=generator)
    residual = torch.randn(size, 1, 2, 3, 3, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([1.0, conflict], dtype=torch.float64).reshape(1, 2, 1, 1, 1)
    return noise + residual * lengths, noise.expand(-1, 2, -1, -1, -1)


def outcome_of(spec, prediction, target, batch=None, weight=None):
    prediction = prediction.clone().requires_grad_(True)
    objective = build(spec)
    keep = "output_gradient" in objective.needs
    policy = squared_error_scores(prediction, target, steps=10, keep_residual=keep, weight=weight)
    reference = squared_error_scores(prediction.detach() * 1.01, target, steps=10, weight=weight)
    outcome = objective({"policy": policy, "reference": reference}, batch or pair_batch(len(target)), beta=1.5)
    (gradient,) = torch.autograd.grad(outcome.loss.mean(), prediction)
    return outcome, gradient


def test_scale_is_the_bound_of_the_publication():
    prediction, target = predictions(conflict=2.0)  # |g_w|^2 / <g_w, g_l> = 1/2
    for mu, expected in ((0.0, 0.5), (0.4, 0.3), (0.9, 0.05), (1.0, 0.0)):
        outcome, _ = outcome_of(SDPO(winner_safeguard=mu), prediction, target)
        torch.testing.assert_close(outcome.statistics["rejected_scale"], torch.full((3,), expected, dtype=torch.float64))


def test_no_conflict_or_a_weak_one_leaves_the_loser_alone():
    for conflict in (-1.0, 0.05):
        outcome, gradient = outcome_of(SDPO(winner_safeguard=0.9), *predictions(conflict=conflict))
        plain, expected = outcome_of(DPO(), *predictions(conflict=conflict))
        assert outcome.statistics["rejected_scale"].eq(1.0).all()
        assert torch.equal(gradient, expected) and torch.equal(outcome.loss, plain.loss)


def test_only_the_losers_gradient_is_scaled_and_no_value():
    prediction, target = predictions()
    outcome, gradient = outcome_of(SDPO(winner_safeguard=0.4), prediction, target)
    plain, expected = outcome_of(DPO(), prediction, target)
    assert torch.equal(outcome.loss, plain.loss)
    assert torch.equal(outcome.statistics["margin"], plain.statistics["margin"])
    torch.testing.assert_close(gradient[:, 0], expected[:, 0])
    torch.testing.assert_close(gradient[:, 1], 0.3 * expected[:, 1])


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_the_winners_descent_remains(scope):
    """In output space (-g_w + lambda g_l) . g_w <= -mu |g_w|^2, over the batch or in every group."""
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randn(6, 2, 1, 4, 4, dtype=torch.float64, generator=generator)
    prediction[:, 1] = 3 * prediction[:, 0] + prediction[:, 1]
    target, mu = torch.zeros_like(prediction), 0.6
    scores = squared_error_scores(prediction, target, steps=10, keep_residual=True)
    scale = WinnerSafeguard(mu, scope).scale(View(scores, None, pair_batch(6), {}, 1.0))
    winner, loser = prediction.flatten(2).unbind(1)
    change = ((-winner + scale.unsqueeze(1) * loser) * winner).sum(1)
    bound = -mu * winner.square().sum(1)
    if scope == "batch":
        assert len(set(scale.tolist())) == 1 and float(change.sum()) <= float(bound.sum()) + 1e-9
    else:
        assert len(set(scale.tolist())) > 1 and (change <= bound + 1e-9).all()


def test_group_scope_does_not_depend_on_the_batch_and_batch_scope_does():
    prediction, target = predictions(4)
    prediction[2:, 1] = target[2:, 1] - (prediction[2:, 1] - target[2:, 1])
    whole = {scope: outcome_of(SDPO(safeguard_scope=scope), prediction, target)[1] for scope in ("batch", "group")}
    halves = {
        scope: torch.cat(
            [outcome_of(SDPO(safeguard_scope=scope), prediction[p], target[p])[1] / 2 for p in (slice(0, 2), slice(2, 4))]
        )
        for scope in ("batch", "group")
    }
    torch.testing.assert_close(whole["group"], halves["group"])
    assert not torch.allclose(whole["batch"], halves["batch"])
    assert build(SDPO(safeguard_scope="group")).group_separable and not build(SDPO()).group_separable


def test_timestep_weights_enter_the_batch_scale():
    prediction, target = predictions(2)
    prediction[1, 1] = target[1, 1] - (prediction[1, 1] - target[1, 1])  # only the first group conflicts
    weight = torch.tensor([[4.0], [1.0]], dtype=torch.float64)
    outcome, _ = outcome_of(SDPO(winner_safeguard=0.5), prediction, target, weight=weight)
    winner, loser = (prediction - target).flatten(2).unbind(1)
    own = (weight**2 * winner.square()).sum()
    shared = (weight**2 * winner * loser).sum()
    assert shared > 0
    torch.testing.assert_close(outcome.statistics["rejected_scale"], (0.5 * own / shared).clamp(max=1.0).expand(2))


def test_the_winner_is_whom_the_target_prefers():
    prediction, target = predictions()
    plain, gradient = outcome_of(SDPO(winner_safeguard=0.4), prediction, target)
    swapped, mirrored = outcome_of(SDPO(winner_safeguard=0.4), prediction.flip(1), target, pair_batch(3, (0.0, 1.0)))
    torch.testing.assert_close(plain.loss, swapped.loss)
    torch.testing.assert_close(gradient, mirrored.flip(1))


def test_a_perfect_prediction_gives_no_nan():
    _, target = predictions()
    outcome, gradient = outcome_of(SDPO(), target, target)
    assert outcome.statistics["rejected_scale"].eq(1.0).all() and gradient.eq(0.0).all()


def test_it_says_what_it_needs():
    objective = build(DPO(winner_safeguard=0.5))
    assert objective.needs == {"value", "output_gradient"}
    scores = squared_error_scores(*predictions(), steps=10)
    with pytest.raises(UserError, match=r"'dpo' needs output_gradient .*residual.* provides only value"):
        objective({"policy": scores}, pair_batch(3), beta=1.0)
    with pytest.raises(UserError, match="between 0 and 1"):
        WinnerSafeguard(1.5)
    three = squared_error_scores(torch.randn(1, 3, 4), torch.randn(1, 3, 4), steps=10, keep_residual=True)
    with pytest.raises(UserError, match="compares two candidates"):
        WinnerSafeguard(0.5).scale(View(three, None, Batch(("a",), torch.tensor([[1.0, 0.0, 0.0]])), {}, 1.0))
