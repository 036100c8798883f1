"""The codec of AudioLDM, AudioLDM2 and Tango: log-mel frames, a VAE over them as one-channel pictures, and HiFi-GAN back.

Letters: N clips, T frames, M mel bins, C latent channels, f the VAE's factor in time and in frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave
from polyalign.modalities.audio.mel import FrontEnd, clips


class MelVae:
    """Sound to latents (C, T / f, M / f) and back; the codec contract of :mod:`polyalign.modalities.audio.parts`.

    Args:
        vae: AutoencoderKL of one channel. vocoder: SpeechT5HifiGan.
        mel: the front end.
        seconds: length of the clips that are trained on; filled up to whole halvings of VAE and denoiser.
        halvings: how often the denoiser halves a latent.
    """

    def __init__(
        self,
        vae: Any,
        vocoder: Any,
        mel: FrontEnd,
        *,
        seconds: float,
        halvings: int = 0,
        resampler: str = "scipy.resample_poly",
    ):
        self.vae, self.vocoder, self.mel, self.resampler = vae, vocoder, mel, resampler
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.factor * 2**halvings
        self.frames = mel.frames(seconds, self.multiple)

    @property
    def rate(self) -> int:
        return self.mel.rate

    @property
    def seconds(self) -> float:
        return self.frames * self.mel.hop / self.mel.rate

    def latent_shape(self, seconds: float) -> tuple[int, ...]:
        frames = self.mel.frames(seconds, self.multiple)
        return (int(self.vae.config.latent_channels), frames // self.factor, self.mel.mels // self.factor)

    @torch.no_grad()
    def moments(self, waves: Sequence[Wave]) -> Tensor:
        """Mean and standard deviation of the posterior, (N, 2 C, T / f, M / f), float32, each clip encoded alone."""
        mels = clips(waves, self.mel, self.frames, self.resampler).unsqueeze(1)
        found = [self.vae.encode(mel.to(self.vae.device, self.vae.dtype)).latent_dist for mel in mels.split(1)]
        return torch.cat([torch.cat([one.mean, one.std], dim=1).float() for one in found])

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """A sample of the posterior times the VAE's scaling factor; without a generator its mean."""
        mean, std = moments.chunk(2, dim=1)
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator).to(std)
        return mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Wave]:
        """Sound of latents, T hop samples each. The vocoder ends in a tanh and its float samples are kept, so that none wraps
        around as it does in the original, which casts 32768 times the sound to 16 bits.

        Raises:
            UserError: the latents hold values that are not finite.
        """
        if not bool(latents.isfinite().all()):
            raise UserError("sampling gave values that are not finite; take float32 or bfloat16 for the denoiser")
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        mels = self.vae.decode(latents, return_dict=False)[0].squeeze(1)
        sound = self.vocoder(mels).float().clamp(-1.0, 1.0).cpu()[:, : mels.shape[1] * self.mel.hop]
        return [Wave(samples.numpy(), self.rate) for samples in sound]

    def to(self, device: torch.device) -> MelVae:
        self.vae.to(device)
        self.vocoder.to(device)
        return self
