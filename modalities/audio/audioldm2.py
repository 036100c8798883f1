"""AudioLDM2: CLAP and FLAN-T5 through a GPT-2 that continues their states, and FLAN-T5 once more, both told to a UNet on the
latents of a mel VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel, AutoencoderKL
from torch import Tensor, nn
from transformers import ClapModel, GPT2Model, SpeechT5HifiGan, T5EncoderModel

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.modalities.audio import diffusers_folders as folders
from polyalign.modalities.audio.mel import FrontEnd
from polyalign.modalities.audio.mel_vae import MelVae
from polyalign.modalities.audio.parts import Parts, Told
from polyalign.modalities.audio.settings import AudioModelSettings
from polyalign.modalities.audio.text import T5Text

CLASS = "AudioLDM2Pipeline"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SECONDS = 10.24


class GeneratedText:
    """FLAN-T5's states with their mask, and in ``extra`` those that GPT-2 continues CLAP's and FLAN-T5's projected ones with.

    GPT-2 is run anew for each of its (eight) states instead of with a cache, for which diffusers' pipeline relies on helpers
    that GPT2Model has no longer; the result is the same. GPT-2 counts padding among its positions, so a text's states depend on
    the number of tokens: prompts are encoded alone at their own, as the pipeline does with a single prompt (it pads a list of
    them to the longest), and the text against them is cut or padded to the prompt's, as there.
    """

    def __init__(self, clap: Any, clap_tokenizer: Any, t5: T5Text, projection: Any, language_model: Any):
        self.clap, self.clap_tokenizer, self.t5 = clap, clap_tokenizer, t5
        self.projection, self.language_model = projection, language_model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, seconds: float, tokens: int | None = None) -> Told:
        device = self.clap.device
        found = self.clap_tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.clap_tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        pooled = self.clap.get_text_features(found.input_ids, attention_mask=found.attention_mask)
        pooled = getattr(pooled, "pooler_output", pooled).unsqueeze(1)
        told = self.t5.encode(prompts, seconds=seconds, tokens=tokens)
        joined = self.projection(
            hidden_states=pooled,
            hidden_states_1=told.states,
            attention_mask=torch.ones(pooled.shape[:2], dtype=torch.long, device=device),
            attention_mask_1=told.mask.long(),
        )
        return Told(told.states, told.mask, self._continued(joined.hidden_states, joined.attention_mask))

    def _continued(self, states: Tensor, mask: Tensor) -> Tensor:
        wanted = int(getattr(self.language_model.config, "max_new_tokens", None) or 8)
        for _ in range(wanted):
            last = self.language_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state[:, -1:]
            states, mask = torch.cat([states, last], dim=1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return states[:, -wanted:]

    def unconditional(self, *, seconds: float, tokens: int | None = None) -> Told:
        return self.encode([""], seconds=seconds, tokens=tokens)

    def to(self, device: torch.device) -> GeneratedText:
        for part in (self.clap, self.t5, self.projection, self.language_model):
            part.to(device)
        return self


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    return denoiser(
        noisy,
        timesteps,
        encoder_hidden_states=told.extra,
        encoder_hidden_states_1=told.states,
        encoder_attention_mask_1=told.mask,
        return_dict=False,
    )[0]


def _text(folder: Path) -> GeneratedText:
    return GeneratedText(
        folders.component(ClapModel, folder, "text_encoder"),
        folders.tokenizer(folder, "tokenizer"),
        T5Text(
            folders.component(T5EncoderModel, folder, "text_encoder_2"),
            folders.tokenizer(folder, "tokenizer_2"),
            multiple=1,  # GPT-2 counts padding among its positions
        ),
        folders.component(AudioLDM2ProjectionModel, folder, "projection_model"),
        folders.component(GPT2Model, folder, "language_model"),
    )


def open_audioldm2(folder: Path, settings: AudioModelSettings) -> Parts:
    """A folder of AudioLDM2Pipeline, text to audio (its speech variants have another second encoder).

    Lengths are rounded up to whole frames, where the pipeline rounds down and makes a clip that is shorter than was asked for.
    """
    config = folders.scheduler_config(folder)
    unet = folders.component(AudioLDM2UNet2DConditionModel, folder, "unet")
    vae = folders.component(AutoencoderKL, folder, "vae")
    vocoder = folders.component(SpeechT5HifiGan, folder, "vocoder")
    hop = math.prod(vocoder.config.upsample_rates)
    if (vocoder.config.sampling_rate, hop) != (FrontEnd.rate, FrontEnd.hop):
        raise UserError(
            f"{folder}: its vocoder makes {vocoder.config.sampling_rate} Hz with {hop} samples a frame; only 16000 Hz and 160 "
            "are known"
        )
    return Parts(
        family="audioldm2",
        denoiser=unet,
        predict=predict,
        text=_text(folder),
        codec=MelVae(
            vae,
            vocoder,
            FrontEnd(mels=int(vocoder.config.model_in_dim)),
            seconds=settings.seconds or SECONDS,
            resampler=settings.resampler,
        ),
        scheduler_config=config,
        schedule=NoiseSchedule.from_scheduler_config(config),
        prediction_type=config.get("prediction_type", "epsilon"),
        targets=TARGETS,
        write=lambda denoiser, target: folders.write(folder, denoiser, "unet", target),
        matched=True,
        card='from diffusers import AudioLDM2Pipeline\n\npipeline = AudioLDM2Pipeline.from_pretrained("THIS_FOLDER")',
    )
