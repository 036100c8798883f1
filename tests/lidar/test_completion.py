"""The solver against diffusers', noise and loss by hand, and completion: seeds, guidance, refinement, real scans when there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.lidar import diffusion
from polyalign.modalities.lidar.completion import (
    CompletionSettings,
    GuidedDenoiser,
    complete,
    postprocess,
    prepare_scan,
    refine,
)
from polyalign.modalities.lidar.diffusion import SolverSettings, add_noise, denoising_loss, noise_schedule, solve
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNet, MinkUNetDiff
from polyalign.modalities.lidar.sparse import voxelise

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicted(x: Tensor, level: int) -> Tensor:
    """A smooth stand-in for a denoiser."""
    return torch.tanh(0.4 * x + level / 1000) + 0.1 * x


class TestSolver:
    @pytest.mark.parametrize("steps", [1, 2, 5, 8, 20, 50])
    @pytest.mark.parametrize("stochastic", [True, False])
    def test_against_diffusers(self, steps: int, stochastic: bool) -> None:
        theirs = DPMSolverMultistepScheduler(
            num_train_timesteps=1000,
            beta_start=3.5e-5,
            beta_end=0.007,
            beta_schedule="linear",
            algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
            solver_order=2,
        )
        theirs.set_timesteps(steps)
        settings = SolverSettings(steps, stochastic=stochastic)
        assert theirs.timesteps.tolist() == settings.levels()
        x = expected = normal(1, 30, 3)
        for step, level in enumerate(theirs.timesteps):
            noise = normal(1, 30, 3, seed=100 + step)
            expected = theirs.step(predicted(expected, int(level)), level, expected, variance_noise=noise, return_dict=False)[0]
        found = solve(x, predicted, lambda step: normal(1, 30, 3, seed=100 + step), noise_schedule(), settings)
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)

    def test_one_step_is_the_clean_prediction(self) -> None:
        """alpha_999 = 0.17155 and sigma_999 = 0.98518: an error of the noise comes out 5.74 times as large."""
        schedule = noise_schedule()
        alpha, sigma = float(schedule.signal[999]), float(schedule.noise[999])
        assert (round(alpha, 5), round(sigma, 5)) == (0.17155, 0.98518)
        x = normal(1, 5, 3)
        found = solve(x, predicted, lambda step: x, schedule, SolverSettings(1))
        torch.testing.assert_close(found, (x - sigma * predicted(x, 999)) / alpha)

    def test_ending_at_level_zero_leaves_its_noise(self) -> None:
        schedule, x = noise_schedule(), normal(1, 4000, 3)
        exact = (lambda x, level: x / float(schedule.noise[level]), lambda step: normal(1, 4000, 3, seed=step + 1))
        assert solve(x, *exact, schedule, SolverSettings(8)).abs().max() < 1e-12
        left = solve(x, *exact, schedule, SolverSettings(8, final="level_zero"))
        assert float(left.std()) == pytest.approx(0.0059, rel=0.05)

    def test_no_state_between_calls(self) -> None:
        arguments = (predicted, lambda step: normal(1, 9, 3, seed=step), noise_schedule(), SolverSettings(8))
        first = solve(normal(1, 9, 3), *arguments)
        solve(normal(1, 9, 3, seed=5), *arguments)
        assert torch.equal(first, solve(normal(1, 9, 3), *arguments))

    def test_a_later_start(self) -> None:
        assert SolverSettings(3, start=300).levels() == [299, 199, 100]
        with pytest.raises(UserError, match="from 1 to 300 steps, found 301"):
            SolverSettings(301, start=300)
        with pytest.raises(UserError, match="from 1 to 1000, found 1001"):
            SolverSettings(8, start=1001)


def test_noise_and_loss_by_hand() -> None:
    schedule = noise_schedule()
    points, noise, levels = normal(2, 4, 3), normal(2, 4, 3, seed=1), torch.tensor([0, 999])
    sigma = schedule.noise[levels].reshape(2, 1, 1)
    torch.testing.assert_close(add_noise(schedule, points, noise, levels, "local"), points + sigma * noise)
    alpha = schedule.signal[levels].reshape(2, 1, 1)
    torch.testing.assert_close(add_noise(schedule, points, noise, levels, "vanilla"), alpha * points + sigma * noise)
    flat = torch.full((1, 2, 3), 2.0)
    assert float(denoising_loss(flat, torch.zeros(1, 2, 3))) == 4 + 5 * (4 + 1)
    assert float(denoising_loss(flat, torch.zeros(1, 2, 3), regularisation=0)) == 4


@pytest.fixture
def networks() -> tuple[MinkUNetDiff, MinkGlobalEnc]:
    """Random, with weights large enough that a wrong condition shows."""
    torch.manual_seed(0)
    both = MinkUNetDiff(NARROW).double().eval(), MinkGlobalEnc(NARROW).double().eval()
    for network in both:
        for parameter in network.parameters():
            parameter.data *= 2
    return both


def scans(batch: int = 2, points: int = 25) -> Tensor:
    return 2 * normal(batch, points, 3, seed=9)


class TestCompletion:
    settings = CompletionSettings(SolverSettings(3), copies=4)

    def test_each_scan_by_itself(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        with torch.no_grad():
            both = complete(*networks, scans(), [1, 2], self.settings)
            assert both.shape == (2, 100, 3) and bool(both.isfinite().all())
            for number in (0, 1):
                alone = complete(*networks, scans()[number : number + 1], [number + 1], self.settings)
                torch.testing.assert_close(alone[0], both[number])
            assert not torch.equal(complete(*networks, scans(), [1, 3], self.settings)[1], both[1])

    def test_guidance_of_the_published_order(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        """The scan copied ten times and the zeros as many: encoded anew, branch by branch."""
        denoiser, encoder = networks
        points, copied = normal(2, 100, 3), scans().repeat(1, 10, 1)
        with torch.no_grad():
            found = GuidedDenoiser(denoiser, encoder, scans(), self.settings)(points, 700)
            branches = []
            for condition in (copied, torch.zeros_like(copied)):
                voxels, inverse = voxelise(points, 0.05)
                encoded = denoiser.condition(encoder(voxelise(condition, 0.05)[0]))
                branches.append(denoiser(voxels, encoded, torch.tensor([700, 700]))[inverse].reshape(2, 100, 3))
        given, absent = branches
        assert not torch.allclose(given, absent)
        torch.testing.assert_close(found, absent + 3.5 * (given - absent), rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            plain = GuidedDenoiser(denoiser, encoder, scans(), replace(self.settings, guidance=1.0))(points, 700)
        torch.testing.assert_close(plain, given, rtol=1e-9, atol=1e-9)

    def test_the_encoder_runs_once_a_scan(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        calls = []
        networks[1].register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            complete(*networks, scans(), [1, 2], self.settings)
            assert len(calls) == 2  # the scans, and their absence
            complete(*networks, scans(), [1, 2], replace(self.settings, coarser=((600, 0.2), (900, 0.4))))
        assert len(calls) == 2 + 6

    def test_coarser_voxels_at_high_noise(self) -> None:
        settings = CompletionSettings(coarser=((600, 0.2), (900, 0.4)))
        assert [settings.voxel_at(level) for level in (999, 900, 899, 600, 599, 0)] == [0.4, 0.4, 0.2, 0.2, 0.05, 0.05]

    def test_vanilla_starts_at_the_noised_scan(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        settings = CompletionSettings(SolverSettings(2, start=2), formulation="vanilla", copies=3)
        with torch.no_grad():
            found = complete(*networks, scans(), [1, 2], settings)
        assert float((found - scans().repeat(1, 3, 1)).abs().max()) < 0.3

    def test_gradient_reaches_the_network(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        complete(*networks, scans(), [1, 2], replace(self.settings, solver=SolverSettings(1))).pow(2).sum().backward()
        assert all(parameter.grad is not None for parameter in networks[0].parameters())

    def test_seeds_and_scans(self, networks: tuple[MinkUNetDiff, MinkGlobalEnc]) -> None:
        with pytest.raises(UserError, match="1 seeds for 2 scans"):
            complete(*networks, scans(), [1], self.settings)
        with pytest.raises(UserError, match="the cloud is empty"):
            complete(*networks, scans(points=0), [1, 2], self.settings)

    def test_refined_points_lie_beside_each_other(self) -> None:
        torch.manual_seed(0)
        found = refine(MinkUNet(NARROW).double().eval(), scans()).detach()
        assert found.shape == (2, 150, 3)
        assert float((found.reshape(2, 25, 6, 3) - scans().unsqueeze(2)).abs().max()) < 1

    def test_postprocess_by_hand(self) -> None:
        scan = np.array([[10.0, 0, -1], [10, 0, 0], [10, 0, 1]])  # heights: mean 0, deviation 1
        points = np.array([[49.0, 0, 0.9], [51, 0, 0], [1, 0, 1.0], [1, 0, -1.9], [1, 0, -2.1]])
        assert postprocess(points, scan)[:, 0].tolist() == [49, 1]


class TestScans:
    def test_prepared(self) -> None:
        points = np.random.default_rng(0).uniform(-60, 60, (4000, 4)) * [1, 1, 0.05, 0.01]
        found = prepare_scan(points, 500)
        away = np.linalg.norm(found, axis=1)
        assert found.shape == (500, 3) and away.min() > 3.5 and away.max() < 50 and len(np.unique(found, axis=0)) == 500

    def test_refused(self) -> None:
        far = np.full((10, 3), 80.0)
        with pytest.raises(UserError, match="0 of 10 points are within range, and 5 are needed"):
            prepare_scan(far, 5)
        with pytest.raises(UserError, match="NaN or infinite"):
            prepare_scan(np.full((10, 3), np.nan), 5)
        with pytest.raises(UserError, match=r"found \(10, 2\)"):
            prepare_scan(np.zeros((10, 2)), 5)


def test_schedule_is_the_published_one() -> None:
    """LiDiff's alphas_cumprod, from its own tables."""
    found = noise_schedule().signal[[0, 1, 10, 124, 250, 499, 624, 999]] ** 2
    published = [0.9999650, 0.9999231, 0.9992318, 0.9432482, 0.7963901, 0.4113559, 0.2507157, 0.0294300]
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert diffusion.LEVELS == 1000
