"""Noise schedules: how much signal and noise a denoising model sees at each of its levels, and how errors are weighted.

Letters: T noise levels, index i in 0..T-1 from clean to noisy; a_i signal and s_i noise coefficients, x_i = a_i x0 + s_i noise;
SNR_i = a_i^2 / s_i^2.

A squared error of one prediction type is a multiple of another's (specs of the field agree): with e_eps the noise error,
e_x0 = -(s/a) e_eps in every schedule, e_v = e_eps / a where a^2 + s^2 = 1, and e_flow = e_eps / a where a = 1 - s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polyalign.core.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Weighting = Literal["constant", "elbo", "snr", "min_snr"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
FLOW = "rectified_flow"
DDPM = "variance_preserving"


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas rescaled so that the last level holds no signal at all (Lin et al., arXiv 2305.08891, algorithm 1).

    sqrt(abar) is shifted so that its last value is 0 and scaled so that its first is unchanged; betas (T,) -> (T,).
    SDXL-Turbo is trained so; v-prediction is then needed, since the noise says nothing about a sample without signal.
    """
    root = (1.0 - betas).cumprod(0).sqrt()
    shifted = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = shifted**2
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return 1.0 - alphas


def betas_of_config(config: Mapping[str, Any]) -> Tensor:
    """The betas (T,) float32 that a diffusers scheduler of the DDPM family makes from its config.

    Raises:
        UserError: a beta_schedule that is not linear, scaled_linear or squaredcos_cap_v2.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":

        def signal(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor(
            [min(1 - signal((i + 1) / steps) / signal(i / steps), 0.999) for i in range(steps)], dtype=torch.float32
        )
    else:
        raise UserError(
            f"the scheduler config has beta_schedule {kind!r}, which is not known here; "
            "allowed: linear, scaled_linear, squaredcos_cap_v2, or a table under trained_betas"
        )
    return zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr", False) else betas


def flow_shift(config: Mapping[str, Any], tokens: int | None = None) -> float:
    """By how much a flow-matching scheduler of diffusers moves its levels towards noise: ``shift`` of its config, or, with
    ``use_dynamic_shifting``, what it gives pictures of ``tokens`` patches (FLUX.1).

    The dynamic shift is exp(mu) (``time_shift_type: linear``: mu), mu on the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift); diffusers' exp(mu) / (exp(mu) + 1/s - 1) is then the shifted level of ``rectified_flow``.

    Raises:
        UserError: a dynamic shift, and the number of tokens is not known.
    """
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    if tokens is None:
        raise UserError(
            "the scheduler config says use_dynamic_shifting: its noise levels depend on the size of a sample, which is not "
            "known here. Say the number of patches, or take a scheduler with a constant shift"
        )
    low, high = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    start, end = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    mu = start + (end - start) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of T levels: ``signal`` a (T,), ``noise`` s (T,), and ``timestep`` (T,), what the network is told at that
    level."""

    kind: str
    signal: Tensor
    noise: Tensor
    timestep: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """DDPM: a = sqrt(abar), s = sqrt(1 - abar); the network is told the index."""
        return cls(DDPM, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), torch.arange(len(alphas_cumprod)))

    @classmethod
    def rectified_flow(cls, steps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
        """x = (1 - s) x0 + s noise with s = (i + 1)/T, shifted as SD3 does: s -> shift s / (1 + (shift - 1) s); told: s T."""
        plain = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        sigma = shift * plain / (1 + (shift - 1) * plain)
        return cls(FLOW, 1 - sigma, sigma, sigma * steps)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], tokens: int | None = None) -> NoiseSchedule:
        """From the ``scheduler_config.json`` of a diffusers pipeline: a flow-matching class, or one of the DDPM family.
        ``tokens``, patches of a sample, is only asked for by a dynamic shift (see :func:`flow_shift`)."""
        if "FlowMatch" in str(config.get("_class_name", "")):
            return cls.rectified_flow(int(config.get("num_train_timesteps", 1000)), flow_shift(config, tokens))
        return cls.from_alphas_cumprod((1.0 - betas_of_config(config)).cumprod(0))

    @property
    def steps(self) -> int:
        return len(self.signal)

    def snr(self) -> Tensor:
        """SNR (T,) in float64: a^2 / s^2, infinite where there is no noise."""
        return self.signal.double() ** 2 / self.noise.double() ** 2

    def coefficients(self, indices: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) at ``indices`` (leading dims of ``like``), shaped to multiply ``like`` and in its dtype."""
        shape = (*indices.shape, *[1] * (like.ndim - indices.ndim))
        signal, noise = (
            table.to(like.device)[indices.to(like.device)].to(like.dtype).reshape(shape) for table in (self.signal, self.noise)
        )
        return signal, noise

    def add_noise(self, clean: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """a x0 + s noise; ``indices`` has the leading dimensions of ``clean``."""
        a, s = self.coefficients(indices, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, indices: Tensor, prediction_type: PredictionType) -> Tensor:
        """What a perfect network answers: noise (epsilon), a noise - s x0 (v_prediction, Salimans & Ho 2022), x0 (sample),
        noise - x0 (flow, rectified flow only).

        Raises:
            UserError: a prediction type that this schedule does not have.
        """
        self.check(prediction_type)
        if prediction_type == "epsilon":
            return noise.expand_as(clean)
        if prediction_type == "sample":
            return clean
        if prediction_type == "flow":
            return noise - clean
        a, s = self.coefficients(indices, clean)
        return a * noise - s * clean

    def clean_scale(self, prediction_type: PredictionType) -> Tensor:
        """(T,) float64: by how much an error of the network's output moves the clean sample that follows from it: epsilon s/a,
        infinite where there is no signal; v and flow s; sample 1.

        Raises:
            UserError: a prediction type that this schedule does not have.
        """
        self.check(prediction_type)
        noise = self.noise.double()
        if prediction_type == "epsilon":
            return noise / self.signal.double()
        return torch.ones_like(noise) if prediction_type == "sample" else noise

    def check(self, prediction_type: str) -> None:
        """Refuse a prediction type that the schedule does not define."""
        allowed = ("flow",) if self.kind == FLOW else ("epsilon", "v_prediction", "sample")
        if prediction_type not in allowed:
            raise UserError(f"prediction_type {prediction_type!r} with a {self.kind} schedule; allowed: {', '.join(allowed)}")

    def weights(self, weighting: Weighting, prediction_type: PredictionType, gamma: float = 5.0) -> Tensor:
        """The factor (T,), float64, on the *native* squared error at each level.

        Weights are stated against one half of the squared error, the half that stands in beta's conventions, so that constant
        is the "simple" ELBO. As factors w_x0 on the x0-error, and c = e_x0^2 / e_native^2 (epsilon 1/SNR, v s^2, flow s^2, x0
        1):

        - constant: 1 on the native error. On epsilon this is Diffusion-DPO (2311.12908, Eq. 14 with a constant omega); on v and
          flow it is Eq. 14 with omega = 1/a^2.
        - elbo: w_x0 = SNR_{i-1} - SNR_i, on epsilon beta_i^2 / (stilde_i^2 alpha_i (1 - abar_i)) with stilde^2 the posterior
          variance (Ho et al. 2020, Eq. 12, twice its value since the half is elsewhere); the first level is the decoder
          N(x0; x0_hat, s_0^2), w_x0 = 1/s_0^2.
        - snr: w_x0 = SNR, that is the epsilon-error whatever the network predicts (Salimans & Ho 2022).
        - min_snr: w_x0 = min(SNR, gamma): epsilon min(SNR, gamma)/SNR, v min(SNR, gamma)/(SNR + 1) (Hang et al. 2303.09556).

        Raises:
            UserError: an unknown weighting, a prediction type of another schedule, or an infinite weight (the ELBO of a network
                that predicts noise at a level without signal).
        """
        self.check(prediction_type)
        if weighting not in WEIGHTINGS:
            raise UserError(f"weighting {weighting!r} is not known; allowed: {', '.join(WEIGHTINGS)}")
        if weighting == "constant":
            return torch.ones(self.steps, dtype=torch.float64)
        snr, variance = self.snr(), self.noise.double() ** 2
        if weighting == "elbo":
            of_sample = torch.cat([1 / variance[:1], snr[:-1] - snr[1:]])
        else:
            of_sample = snr if weighting == "snr" else snr.clamp(max=gamma)
        if prediction_type == "epsilon" and weighting != "elbo":  # written so that a level without signal gives 1 and not 0/0
            weights = torch.ones_like(snr) if weighting == "snr" else (gamma / snr).clamp(max=1.0)
        else:
            weights = of_sample * {"epsilon": 1 / snr, "sample": torch.ones_like(snr)}.get(prediction_type, variance)
        if not bool(weights.isfinite().all()):
            level = int((~weights.isfinite()).nonzero()[0])
            raise UserError(
                f"weighting {weighting!r} with prediction_type {prediction_type!r} is infinite at noise level {level} (SNR "
                f"{float(snr[level]):g}); use constant or min_snr, or leave that level out of the timestep range"
            )
        return weights
