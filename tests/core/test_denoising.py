"""Schedules, draws and the denoising likelihood, against diffusers' schedulers and against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import (
    Draws,
    NoiseSchedule,
    TimestepSampling,
    denoising_scores,
    draw,
    rows_of,
    squared_error_scores,
    zero_terminal_snr,
)
from polyalign.core.likelihood.schedules import betas_of_config

diffusers = pytest.importorskip("diffusers")


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def sd() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler_config(SD)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
def test_betas_are_those_of_diffusers(kind: str, zero: bool) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero)
    assert torch.equal(betas_of_config(scheduler.config), scheduler.betas)


def test_unknown_beta_schedule_is_named() -> None:
    with pytest.raises(UserError, match="beta_schedule 'sigmoid'.*squaredcos_cap_v2"):
        betas_of_config({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("zero", [False, True])
def test_noising_and_velocity_are_those_of_diffusers(zero: bool) -> None:
    scheduler = diffusers.DDPMScheduler(**SD, rescale_betas_zero_snr=zero)
    schedule = NoiseSchedule.from_scheduler_config(scheduler.config)
    clean, noise = normal(4, 4, 3, 3, dtype=torch.float32), normal(4, 4, 3, 3, seed=1, dtype=torch.float32)
    levels = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(schedule.add_noise(clean, noise, levels), scheduler.add_noise(clean, noise, levels))
    torch.testing.assert_close(
        schedule.target(clean, noise, levels, "v_prediction"), scheduler.get_velocity(clean, noise, levels)
    )
    assert torch.equal(schedule.target(clean, noise, levels, "epsilon"), noise)
    assert torch.equal(schedule.target(clean, noise, levels, "sample"), clean)


def test_rectified_flow_is_that_of_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    torch.testing.assert_close(schedule.timestep.flip(0), scheduler.timesteps)
    clean, noise = normal(2, 4, 3, 3, dtype=torch.float32), normal(2, 4, 3, 3, seed=1, dtype=torch.float32)
    levels = torch.tensor([200, 900])
    expected = scheduler.scale_noise(clean, schedule.timestep[levels], noise)
    torch.testing.assert_close(schedule.add_noise(clean, noise, levels), expected)
    assert torch.equal(schedule.target(clean, noise, levels, "flow"), noise - clean)
    with pytest.raises(UserError, match="'epsilon' with a rectified_flow schedule; allowed: flow"):
        schedule.target(clean, noise, levels, "epsilon")


def test_zero_terminal_snr_ends_without_signal_and_starts_unchanged() -> None:
    betas = betas_of_config(SD)
    before, after = (1 - betas).cumprod(0), (1 - zero_terminal_snr(betas)).cumprod(0)
    assert float(after[-1]) == 0.0
    torch.testing.assert_close(after[0], before[0])


def test_errors_of_all_prediction_types_are_one_error(sd: NoiseSchedule) -> None:
    """The same guess of x0, said as noise, as v and as x0, has the same error once weighted by snr (= on epsilon)."""
    clean, noise, guess = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1), normal(1, 4, 3, 3, seed=2)
    for level in (0, 37, 640, 999):
        index = torch.tensor([level])
        a, s = sd.coefficients(index, clean)
        implied = (sd.add_noise(clean, noise, index) - a * guess) / s
        said = {"epsilon": implied, "sample": guess, "v_prediction": a * implied - s * guess}
        errors = [
            float((said[kind] - sd.target(clean, noise, index, kind)).square().mean() * sd.weights("snr", kind)[level])
            for kind in said
        ]
        assert errors == pytest.approx([errors[0]] * 3, rel=1e-4)  # the tables are float32


def test_elbo_weights_are_the_published_ones(sd: NoiseSchedule) -> None:
    """On epsilon: beta^2 / (stilde^2 alpha (1 - abar)), stilde^2 the posterior variance (Ho et al. 2020), without its half."""
    betas = betas_of_config(SD).double()
    abar = sd.signal.double() ** 2
    previous = abar.roll(1)
    posterior = betas * (1 - previous) / (1 - abar)
    published = betas**2 / (posterior * (1 - betas) * (1 - abar))
    torch.testing.assert_close(sd.weights("elbo", "epsilon")[2:], published[2:], rtol=2e-3, atol=0)
    as_v = sd.weights("elbo", "v_prediction")
    torch.testing.assert_close(as_v, sd.weights("elbo", "epsilon") * abar, rtol=1e-4, atol=1e-9)


def test_min_snr_weights(sd: NoiseSchedule) -> None:
    snr = sd.snr()
    torch.testing.assert_close(sd.weights("min_snr", "epsilon", 5.0), snr.clamp(max=5.0) / snr)
    torch.testing.assert_close(sd.weights("min_snr", "v_prediction", 1.0), snr.clamp(max=1.0) / (snr + 1), rtol=1e-4, atol=0)
    assert torch.equal(sd.weights("constant", "epsilon"), torch.ones(1000, dtype=torch.float64))


def test_infinite_elbo_weight_is_refused() -> None:
    schedule = NoiseSchedule.from_scheduler_config({**SD, "rescale_betas_zero_snr": True})
    with pytest.raises(UserError, match="infinite at noise level 999"):
        schedule.weights("elbo", "epsilon")
    assert bool(schedule.weights("elbo", "v_prediction").isfinite().all())
    assert float(schedule.weights("min_snr", "epsilon")[-1]) == 1.0


def test_draws_do_not_depend_on_the_batch() -> None:
    together = draw(["a", "b", "c"], (4, 2, 2), steps=1000, seed=0, index=7, units=2)
    alone = draw(["b"], (4, 2, 2), steps=1000, seed=0, index=7)
    assert together.timesteps.shape == (3, 2) and together.noise.shape == (3, 2, 4, 2, 2)
    assert torch.equal(together.timesteps[1, :1], alone.timesteps[0])
    assert torch.equal(together.noise[1, :1], alone.noise[0])
    assert torch.equal(together[1:2].noise, together.noise[1:2])
    for other in (draw(["b"], (4, 2, 2), steps=1000, seed=0, index=8), draw(["b"], (4, 2, 2), steps=1000, seed=1, index=7)):
        assert not torch.equal(other.noise, alone.noise)


def test_timesteps_come_from_the_asked_range() -> None:
    def levels(sampling: TimestepSampling) -> list[int]:
        names = [str(place) for place in range(400)]
        return draw(names, (1,), steps=1000, seed=0, index=0, sampling=sampling).timesteps.flatten().tolist()

    assert set(levels(TimestepSampling(choices=(249, 499, 749, 999)))) == {249, 499, 749, 999}
    refiner = levels(TimestepSampling(high=200))
    assert min(refiner) >= 0 and max(refiner) < 200 and len(set(refiner)) > 100
    bell = levels(TimestepSampling("logit_normal"))
    assert 0 <= min(bell) and max(bell) < 1000 and 450 < sum(bell) / len(bell) < 550
    assert sum(250 <= level < 750 for level in bell) > 250  # uniform would give 200
    with pytest.raises(UserError, match="levels 0 to 999"):
        levels(TimestepSampling(low=500, high=1200))


def test_squared_error_scores_are_minus_the_mean_with_gradient() -> None:
    prediction, target = normal(2, 2, 4, 3, 3).requires_grad_(), normal(2, 2, 4, 3, 3, seed=1)
    scores = squared_error_scores(prediction, target, steps=1000, keep_residual=True)
    torch.testing.assert_close(scores.values[..., 0], -(prediction - target).square().mean((2, 3, 4)))
    assert scores.values.dtype == torch.float64 and scores.unit.elements == 36 and scores.unit.steps == 1000
    assert scores.residual is not None and scores.residual.shape == (2, 2, 1, 36)
    assert "output_gradient" in scores.provides
    scores.values.sum().backward()
    torch.testing.assert_close(prediction.grad, -2 * (prediction - target).detach() / 36)


def test_low_precision_is_reduced_in_float32() -> None:
    prediction = normal(1, 2, 64, 64).half()
    scores = squared_error_scores(prediction, torch.zeros_like(prediction), steps=1000)
    assert scores.values.dtype == torch.float32
    exact = -prediction.double().square().flatten(2).mean(-1)
    torch.testing.assert_close(scores.values[..., 0].double(), exact, rtol=1e-6, atol=0)


def test_mask_and_weight() -> None:
    prediction, target = normal(2, 2, 3, 4, 5), normal(2, 2, 3, 4, 5, seed=1)  # U = 3 levels of samples of 4 by 5
    mask = torch.ones(2, 2, 3, 4, 5)
    mask[..., 3:] = 0
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 1.0]])
    scores = squared_error_scores(prediction, target, steps=10, weight=weight, mask=mask, per_unit=True)
    expected = (prediction - target)[..., :3].square().mean((-1, -2)) * weight[:, None]
    torch.testing.assert_close(scores.values, -expected)
    torch.testing.assert_close(scores.notes["weight"], weight.double())
    with pytest.raises(ValueError, match="without a single element"):
        squared_error_scores(prediction, target, steps=10, mask=mask * 0, per_unit=True)


@pytest.mark.parametrize("shape", [(4, 2, 2), (5, 3), (8,)])
def test_candidates_of_a_group_share_noise_and_level(sd: NoiseSchedule, shape: tuple[int, ...]) -> None:
    """Any shape of sample; equal candidates score equally, and the values are what one would write down."""
    clean = normal(2, 1, *shape, dtype=torch.float32).expand(2, 3, *shape)
    draws = draw(["a", "b"], shape, steps=1000, seed=0, index=0, units=2)
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((noisy, timesteps))
        return 0.3 * noisy

    scores = denoising_scores(predict, clean, draws, sd, prediction_type="epsilon")
    assert len(seen) == 1 and seen[0][0].shape == (12, *shape)
    assert torch.equal(scores.values[:, 0], scores.values[:, 1]) and torch.equal(scores.values[:, 0], scores.values[:, 2])
    assert torch.equal(scores.notes["timestep"], draws.timesteps)
    noisy = sd.add_noise(clean[:, 0], draws.noise[:, 1], draws.timesteps[:, 1])
    by_hand = -(0.3 * noisy - draws.noise[:, 1]).square().flatten(1).mean(1)
    torch.testing.assert_close(scores.values[:, 0, 1], by_hand)


def test_rows_are_in_the_order_of_the_forward_pass() -> None:
    levels = torch.arange(12).reshape(2, 3, 2)  # G K U
    group, candidate = torch.arange(2), torch.arange(6).reshape(2, 3)
    assert torch.equal(rows_of(group, 3, 2, per_candidate=False), group[:, None, None].expand_as(levels).flatten())
    assert torch.equal(rows_of(candidate, 3, 2, per_candidate=True), candidate[:, :, None].expand_as(levels).flatten())
    assert rows_of(normal(2, 5, 7), 3, 2, per_candidate=False).shape == (12, 5, 7)


def test_a_perfect_network_scores_zero_and_weights_are_applied(sd: NoiseSchedule) -> None:
    clean = normal(1, 2, 4, 2, 2, dtype=torch.float32)
    draws = Draws(torch.tensor([[700]]), normal(1, 1, 4, 2, 2, seed=1, dtype=torch.float32))
    noise = draws.noise[:, 0].expand(2, 4, 2, 2)
    perfect = denoising_scores(lambda noisy, t: noise, clean, draws, sd)
    assert torch.equal(perfect.values, torch.zeros(1, 2, 1))
    plain = denoising_scores(lambda noisy, t: noise + 1, clean, draws, sd)
    weighted = denoising_scores(lambda noisy, t: noise + 1, clean, draws, sd, weighting="min_snr", gamma=0.01)
    factor = float(sd.weights("min_snr", "epsilon", 0.01)[700])
    torch.testing.assert_close(weighted.values, plain.values * factor)
    assert math.isclose(float(plain.values[0, 0, 0]), -1.0, rel_tol=1e-5)
