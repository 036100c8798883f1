"""The patched-mel codec of the embedded base: clip <-> log-mel spectrogram <-> patches <-> latents.

Where Tango has an autoencoder and a vocoder, this has a linear autoencoder of patches (their principal components), and
Griffin-Lim. A latent is (C, H, W) = (components, frames / patch, bands / patch), time before frequency as in Tango's
(8, 256, 16).

    mel     = log(clamp(|STFT| B, floor))         magnitudes, B the slaney mel basis, reflect padding, periodic Hann (as Tango)
    latent  = (patch - mean) down                 down = V / scale, up = scale V': V the first C eigenvectors of the patches'
    patch   = latent up + mean                    covariance, scale ~ square root of their deviations

A patch of 128 values has some thirty that matter. A small denoiser that has to carry the noise of all 128 through its width
learns little else; the half-whitening lets quiet details count without making them as large as the loud ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave, resampled
from polyalign.modalities.audio.mel import FrontEnd, filter_bank, log_mel

RESAMPLER = "scipy.resample_poly"
FILE, WEIGHTS = "codec.json", "codec.safetensors"


@dataclass(frozen=True)
class MelSettings:
    """What ``codec.json`` holds. ``rate`` in hertz; ``samples``, a clip's length; ``patch``, frames and bands of one patch;
    ``floor``, the smallest magnitude; ``channels``, a patch's components; ``rounds``, ``momentum``: Griffin-Lim's."""

    rate: int = 16_000
    samples: int = 32_768
    n_fft: int = 1024
    hop: int = 256
    bands: int = 32
    patch: tuple[int, int] = (8, 32)
    floor: float = 2e-3
    channels: int = 48
    rounds: int = 16
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.samples % (self.hop * self.patch[0]) or self.bands % self.patch[1]:
            raise UserError(
                f"{FILE}: {self.samples} samples with a hop of {self.hop} and {self.bands} bands do not divide into patches of "
                f"{self.patch[0]} frames x {self.patch[1]} bands"
            )

    @property
    def frames(self) -> int:
        return self.samples // self.hop

    @property
    def front(self) -> FrontEnd:
        """All frequencies up to half the rate."""
        return FrontEnd(self.rate, self.n_fft, self.hop, self.bands, 0.0, self.rate / 2, self.floor)


def read_settings(folder: Path) -> MelSettings:
    """``codec.json`` of a folder.

    Raises:
        UserError: the file is not there, is no JSON, or has other keys, or values that are no numbers above 0.
    """
    file = folder / FILE
    try:
        found = json.loads(file.read_text())
        found = {**found, "patch": tuple(found["patch"])}
        for key, value in found.items():
            numbers = value if key == "patch" else (value,)
            if any(isinstance(number, bool) or not isinstance(number, int | float) or number <= 0 for number in numbers):
                raise ValueError(f"{key} is {value!r}, which is no number above 0")
        return MelSettings(**found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no settings of a patched-mel codec ({error})") from error


def to_patches(mel: Tensor, patch: Sequence[int]) -> Tensor:
    """(N, T, F) -> (N, t f, T / t, F / f) for patches of t frames x f bands; :func:`from_patches` is the inverse."""
    rows, (frames, bands) = len(mel), patch
    parts = mel.reshape(rows, mel.shape[1] // frames, frames, mel.shape[2] // bands, bands)
    return parts.permute(0, 2, 4, 1, 3).reshape(rows, frames * bands, parts.shape[1], parts.shape[3])


def from_patches(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """(N, t f, H, W) -> (N, H t, W f)."""
    rows, _, height, width = latents.shape
    frames, bands = patch
    parts = latents.reshape(rows, frames, bands, height, width).permute(0, 3, 1, 4, 2)
    return parts.reshape(rows, height * frames, width * bands)


@dataclass(frozen=True, eq=False)
class PatchBasis:
    """The linear autoencoder: ``mean`` (P,), ``down`` (P, C), ``up`` (C, P) for patches of P values."""

    mean: Tensor
    down: Tensor
    up: Tensor

    @classmethod
    def fit(cls, patches: Tensor, channels: int, deviation: float) -> PatchBasis:
        """From patches (N, P, H, W): the first ``channels`` principal components, scaled by the square roots of their
        deviations and so that latents have a root mean square of ``deviation``."""
        rows = patches.permute(0, 2, 3, 1).reshape(-1, patches.shape[1]).double()
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        values, vectors = values.flip(0)[:channels].clamp_min(1e-6 * float(values[-1])), vectors.flip(1)[:, :channels]
        vectors = vectors * vectors.sum(0).sign()  # eigenvectors have no sign of their own
        scale = values**0.25
        scale = scale * (values / scale**2).mean().sqrt() / deviation
        return cls(mean.float(), (vectors / scale).contiguous().float(), (vectors * scale).T.contiguous().float())

    def encode(self, patches: Tensor) -> Tensor:
        """(N, P, H, W) -> (N, C, H, W)."""
        return torch.einsum(
            "nphw,pc->nchw", patches - self.mean.to(patches.device)[:, None, None], self.down.to(patches.device)
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, P, H, W)."""
        up = self.up.to(latents.device)
        return torch.einsum("nchw,cp->nphw", latents, up) + self.mean.to(latents.device)[:, None, None]


