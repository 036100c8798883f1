"""Point diffusion: what is noised, what the denoiser is trained on, and a solver that keeps nothing from scan to scan.

Letters: B clouds, N points, T = 1000 noise levels; a_t, s_t signal and noise coefficients, lambda_t = log(a_t / s_t).

Two formulations. ``local`` (LiDiff, CVPR 2024, and its descendants): each point is moved from its start, x_t = x_0 + s_t noise,
without a_t; sampling starts from copies of the scan's points plus noise of one metre, and the solver works on the offsets from
there as if they were x_t = a_t x_0 + s_t noise, which training did not do. ``vanilla`` (LiDPM, IV 2025): the usual
x_t = a_t x_0 + s_t noise of whole coordinates, starting from the copies noised to a level well below T.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import NoiseSchedule

Formulation = Literal["local", "vanilla"]
BETA_START, BETA_END, LEVELS = 3.5e-5, 0.007, 1000
"""Of all the projects named above."""
FEW_STEPS = 15


def noise_schedule(levels: int = LEVELS) -> NoiseSchedule:
    """LiDiff's linear betas; a_999^2 = 0.0294, so the last level still holds some signal. The tables are those of the published
    code, which makes them in single precision and multiplies one by one (torch's cumprod does not); held in double here."""
    betas = torch.linspace(BETA_START, BETA_END, levels, dtype=torch.float32)
    abar = torch.from_numpy(np.cumprod((1 - betas).numpy()))
    single = NoiseSchedule.from_alphas_cumprod(abar)
    return replace(single, signal=single.signal.double(), noise=single.noise.double())


def add_noise(schedule: NoiseSchedule, points: Tensor, noise: Tensor, levels: Tensor, formulation: Formulation) -> Tensor:
    """x_t (B, N, 3) of points and noise at ``levels`` (B,)."""
    signal, sigma = schedule.coefficients(levels, points)
    return (points if formulation == "local" else signal * points) + sigma * noise


def denoising_loss(predicted: Tensor, noise: Tensor, *, regularisation: float = 5.0) -> Tensor:
    """LiDiff's loss: mean squared error of the noise + r (mean(predicted)^2 + (std(predicted) - 1)^2), over the whole tensor.
    LiDPM is without the second part (r = 0)."""
    error = (predicted - noise).pow(2).mean()
    if regularisation == 0:
        return error
    return error + regularisation * (predicted.mean().pow(2) + (predicted.std() - 1).pow(2))


@dataclass(frozen=True)
class SolverSettings:
    """DPM-Solver++ (Lu et al., arXiv 2211.01095), second order, multistep.

    Args:
        steps: calls of the denoiser, 1 to ``start``.
        start: the first level is ``start`` - 1. LiDPM starts at 300.
        stochastic: the SDE variant, as published; otherwise the ODE's.
        final: ``clean`` ends without noise, as diffusers does now; ``level_zero`` ends at level 0, which still has a little, as
            diffusers 0.18 did, with which the published numbers were made.
    """

    steps: int = 8
    start: int = LEVELS
    stochastic: bool = True
    final: Literal["clean", "level_zero"] = "clean"

    def __post_init__(self) -> None:
        if not 1 <= self.start <= LEVELS:
            raise UserError(f"sampling starts at a level from 1 to {LEVELS}, found {self.start}")
        if not 1 <= self.steps <= self.start:
            raise UserError(f"sampling takes from 1 to {self.start} steps, found {self.steps}")

    def levels(self) -> list[int]:
        """The levels the denoiser sees, from noisy to clean, equally spaced."""
        return np.linspace(0, self.start - 1, self.steps + 1).round()[::-1][:-1].astype(int).tolist()


@dataclass(frozen=True)
class _Place:
    """A level as the solver sees it; past the last one, without noise, ``lam`` is infinite."""

    signal: float
    sigma: float
    lam: float


def _place(schedule: NoiseSchedule, level: int | None) -> _Place:
    if level is None:
        return _Place(1.0, 0.0, math.inf)
    signal, sigma = float(schedule.signal[level]), float(schedule.noise[level])
    return _Place(signal, sigma, math.log(signal / sigma))


def solve(
    x: Tensor,
    predict: Callable[[Tensor, int], Tensor],
    noises: Callable[[int], Tensor],
    schedule: NoiseSchedule,
    settings: SolverSettings,
) -> Tensor:
    """From x at the first level to x_0. All state is in this call: the published code makes its scheduler once and never resets
    it, so that from the second scan on the first step uses the last prediction of the scan before.

    Args:
        x: (B, N, 3) at level ``start`` - 1.
        predict: noise (B, N, 3) of x at a level.
        noises: fresh noise (B, N, 3) of step 0, 1, ...; asked for only where the step adds some.
    """
    return deque(trajectory(x, predict, noises, schedule, settings), maxlen=1).pop()


def trajectory(
    x: Tensor,
    predict: Callable[[Tensor, int], Tensor],
    noises: Callable[[int], Tensor],
    schedule: NoiseSchedule,
    settings: SolverSettings,
) -> Iterator[Tensor]:
    """x after every step, see :func:`solve`. Whoever trains on the last step alone runs the others without gradient."""
    levels = settings.levels()
    end = None if settings.final == "clean" else 0
    places = [_place(schedule, level) for level in (*levels, end)]
    before: tuple[Tensor, _Place] | None = None
    for step, level in enumerate(levels):
        here, there = places[step], places[step + 1]
        clean = (x - here.sigma * predict(x, level)) / here.signal
        last = step == len(levels) - 1
        first_order = before is None or (last and (end is None or settings.steps < FEW_STEPS))
        correction = None if first_order or before is None else _slope(clean, here, there, *before)
        noise = noises(step) if settings.stochastic and there.sigma > 0 else None
        x = _step(x, clean, correction, noise, here, there, settings.stochastic)
        before = (clean, here)
        yield x


def _slope(clean: Tensor, here: _Place, there: _Place, clean_before: Tensor, before: _Place) -> Tensor:
    """Half the change of the clean prediction over the coming step, extrapolated from the last one."""
    return 0.5 * (there.lam - here.lam) / (here.lam - before.lam) * (clean - clean_before)


def _step(
    x: Tensor, clean: Tensor, correction: Tensor | None, noise: Tensor | None, here: _Place, there: _Place, stochastic: bool
) -> Tensor:
    """One step of the SDE or the ODE, exact in what is linear; tested against diffusers' DPMSolverMultistepScheduler."""
    shrink = math.exp(here.lam - there.lam)  # exp(-h)
    decay = shrink**2 if stochastic else shrink
    target = clean if correction is None else clean + correction
    # Without noise at the end both factors of the first product vanish, and the prediction is the answer.
    kept = there.sigma / here.sigma * (shrink if stochastic else 1.0)
    moved = kept * x + there.signal * (1 - decay) * target
    return moved if noise is None else moved + there.sigma * math.sqrt(1 - decay) * noise
