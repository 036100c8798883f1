"""The embedded base as the parts of an audio model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.modalities.audio import tiny_architecture as tiny
from polyalign.modalities.audio.mel_codec import RESAMPLER, MelCodec
from polyalign.modalities.audio.parts import Parts, Told
from polyalign.modalities.audio.text import T5Text

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""Attention and feed-forward layers of a transformer block: at this width attention alone is too little to change an order."""

CARD = """from diffusers import PixArtTransformer2DModel
from transformers import AutoTokenizer, T5EncoderModel

denoiser = PixArtTransformer2DModel.from_pretrained("THIS_FOLDER", subfolder="denoiser")
text_encoder = T5EncoderModel.from_pretrained("THIS_FOLDER", subfolder="text_encoder")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", subfolder="tokenizer")
# latents are components of log-mel patches: codec.json and codec.safetensors"""


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    """One pass of the denoiser under the text's mask."""
    return tiny.predict(denoiser, noisy, timesteps, told.states, told.mask)


def open_tiny(folder: Path, resampler: str = RESAMPLER) -> Parts:
    """A folder of the embedded base's layout, whose codec brings clips to its rate by ``resampler``.

    Raises:
        UserError: a part of it is missing, or is none.
    """
    base = tiny.read(folder)
    config = base.scheduler_config

    def write(denoiser: Any, target: Path) -> None:
        networks = nn.ModuleDict({"text_encoder": base.networks["text_encoder"], "denoiser": denoiser})
        tiny.save(target, tiny.Base(base.tokenizer, networks, base.codec, config))

    return Parts(
        family="tiny",
        denoiser=base.networks["denoiser"],
        predict=predict,
        text=T5Text(base.networks["text_encoder"].eval().requires_grad_(False), base.tokenizer, multiple=tiny.TEXT_LENGTH),
        codec=MelCodec(base.codec.settings, base.codec.basis, resampler),
        scheduler_config=config,
        schedule=NoiseSchedule.from_scheduler_config(config),
        prediction_type=config.get("prediction_type", "epsilon"),
        targets=TARGETS,
        write=write,
        card=CARD,
    )