def linear_magnitude(mel: Tensor, settings: MelSettings, rounds: int = 30) -> Tensor:
    """Magnitudes (N, n_fft / 2 + 1, T) >= 0 whose mel bands come closest to ``exp(mel)`` (N, T, bands).

    Least squares over magnitudes that are not negative, by Lee and Seung's multiplicative update: x <- x (B y) / (B B' x).
    Values at the floor count as silence.
    """
    basis = filter_bank(settings.front).to(mel.device)
    wanted = torch.where(mel <= np.log(settings.floor) + 0.3, torch.zeros_like(mel), mel.exp())
    towards = wanted @ basis.T
    found = towards / (basis.sum(1) ** 2 + 1e-8).clamp_min(1e-8)
    for _ in range(rounds):
        found = found * towards / ((found @ basis) @ basis.T + 1e-8)
    return found.transpose(1, 2)


def griffin_lim(magnitude: Tensor, settings: MelSettings, seed: int = 0) -> Tensor:
    """Samples (N, samples) whose spectrogram has these magnitudes (N, n_fft / 2 + 1, frames).

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard, WASPAA 2013): phases of c_k = P(t_k), t_{k+1} = c_k + momentum (c_k -
    c_{k-1}), from the same random phases for every clip, so that a clip's sound does not depend on its neighbours.
    """
    magnitude = torch.cat([magnitude, magnitude[..., -1:]], -1)  # the frame that `log_mel` cuts off
    window = torch.hann_window(settings.n_fft, device=magnitude.device)
    start = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(seed)) * 2 * np.pi
    phases = torch.polar(torch.ones_like(start), start).to(magnitude.device).expand(magnitude.shape)
    last = torch.zeros_like(phases)

    def sound(phases: Tensor) -> Tensor:
        return torch.istft(magnitude * phases, settings.n_fft, settings.hop, window=window, length=settings.samples)

    for _ in range(settings.rounds):
        now = torch.stft(sound(phases), settings.n_fft, settings.hop, window=window, return_complex=True)
        moved = now + settings.momentum * (now - last)
        phases, last = moved / moved.abs().clamp_min(1e-8), now
    return sound(phases)


class MelCodec:
    """Fulfils :class:`polyalign.modalities.audio.parts.Codec`; what is cached are the latents themselves. ``resampler``, a name
    of :data:`polyalign.datasets.audio.waves.RESAMPLERS`, brings clips to its rate."""

    def __init__(self, settings: MelSettings, basis: PatchBasis, resampler: str = RESAMPLER):
        self.settings, self.basis, self.resampler = settings, basis, resampler

    @property
    def rate(self) -> int:
        return self.settings.rate

    @property
    def seconds(self) -> float:
        return self.settings.samples / self.settings.rate

    def latent_shape(self, seconds: float) -> tuple[int, ...]:
        """The one shape there is: the denoiser's positions are those of whole clips.

        Raises:
            UserError: another length than :attr:`seconds`.
        """
        if abs(seconds - self.seconds) > 0.05:
            raise UserError(f"the embedded base makes clips of {self.seconds} s, not of {seconds} s; leave the length out")
        frames, bands = self.settings.patch
        return (self.settings.channels, self.settings.frames // frames, self.settings.bands // bands)

    def moments(self, waves: Sequence[Wave]) -> Tensor:
        """Latents (N, C, H, W) float32 of clips, resampled, cut or padded with silence at the end."""
        return self.basis.encode(patches_of(waves, self.settings, self.resampler))

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """The latents: this codec is no distribution, so nothing is drawn."""
        return moments

    def mel(self, latents: Tensor) -> Tensor:
        """Log-mel spectrograms (N, frames, bands) of latents."""
        mel = from_patches(self.basis.decode(latents.float()), self.settings.patch)
        return mel.clamp(float(np.log(self.settings.floor)), 6.0)  # beyond what full scale can reach

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Wave]:
        """Sound of latents; what is louder than full scale is turned down as a whole."""
        samples = griffin_lim(linear_magnitude(self.mel(latents), self.settings), self.settings)
        samples = samples / samples.abs().amax(1, keepdim=True).clamp_min(1.0)
        return [Wave(row, self.rate) for row in samples.cpu().numpy().astype(np.float32)]

    def to(self, device: Any) -> MelCodec:
        """Itself: everything is computed where the latents lie."""
        return self

    def save(self, folder: Path) -> None:
        """Write ``codec.json`` and ``codec.safetensors``."""
        (folder / FILE).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
        save_file(vars(self.basis), folder / WEIGHTS)


def patches_of(waves: Sequence[Wave], settings: MelSettings, resampler: str = RESAMPLER) -> Tensor:
    """Log-mel patches (N, P, H, W) of clips, resampled, cut or padded with silence at the end."""
    clips = np.zeros((len(waves), settings.samples), dtype=np.float32)
    for row, wave in zip(clips, waves, strict=True):
        samples = resampled(wave, settings.rate, resampler).samples[: len(row)]
        row[: len(samples)] = samples
    return to_patches(log_mel(torch.from_numpy(clips), settings.front), settings.patch)


def open_codec(folder: Path) -> MelCodec:
    """The codec of a folder that :meth:`MelCodec.save` wrote.

    Raises:
        UserError: a file is not there, or is none of a codec's.
    """
    settings = read_settings(folder)
    try:
        basis = PatchBasis(**load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{folder / WEIGHTS}: no weights of a patched-mel codec ({error})") from error
    size = settings.patch[0] * settings.patch[1]
    if basis.mean.shape != (size,) or basis.down.shape != (size, settings.channels) or basis.up.shape != basis.down.T.shape:
        raise UserError(f"{folder / WEIGHTS}: expected a basis of {settings.channels} components of {size} values")
    return MelCodec(settings, basis)
