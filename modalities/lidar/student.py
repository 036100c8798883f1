"""Samples of a student with gradient, as its training needs them.

Letters: B scans, P points of a scan, N = copies * P points of a sample.

The published code trains on a single step from the noisiest level and then samples in eight. Here the student is trained over
the timesteps it is used with: it runs the first steps of a few-step course without gradient, and the clean points it predicts
at the last of them, with gradient, are the sample. In a course of one step that is the published sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.randomness import rng
from polyalign.modalities.lidar.completion import CompletionSettings, GuidedDenoiser, course
from polyalign.modalities.lidar.diffusion import trajectory


@dataclass(frozen=True)
class Prefix:
    """A course of ``steps`` steps that is followed up to its ``place``-th, from 1."""

    steps: int
    place: int

    def __str__(self) -> str:
        return f"{self.place}/{self.steps}"


def drawn_prefix(courses: Sequence[int], seed: int, step: int) -> Prefix:
    """The prefix of a training step: one of the ``courses``, then one of its places, both uniform."""
    generator = rng(seed, "prefix", step)
    steps = courses[int(torch.randint(len(courses), (), generator=generator))]
    return Prefix(steps, 1 + int(torch.randint(steps, (), generator=generator)))


def student_samples(
    guided: GuidedDenoiser,
    scans: Tensor,
    seeds: Sequence[int],
    settings: CompletionSettings,
    schedule: NoiseSchedule,
    prefix: Prefix,
) -> Tensor:
    """(B, N, 3) clean points that the student predicts at the end of a prefix. The gradient, where it is enabled, is that of
    this prediction alone: points before it are constants."""
    guided.begin()
    begun = course(scans, seeds, settings, schedule)
    wants_gradient, calls = torch.is_grad_enabled(), 0
    clean = begun.x

    def predict(x: Tensor, level: int) -> Tensor:
        nonlocal calls, clean
        calls += 1
        with torch.set_grad_enabled(wants_gradient and calls == prefix.place):
            noise = guided(begun.base + x, level)
            if calls == prefix.place:
                clean = (x - float(schedule.noise[level]) * noise) / float(schedule.signal[level])
        return noise

    how = replace(settings.solver, steps=prefix.steps)
    with torch.no_grad():
        for place, _ in enumerate(trajectory(begun.x, predict, begun.noises, schedule, how), start=1):
            if place == prefix.place:
                break
    return begun.base + clean
