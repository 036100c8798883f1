"""The embedded base's architecture: Tango in every part, small in every size.

A T5 encoder with a tokenizer of whole words, and a text-conditioned denoiser of patched mel latents that predicts v over Stable
Diffusion 2.1's betas. In 1.3 million parameters a transformer does what Tango's UNet does at a ninth of the cost, so the
denoiser is diffusers' PixArtTransformer2DModel, conditioned as the UNet is: cross-attention to T5 states, and the timestep.

Two things differ from Tango beside size. The betas are rescaled so that the last level holds no signal (Lin et al., arXiv
2305.08891): a clip is mostly silence, and what little signal Stable Diffusion leaves at its last level is enough to tell where
the events are, which a sampler that starts from noise cannot. And the text encoder is trained together with the denoiser, since
there is no T5 of this size to take; it is frozen from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from polyalign.modalities.audio import diffusers_folders as folders
from polyalign.modalities.audio.mel_codec import MelCodec, MelSettings, open_codec

TEXT_LENGTH = 12
TEXT_WIDTH = 64
WIDTH = 128
LAYERS = 4
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5


def tokenizer_of(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each word, and T5's end after the last."""
    vocabulary = {token: index for index, token in enumerate((PAD, END, UNKNOWN, *sorted(set(words))))}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=TEXT_LENGTH
    )


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_WIDTH,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 32,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return T5EncoderModel(T5Config(**config))


def denoiser(codec: MelSettings) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        in_channels=codec.channels,
        out_channels=codec.channels,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=codec.frames // codec.patch[0],
        patch_size=1,
        use_additional_conditions=False,
    )


def scheduler_config() -> dict[str, Any]:
    """Of diffusers' DDIMScheduler."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Matrices by fan-in, the text's relative positions and embeddings at a scale that the first layer can see; the output and
    what the timestep changes start at nothing.

    Stock widths start at 0.02, which is made for thousands: at 128 the first of two events could not be told from the second.
    """
    for name, parameter in network.named_parameters():
        if "relative_attention_bias" in name or "shared" in name:
            nn.init.normal_(parameter, std=1.0)
        elif "scale_shift_table" in name:
            continue
        elif name.endswith("proj_out.weight") and parameter.ndim == 2:
            nn.init.zeros_(parameter)
        elif "adaln_single.linear" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def build(words: Iterable[str], codec: MelSettings, seed: int) -> tuple[PreTrainedTokenizerFast, nn.ModuleDict]:
    """The tokenizer, and ``text_encoder`` and ``denoiser`` with random weights that follow from ``seed``."""
    tokenizer = tokenizer_of(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = nn.ModuleDict({"text_encoder": text_encoder(tokenizer), "denoiser": denoiser(codec)})
        initialise(networks)
    return tokenizer, networks


def tokenise(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, each (N, TEXT_LENGTH)."""
    found = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask.bool()


def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """One pass of the denoiser: the predicted v, of the shape of ``noisy`` (N, C, H, W)."""
    return network(
        noisy,
        encoder_hidden_states=states,
        timestep=timesteps,
        encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Base:
    """What a base's folder holds: ``networks`` are ``text_encoder`` and ``denoiser``."""

    tokenizer: PreTrainedTokenizerFast
    networks: nn.ModuleDict
    codec: MelCodec
    scheduler_config: dict[str, Any] = field(default_factory=scheduler_config)


def save(folder: Path, base: Base) -> None:
    """Write a base: stock folders of transformers and diffusers with weights as they are, and the codec."""
    folder.mkdir(parents=True, exist_ok=True)
    networks: dict[str, Any] = dict(base.networks.items())
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    base.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler: Any = DDIMScheduler.from_config(base.scheduler_config)
    scheduler.save_pretrained(folder / "scheduler")
    base.codec.save(folder)


def read(folder: Path) -> Base:
    """Open what :func:`save` wrote, in float32, frozen.

    Raises:
        UserError: a part is not there, cannot be read, or has not the tensors of its configuration.
    """
    codec, scheduler = open_codec(folder), folders.scheduler_config(folder)
    denoiser = folders.component(PixArtTransformer2DModel, folder, "denoiser")
    text = folders.component(T5EncoderModel, folder, "text_encoder")
    return Base(
        tokenizer=folders.tokenizer(folder, "tokenizer"),
        networks=nn.ModuleDict({"text_encoder": text, "denoiser": denoiser}),
        codec=codec,
        scheduler_config=scheduler,
    )
