"""distillation_dpo.json: both phases of Distillation-DPO's training step, and LiDiff's schedule.

Not compared are the norms of gradients of the original's stand-in networks, which are not in the file, beyond that the
generator's is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from torch import Tensor

from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances
from polyalign.modalities.lidar.diffusion import SolverSettings, add_noise, noise_schedule, solve
from polyalign.modalities.lidar.distillation import (
    Sides,
    assistant_loss,
    choose,
    first_wins,
    official_value,
    paired_noise,
    student_loss,
)

SINGLE = {"rtol": 1e-5, "atol": 1e-5}
"""The original's tables are in single precision."""


def method_of(content: Mapping[str, Any]) -> str:
    return content["params"]["phase"]


def _cloud(case: Case, name: str) -> Tensor:
    return tensor(case.inputs[name]).unsqueeze(0)


def _samples(case: Case) -> tuple[Tensor, Tensor]:
    """The student's two samples, and from them the winner and the loser (1, N, 3)."""
    start = _cloud(case, "pcd_part").repeat(1, case.params["repeat"], 1)
    noise = _cloud(case, "x_T_sample1") - start
    _, scaled = paired_noise(noise, scale=case.params["noise_scale_sample2"])
    agree("x_T_sample2", (start + scaled)[0], case.inputs["x_T_sample2"], rtol=1e-9)
    full = tensor(case.inputs["pcd_full"]).numpy()
    settings, samples, distances = SolverSettings(case.params["student_steps"]), [], []
    for number, offsets in ((1, noise), (2, scaled)):
        predicted = _cloud(case, f"eps_student_sample{number}")
        sample = start + solve(offsets, lambda x, level, p=predicted: p, lambda step: noise, noise_schedule(), settings)
        agree(f"sample{number}", sample[0], case.outputs[f"sample{number}"], **SINGLE)
        samples.append(tensor(case.outputs[f"sample{number}"]).unsqueeze(0))
        distances.append(chamfer(nearest_distances(samples[-1][0].numpy(), full)))
        agree(f"cd{number}", distances[-1], case.outputs[f"cd{number}"], rtol=1e-12)
    first, _ = first_wins(*torch.tensor(distances, dtype=torch.float64).unsqueeze(1))
    assert case.outputs["winner"] == (1 if bool(first) else 2)
    return choose(samples[0], samples[1], first)


def _assistants(case: Case) -> None:
    _samples(case)
    inputs = [_cloud(case, name) for name in ("eps_ta_winner", "noise_winner", "eps_ta_loser", "noise_loser")]
    winner, loser = assistant_loss(*inputs)
    agree("loss_winner", winner, case.outputs["loss_winner"], rtol=1e-12)
    agree("loss_loser", loser, case.outputs["loss_loser"], rtol=1e-12)
    agree("loss", winner + loser, case.outputs["loss"], rtol=1e-12)


def _student(case: Case) -> None:
    schedule, noise, levels = noise_schedule(), _cloud(case, "noise"), torch.tensor(case.inputs["t"])
    sigma = schedule.noise[levels].reshape(-1, 1, 1)
    sides = []
    for name, sample in zip(("winner", "loser"), _samples(case), strict=True):
        noisy = add_noise(schedule, sample, noise, levels, "local")
        agree(f"x_t_{name}", noisy[0], case.outputs[f"x_t_{name}"], **SINGLE)
        sides.append(Sides(sample.requires_grad_(), _cloud(case, f"eps_teacher_{name}"), _cloud(case, f"eps_ta_{name}")))
    value = official_value(sides[0], sides[1], noise, sigma).mean()
    agree("official value", value, case.outputs["loss"], rtol=1e-6, atol=1e-12)
    samples = [side.sample for side in sides]
    for gradient in torch.autograd.grad(value, samples):
        agree("official gradient", gradient.abs().max(), case.outputs["max_abs_grad_wrt_winner"])
    ours = torch.autograd.grad(student_loss(sides[0], sides[1]).mean(), samples)
    for sign, side, gradient in zip((1, -1), sides, ours, strict=True):
        expected = sign * (side.teacher - side.assistant) / side.sample.numel()
        torch.testing.assert_close(gradient, expected)
        assert float(gradient.abs().max()) > 0


def _schedule(case: Case) -> None:
    schedule, levels = noise_schedule(), torch.tensor(case.inputs["t"])
    agree("signal", schedule.signal[levels], case.outputs["sqrt_alpha_cumprod"], rtol=1e-7)
    agree("noise", schedule.noise[levels], case.outputs["sqrt_one_minus_alpha_cumprod"], rtol=1e-7)
    agree("abar", schedule.signal[levels] ** 2, case.outputs["alpha_cumprod"], rtol=2e-7)
    for steps, expected in case.outputs["inference_timesteps"].items():
        assert SolverSettings(int(steps)).levels() == expected


METHODS: dict[str, Callable[[Case], None]] = {
    "teaching_assistants": _assistants,
    "student": _student,
    "schedule": _schedule,
}
NOT_IN_PLACE: dict[str, str] = {}
