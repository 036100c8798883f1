"""The denoising likelihood: how well a model undoes noise, candidate by candidate, under noise that candidates share.

log p(x | c) is replaced by its evidence bound: minus the squared error of the network at sampled noise levels (Diffusion-DPO,
arXiv 2311.12908, Eq. 13-14). Noise and level are drawn once for a group and used for all its candidates and for policy and
reference alike, so that their differences carry no sampling noise of their own.

Letters: G groups, K candidates, U noise levels drawn for a group, N = G K U rows of one forward pass in that order, and any
trailing dimensions for one sample (C, H, W for latents of pictures; points, frames).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import NoiseSchedule, PredictionType, Weighting, zero_terminal_snr
from polyalign.core.randomness import rng
from polyalign.core.scores import Scores, Unit

__all__ = [
    "Draws",
    "NoiseSchedule",
    "TimestepSampling",
    "denoising_scores",
    "draw",
    "rows_of",
    "squared_error_scores",
    "zero_terminal_snr",
]


@dataclass(frozen=True)
class TimestepSampling:
    """From which noise levels a draw is taken.

    ``uniform`` over ``low <= i < high`` (high None: all), or over ``choices`` where given (SDXL-Turbo: 249, 499, 749, 999; the
    SDXL refiner: high 200). ``logit_normal`` (SD3, 2403.03206): i = low + floor((high - low) sigmoid(mean + std n)).
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    low: int = 0
    high: int | None = None
    choices: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def index(self, steps: int, generator: torch.Generator) -> int:
        """One level.

        Raises:
            UserError: an empty range, one outside 0..steps, or choices together with logit_normal.
        """
        high = steps if self.high is None else self.high
        if not 0 <= self.low < high <= steps or any(not 0 <= choice < steps for choice in self.choices):
            raise UserError(
                f"timesteps from {self.low} to {high}{f' or {self.choices}' if self.choices else ''}: "
                f"the schedule has levels 0 to {steps - 1}, and the range must hold at least one"
            )
        if self.kind == "logit_normal":
            if self.choices:
                raise UserError("timestep choices are drawn uniformly; logit_normal needs a range (low, high) instead")
            place = torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator, dtype=torch.float64))
            return min(self.low + int(place * (high - self.low)), high - 1)
        if self.choices:
            return self.choices[int(torch.randint(len(self.choices), (), generator=generator))]
        return int(torch.randint(self.low, high, (), generator=generator))


@dataclass(frozen=True)
class Draws:
    """Noise levels (G, U), as indices into the schedule, and noise (G, U, ...), one for all candidates of a group."""

    timesteps: Tensor
    noise: Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.timesteps[part], self.noise[part])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.timesteps.to(device), self.noise.to(device))


def draw(
    group_ids: Sequence[str],
    shape: Sequence[int],
    *,
    steps: int,
    seed: int,
    index: int | str,
    units: int = 1,
    sampling: TimestepSampling | None = None,
) -> Draws:
    """Draws for groups of samples of ``shape``, from a schedule of ``steps`` levels.

    Each is keyed by (seed, group id, ``index``, unit), where ``index`` is the training step or the place in a bank of draws, so
    it is the same in any batch, on any rank, and in a resumed run. Noise is float32, on the CPU.
    """
    sampling = sampling or TimestepSampling()
    generators = [[rng(seed, "draw", group_id, index, unit) for unit in range(units)] for group_id in group_ids]
    timesteps = torch.tensor([[sampling.index(steps, generator) for generator in row] for row in generators])
    noise = [torch.stack([torch.randn(tuple(shape), generator=generator) for generator in row]) for row in generators]
    return Draws(timesteps, torch.stack(noise))


def rows_of(tensor: Tensor, candidates: int, units: int, *, per_candidate: bool) -> Tensor:
    """Repeat what belongs to a group (G, ...) or to a candidate (G, K, ...) for the rows (G K U, ...) of one forward pass."""
    if not per_candidate:
        tensor = tensor.unsqueeze(1).expand(-1, candidates, *tensor.shape[1:])
    return tensor.unsqueeze(2).expand(-1, -1, units, *tensor.shape[2:]).flatten(0, 2)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    counted = mask.sum(-1)
    if bool((counted == 0).any()):
        raise ValueError("the mask leaves a candidate without a single element to take the mean over")
    return values.sum(-1) / counted


