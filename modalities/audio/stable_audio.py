"""Stable Audio: a 1-D transformer on the latents of a VAE of waves, told T5 states and the clip's length.

Letters: N clips, C latent channels, L latent frames, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderOobleck, StableAudioDiTModel, StableAudioProjectionModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from transformers import T5EncoderModel

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import DDPM, NoiseSchedule
from polyalign.datasets.audio.waves import Wave, resampled
from polyalign.modalities.audio import diffusers_folders as folders
from polyalign.modalities.audio.parts import Parts, Told
from polyalign.modalities.audio.settings import AudioModelSettings

CLASS = "StableAudioPipeline"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LEVELS = 1000
"""Into which the continuous time of training is cut."""


def cosine_schedule(levels: int = LEVELS) -> NoiseSchedule:
    """a = cos(pi t / 2), s = sin(pi t / 2) at t = (i + 1/2) / levels, which is what the network is told.

    The same as diffusers' CosineDPMSolverMultistepScheduler, which counts sigma = tan(pi t / 2) and scales its input: divided
    by sqrt(1 + sigma^2), x0 + sigma n is a x0 + s n, and the network's output there is v = a n - s x0.
    """
    time = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    angle = time * math.pi / 2
    return NoiseSchedule(DDPM, angle.cos().float(), angle.sin().float(), time.float())


def solver_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """The schedule as a table of betas, which diffusers' DDIM, DDPM and DPM-Solver++ schedulers take."""
    kept = schedule.signal.double() ** 2
    betas = 1.0 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }


class WaveVae:
    """Sound to latents (C, L) of whole stereo clips, as long as the transformer's sample size, and back to mono."""

    def __init__(self, vae: Any, frames: int, seconds: float | None, resampler: str):
        self.vae, self.frames, self.resampler = vae, frames, resampler
        self.longest = frames * vae.hop_length / vae.config.sampling_rate
        self.seconds = self.longest if seconds is None else seconds
        self.latent_shape(self.seconds)

    @property
    def rate(self) -> int:
        return int(self.vae.config.sampling_rate)

    def latent_shape(self, seconds: float) -> tuple[int, ...]:
        if seconds > self.longest + 1e-6:
            raise UserError(f"seconds is {seconds}; this model makes clips of at most {self.longest:.2f} s")
        return (int(self.vae.config.decoder_input_channels), self.frames)

    @torch.no_grad()
    def moments(self, waves: Sequence[Wave]) -> Tensor:
        """Mean and standard deviation of the posterior, (N, 2 C, L), float32, each clip encoded alone."""
        found = []
        for wave in waves:
            samples = np.asarray(resampled(wave, self.rate, self.resampler).samples, dtype=np.float32)
            samples = torch.from_numpy(samples[: round(self.seconds * self.rate)])
            whole = torch.zeros(1, self.vae.config.audio_channels, self.frames * self.vae.hop_length)
            whole[:, :, : len(samples)] = samples
            posterior = self.vae.encode(whole.to(self.vae.device, self.vae.dtype)).latent_dist
            found.append(torch.cat([posterior.mean, posterior.std], dim=1).float())
        return torch.cat(found)

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, std = moments.chunk(2, dim=1)
        return mean if generator is None else mean + std * torch.randn(mean.shape, generator=generator).to(std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Wave]:
        sound = self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample
        return [Wave(one.mean(0).clamp(-1.0, 1.0).numpy(), self.rate) for one in sound.float().cpu()]

    def to(self, device: torch.device) -> WaveVae:
        self.vae.to(device)
        return self


class TimedText:
    """T5 states, projected, zero where there is no text, then one token for the start and one for the end; the same two side by
    side are ``extra``. Without a prompt all tokens are zero, as the pipeline has it; the length stays."""

    def __init__(self, encoder: Any, tokenizer: Any, projection: Any):
        self.encoder, self.tokenizer, self.projection = encoder, tokenizer, projection

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, seconds: float, tokens: int | None = None) -> Told:
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = found.input_ids.to(self.encoder.device), found.attention_mask.to(self.encoder.device)
        states = self.projection(text_hidden_states=self.encoder(ids, attention_mask=mask)[0]).text_hidden_states
        times = [torch.full((len(ids),), value, device=ids.device) for value in (0.0, seconds)]
        length = self.projection(start_seconds=times[0], end_seconds=times[1])
        ends = [length.seconds_start_hidden_states, length.seconds_end_hidden_states]
        states = torch.cat([states * mask.unsqueeze(-1), *ends], dim=1)
        return Told(states, torch.ones(states.shape[:2], dtype=torch.bool, device=ids.device), torch.cat(ends, dim=2))

    def unconditional(self, *, seconds: float, tokens: int | None = None) -> Told:
        found = self.encode([""], seconds=seconds)
        return found._replace(states=torch.zeros_like(found.states))

    def to(self, device: torch.device) -> TimedText:
        self.encoder.to(device)
        self.projection.to(device)
        return self


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    """The transformer at rotary positions of the clip; text that is not there is zero and is attended to, as in training. It
    counts time in the type of its weights or of mixed precision, as in the pipeline, and bfloat16 has 8 bits for that: float16,
    with 11, is the better half."""
    config: Any = getattr(denoiser, "module", denoiser).config
    assert told.extra is not None  # TimedText always gives it
    positions = get_1d_rotary_pos_embed(
        config.attention_head_dim // 2, noisy.shape[2] + told.extra.shape[1], use_real=True, repeat_interleave_real=False
    )
    return denoiser(
        noisy,
        timesteps,
        encoder_hidden_states=told.states,
        global_hidden_states=told.extra,
        rotary_embedding=tuple(part.to(noisy.device) for part in positions),
        return_dict=False,
    )[0]


def open_stable_audio(folder: Path, settings: AudioModelSettings) -> Parts:
    """A folder of StableAudioPipeline, or one of the same parts with a scheduler of the DDPM or flow-matching family."""
    config = folders.scheduler_config(folder)
    kind = str(config.get("_class_name"))
    if kind.startswith("EDM"):
        raise UserError(f"{folder}: its scheduler is {kind}, whose noise levels this modality does not know")
    if kind.startswith("Cosine"):
        schedule = cosine_schedule()
        config = solver_config(schedule)
    else:
        schedule = NoiseSchedule.from_scheduler_config(config)
    transformer = folders.component(StableAudioDiTModel, folder, "transformer")
    vae = folders.component(AutoencoderOobleck, folder, "vae")
    text = TimedText(
        folders.component(T5EncoderModel, folder, "text_encoder"),
        folders.tokenizer(folder, "tokenizer"),
        folders.component(StableAudioProjectionModel, folder, "projection_model"),
    )
    flow = "FlowMatch" in kind
    return Parts(
        family="stable_audio",
        denoiser=transformer,
        predict=predict,
        text=text,
        codec=WaveVae(vae, int(transformer.config.sample_size), settings.seconds, settings.resampler),
        scheduler_config=config,
        schedule=schedule,
        prediction_type="flow" if flow else config.get("prediction_type", "epsilon"),
        targets=TARGETS,
        write=lambda denoiser, target: folders.write(folder, denoiser, "transformer", target),
        card='from diffusers import StableAudioPipeline\n\npipeline = StableAudioPipeline.from_pretrained("THIS_FOLDER")',
    )
