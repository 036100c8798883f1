"""Sampling: one small pipeline for all families, every clip from its own seed.

A clip's noise comes from ``torch.Generator("cpu").manual_seed(seed)`` alone, that of a stochastic solver's steps too. Clips of
one batch have the same number of steps, length and padded text, and batches are filled up to one size: a clip's samples then
do not depend on which others were asked for. Between batch sizes, and between machines, matrix kernels may differ in the last
bits.

Letters: N clips of a batch, C latent channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import FLOW
from polyalign.datasets.audio.waves import Wave
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.audio.parts import Parts, Told
from polyalign.modalities.audio.settings import DTYPES, AudioModelSettings, Solver


@dataclass(frozen=True)
class Job:
    """One clip to make: what the denoiser is told with (``told``) and in the place of the prompt (``empty``, None without
    guidance), each one row."""

    place: int
    seed: int
    told: Told
    empty: Told | None
    steps: int
    seconds: float
    guidance: float

    @property
    def tokens(self) -> int:
        """Text tokens of the longer of both."""
        return max(told.states.shape[1] for told in (self.told, self.empty) if told is not None)


def stack(rows: Sequence[Told]) -> Told:
    """Rows in one batch, padded to the longest with zeros that the mask leaves out."""
    length = max(row.states.shape[1] for row in rows)
    states = torch.cat([_pad(row.states, length) for row in rows])
    mask = torch.cat([_pad(row.mask.unsqueeze(-1), length).squeeze(-1) for row in rows])
    extra = None if rows[0].extra is None else torch.cat([row.extra for row in rows if row.extra is not None])
    return Told(states, mask, extra)


def _pad(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))


def solver_of(parts: Parts, solver: Solver | None) -> Any:
    """A diffusers scheduler on the model's own noise schedule.

    Raises:
        UserError: a solver that the model's kind does not have.
    """
    config = {key: value for key, value in parts.scheduler_config.items() if not key.startswith("_")}
    if parts.schedule.kind == FLOW:
        if solver not in (None, "euler"):
            raise UserError(f"solver is {solver}, and this is a flow model: allowed is euler")
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if solver == "ddpm":
        return DDPMScheduler.from_config(config, clip_sample=False)
    if solver == "dpmpp":
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    if solver in (None, "ddim"):
        return DDIMScheduler.from_config(config, clip_sample=False)
    raise UserError(f"solver is {solver}, which is for flow models; allowed: ddim, dpmpp, ddpm")


def answer(model: Model, settings: AudioModelSettings, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    """What the denoiser predicts, (N, C, ...) float32.

    Latents and states are kept in float32, and half-precision layers refuse those: they are brought to the type of the weights
    here, or to that of mixed precision where full training keeps float32 masters. Timesteps stay as they are, since bfloat16
    has no number between 512 and 516.
    """
    dtype, asked = settings.weights_dtype, DTYPES[settings.dtype]
    extra = None if told.extra is None else told.extra.to(dtype)
    mixed = contextlib.nullcontext() if dtype == asked else torch.autocast(noisy.device.type, dtype=asked)
    with mixed:
        told = Told(told.states.to(dtype), told.mask, extra)
        return parts_of(model).predict(model.network, noisy.to(dtype), timesteps, told).float()


@torch.no_grad()
def sample(
    model: Model, settings: AudioModelSettings, jobs: Sequence[Job], *, progress: Callable[[int, int], None] | None = None
) -> list[Wave]:
    """One clip for each job, in their order; ``progress(done, all)`` each batch."""
    network = model.network
    was_training = network.training
    network.eval()
    clips: dict[int, Wave] = {}
    try:
        for batch in batches(jobs, settings.sample_batch):
            clips |= _batch(model, settings, batch)
            if progress is not None:
                progress(len(clips), len(jobs))
    finally:
        network.train(was_training)
    return [clips[job.place] for job in jobs]


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs of one number of steps, length, guidance and padded text together, at most ``size``."""
    groups: dict[tuple[float, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.steps, job.seconds, job.guidance, job.tokens), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _batch(model: Model, settings: AudioModelSettings, jobs: list[Job]) -> Mapping[int, Wave]:
    parts, wanted = parts_of(model), len(jobs)
    if settings.pad_batches:
        jobs = jobs + [jobs[-1]] * (settings.sample_batch - wanted)
    latents = _denoise(model, settings, jobs)
    if not settings.pad_batches:
        latents = latents[:wanted]
    waves: list[Wave] = []
    for part in latents.float().split(settings.codec_batch):
        waves += parts.codec.decode(part)
    length = round(jobs[0].seconds * parts.codec.rate)
    return {job.place: Wave(wave.samples[:length], wave.rate) for job, wave in zip(jobs[:wanted], waves, strict=False)}


def _denoise(model: Model, settings: AudioModelSettings, jobs: Sequence[Job]) -> Tensor:
    """Latents (N, C, ...), float32, of jobs with equal steps, length and guidance."""
    parts = parts_of(model)
    device = next(model.network.parameters()).device
    scheduler = solver_of(parts, settings.solver)
    scheduler.set_timesteps(jobs[0].steps, device=device)
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    shape = parts.codec.latent_shape(jobs[0].seconds)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    stochastic = isinstance(scheduler, DDPMScheduler)
    told = _branches(jobs, device)
    levels = parts.schedule.timestep.to(device)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents]) if len(told.states) > len(jobs) else latents
        # A flow scheduler's timesteps are what the network is told; others' are indices into the schedule.
        shown = timestep if parts.schedule.kind == FLOW else levels[timestep.long()]
        found = answer(model, settings, both, shown.expand(len(both)), told)
        if len(both) > len(latents):
            without, with_prompt = found.chunk(2)
            found = without + jobs[0].guidance * (with_prompt - without)
        noise = {"generator": generators} if stochastic else {}
        latents = scheduler.step(found, timestep, latents, return_dict=False, **noise)[0]
    return latents


def _branches(jobs: Sequence[Job], device: torch.device) -> Told:
    """What a forward pass is told: with guidance, the rows in the place of the prompts and then the prompts'."""
    empties = [job.empty for job in jobs if job.empty is not None]
    told = stack([*empties, *(job.told for job in jobs)])
    extra = None if told.extra is None else told.extra.to(device)
    return Told(told.states.to(device), told.mask.to(device), extra)
