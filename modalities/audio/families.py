"""The families of text-to-audio models, in one table: how a folder is told to be one, and how it is opened.

================  =============================  ===========================================  ================================
family            text states                    denoiser                                     target
================  =============================  ===========================================  ================================
``tiny``          small T5                       1-D or patched transformer on mel patches    as its scheduler says
``tango``         FLAN-T5                        UNet on a mel VAE's latents                  v, as Stable Diffusion 2.1's
``audioldm2``     CLAP and FLAN-T5 through       UNet with two cross-attentions on a mel      noise, or v, as its scheduler
                  GPT-2, and FLAN-T5             VAE's latents                                says
``stable_audio``  T5, projected, and the clip's  1-D transformer on a wave VAE's latents      v on a cosine schedule, or flow
                  length
================  =============================  ===========================================  ================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import NoiseSchedule, PredictionType
from polyalign.datasets.audio.waves import Mono
from polyalign.modalities.audio import audioldm2, stable_audio, tango_layout
from polyalign.modalities.audio.diffusers_folders import described_class
from polyalign.modalities.audio.mel_vae import MelVae
from polyalign.modalities.audio.parts import Parts, Told
from polyalign.modalities.audio.settings import AudioModelSettings
from polyalign.modalities.audio.text import T5Text, t5_tokenizer

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections of diffusers' UNets and transformers."""

TANGO_CARD = """# a folder in Tango's own layout, for Tango's own code; from there:
from tango import Tango

model = Tango("THIS_FOLDER")"""

TANGO_SECONDS = 10.24
"""1024 frames of 10 ms: the ten seconds that Tango is trained on."""


@dataclass(frozen=True)
class Family:
    """One kind of model: ``recognises(folder)``, ``open(folder, settings)`` in float32 on the CPU, and what is made of files of
    several channels."""

    recognises: Callable[[Path], bool]
    open: Callable[[Path, AudioModelSettings], Parts]
    mono: Mono = "mean"


def prediction_of(config: dict[str, Any]) -> PredictionType:
    """What a denoiser predicts, by its scheduler's configuration."""
    if "FlowMatch" in str(config.get("_class_name", "")):
        return "flow"
    return config.get("prediction_type", "epsilon")


def call_unet(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    """A UNet that attends to text under its mask (Tango)."""
    return denoiser(noisy, timesteps, encoder_hidden_states=told.states, encoder_attention_mask=told.mask, return_dict=False)[0]


def halvings(config: Any) -> int:
    """How often a UNet halves its input."""
    return len(config["block_out_channels"]) - 1


def open_tango(folder: Path, settings: AudioModelSettings) -> Parts:
    """Tango's own layout (:mod:`polyalign.modalities.audio.tango_layout`)."""
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint).expanduser()
    modules = tango_layout.read(folder, checkpoint)
    tokenizer = t5_tokenizer(folder, settings.tokenizer, modules.text_name, modules.text_encoder.config.vocab_size)
    text = T5Text(modules.text_encoder, tokenizer)
    codec = MelVae(
        modules.vae,
        modules.vocoder,
        modules.mel,
        seconds=settings.seconds or TANGO_SECONDS,
        halvings=halvings(modules.unet.config),
        resampler=settings.resampler,
    )

    def write(denoiser: nn.Module, target: Path) -> None:
        tango_layout.write(target, tango_layout.TangoModules(**{**vars(modules), "unet": denoiser}))
        tokenizer.save_pretrained(str(target / "tokenizer"))

    config = dict(modules.scheduler_config)
    return Parts(
        family="tango",
        denoiser=modules.unet,
        predict=call_unet,
        text=text,
        codec=codec,
        scheduler_config=config,
        schedule=NoiseSchedule.from_scheduler_config(config),
        prediction_type=prediction_of(config),
        targets=ATTENTION_TARGETS,
        write=write,
        card=TANGO_CARD,
    )


def _open_tiny(folder: Path, settings: AudioModelSettings) -> Parts:
    from polyalign.modalities.audio.tiny_opening import open_tiny

    return open_tiny(folder, settings.resampler)


FAMILIES: dict[str, Family] = {
    "tiny": Family(lambda folder: (folder / "codec.json").is_file(), _open_tiny),
    "tango": Family(tango_layout.is_tango, open_tango, mono="first"),
    "audioldm2": Family(lambda folder: described_class(folder) == audioldm2.CLASS, audioldm2.open_audioldm2, mono="first"),
    "stable_audio": Family(lambda folder: described_class(folder) == stable_audio.CLASS, stable_audio.open_stable_audio),
}
"""Family by name."""


def family_of_folder(folder: Path) -> str:
    """The family whose files a folder holds.

    Raises:
        UserError: none of the table's.
    """
    found = next((name for name, family in FAMILIES.items() if family.recognises(folder)), None)
    if found is None:
        described = described_class(folder)
        says = (
            f"describes a {described}"
            if described
            else f"holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
        )
        raise UserError(
            f"{folder} {says}; this modality opens the embedded base's layout, Tango's own layout (main_config.json, "
            "vae_config.json, stft_config.json, pytorch_model_main.bin, pytorch_model_vae.bin), and diffusers folders of "
            "AudioLDM2Pipeline and StableAudioPipeline"
        )
    return found