def squared_error_scores(
    prediction: Tensor,
    target: Tensor,
    *,
    steps: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    keep_residual: bool = False,
    per_unit: bool = False,
) -> Scores:
    """Scores whose values (G, K, U) are minus the weighted *mean* squared error, -w mean((prediction - target)^2).

    Args:
        prediction: (G, K, ...), or (G, K, U, ...) with ``per_unit``; any dtype, reduced in float32 or wider, with gradient.
        target: the same shape, or one that broadcasts to it.
        steps: T of the schedule, for beta in nats.
        weight: (G, U), or whatever broadcasts to (G, K, U); detached. It is also put into ``notes["weight"]``.
        mask: true where an element counts; broadcasts to the prediction. The mean is over counted elements.
        keep_residual: keep prediction - target (G, K, U, D), unweighted, for objectives that need the output's gradient.

    Raises:
        ValueError: a mask that leaves a candidate with no element.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    residual = prediction.to(dtype) - target.to(dtype)
    flat = (lambda tensor: tensor.flatten(3)) if per_unit else (lambda tensor: tensor.flatten(2).unsqueeze(2))
    if mask is None:
        residual = flat(residual)
        error = residual.square().mean(-1)
    else:
        counted = mask.to(residual.device, dtype).expand_as(residual)
        residual = flat(residual * counted)
        error = _masked_mean(residual.square(), flat(counted))
    notes = {}
    if weight is not None:
        weight = weight.detach().to(error.device, error.dtype)
        weight = weight.unsqueeze(1) if weight.ndim == 2 else weight
        notes["weight"] = weight.expand_as(error)[:, 0]
        error = error * weight
    return Scores(
        values=-error,
        mask=torch.ones_like(error, dtype=torch.bool),
        unit=Unit("timestep", elements=residual.shape[-1], steps=steps),
        residual=residual if keep_residual else None,
        notes=notes,
    )


def denoising_scores(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    draws: Draws,
    schedule: NoiseSchedule,
    *,
    prediction_type: PredictionType = "epsilon",
    weighting: Weighting = "constant",
    gamma: float = 5.0,
    mask: Tensor | None = None,
    keep_residual: bool = False,
) -> Scores:
    """Score candidates ``clean`` (G, K, ...) by one forward pass over all of them at all drawn levels.

    ``predict(noisy (N, ...), timesteps (N,)) -> (N, ...)`` is the network with its conditions bound; ``rows_of`` brings a
    condition into the order of its rows. ``timesteps`` are what the network is told (``schedule.timestep``). Values are as in
    ``squared_error_scores``, against the target of ``prediction_type``; ``mask`` broadcasts to (G, K, U, ...);
    ``notes["timestep"]`` is (G, U), and, with ``keep_residual``, ``notes["clean_scale"]`` (G, U) makes of a residual the error
    of the clean sample, sign aside (:meth:`NoiseSchedule.clean_scale`).
    """
    groups, candidates = clean.shape[:2]
    units = draws.timesteps.shape[1]
    draws = draws.to(clean.device)
    levels = draws.timesteps.unsqueeze(1).expand(groups, candidates, units)
    spread = clean.unsqueeze(2).expand(groups, candidates, units, *clean.shape[2:])
    noise = draws.noise.to(clean.dtype).unsqueeze(1).expand_as(spread)
    noisy = schedule.add_noise(spread, noise, levels)
    told = schedule.timestep.to(clean.device)[levels]
    prediction = predict(noisy.flatten(0, 2), told.flatten()).unflatten(0, (groups, candidates, units))
    weight = None
    if weighting != "constant":
        weight = schedule.weights(weighting, prediction_type, gamma).to(clean.device)[draws.timesteps]
    scores = squared_error_scores(
        prediction,
        schedule.target(spread, noise, levels, prediction_type),
        steps=schedule.steps,
        weight=weight,
        mask=mask,
        keep_residual=keep_residual,
        per_unit=True,
    )
    notes = {**scores.notes, "timestep": draws.timesteps}
    if keep_residual:
        notes["clean_scale"] = schedule.clean_scale(prediction_type).to(clean.device)[draws.timesteps]
    return replace(scores, notes=notes)
