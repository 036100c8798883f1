"""Tiny random models in Tango's own layout, written by an independent hand: names as the published files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel, T5Tokenizer

from polyalign.datasets.audio.waves import Wave
from polyalign.modalities.audio.adapter import AudioAdapter
from polyalign.modalities.audio.settings import AudioModelSettings

UNET = {
    "sample_size": [32, 2],
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_head_dim": [2, 2],
    "cross_attention_dim": 16,
    "use_linear_projection": True,
    "upcast_attention": True,
    "norm_num_groups": 4,
}
VAE = {
    "image_key": "fbank",
    "subband": 1,
    "embed_dim": 8,
    "time_shuffle": 1,
    "ddconfig": {
        "double_z": True,
        "z_channels": 8,
        "resolution": 256,
        "downsample_time": False,
        "in_channels": 1,
        "out_ch": 1,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
    "scale_factor": 0.92,
}
STFT = {
    "filter_length": 256,
    "hop_length": 160,
    "win_length": 256,
    "n_mel_channels": 16,
    "sampling_rate": 16000,
    "mel_fmin": 0,
    "mel_fmax": 8000,
}
MAIN = {
    "text_encoder_name": "google/flan-t5-large",
    "scheduler_name": "stabilityai/stable-diffusion-2-1",
    "unet_model_name": None,
    "unet_model_config_path": "configs/diffusion_model_config.json",
    "snr_gamma": 5.0,
}
SECONDS = 0.32
"""32 mel frames: a latent of 16 x 8."""


def tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=64)


def loud(network: nn.Module) -> nn.Module:
    """Weights large enough that text and noise level show in the output."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def audible(vocoder: Any) -> Any:
    """Random weights at which frames of unit size become sound of a fifth of full scale: with a vocoder's own initial weights
    all sound is about 1e-11, and everything sounds alike."""
    for parameter in vocoder.parameters():
        if parameter.ndim == 3:
            parameter.normal_(std=float(parameter[0].numel()) ** -0.5)
    mels = torch.randn(1, 64, vocoder.config.model_in_dim)
    vocoder.conv_post.weight *= 0.2 / vocoder(mels).std()
    return vocoder


def networks(seed: int = 0) -> dict[str, Any]:
    """Stock modules of the sizes above."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=32,
        scaling_factor=0.92,
    )
    voice = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=32,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3,
        normalize_before=False,
    )
    built = {
        "unet": loud(UNet2DConditionModel.from_config(UNET)),
        "text_encoder": T5EncoderModel(T5Config(**text)),
        "vae": vae,
        "vocoder": audible(SpeechT5HifiGan(voice)),
    }
    return {name: network.eval() for name, network in built.items()}


def first_stage(vae: nn.Module) -> dict[str, Tensor]:
    """The VAE under AudioLDM's names, from a table by hand of this size's modules."""
    modules = {
        "encoder.down.0.block.0": "encoder.down_blocks.0.resnets.0",
        "encoder.down.0.downsample.conv": "encoder.down_blocks.0.downsamplers.0.conv",
        "encoder.down.1.block.0": "encoder.down_blocks.1.resnets.0",
        "encoder.mid.block_1": "encoder.mid_block.resnets.0",
        "encoder.mid.attn_1": "encoder.mid_block.attentions.0",
        "encoder.mid.block_2": "encoder.mid_block.resnets.1",
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder.mid.block_1": "decoder.mid_block.resnets.0",
        "decoder.mid.attn_1": "decoder.mid_block.attentions.0",
        "decoder.mid.block_2": "decoder.mid_block.resnets.1",
        "decoder.up.1.block.0": "decoder.up_blocks.0.resnets.0",
        "decoder.up.1.block.1": "decoder.up_blocks.0.resnets.1",
        "decoder.up.1.upsample.conv": "decoder.up_blocks.0.upsamplers.0.conv",
        "decoder.up.0.block.0": "decoder.up_blocks.1.resnets.0",
        "decoder.up.0.block.1": "decoder.up_blocks.1.resnets.1",
        "decoder.norm_out": "decoder.conv_norm_out",
    }
    inside = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    found = {}
    for name, tensor in vae.state_dict().items():
        theirs = name
        for new, old in modules.items():
            if name.startswith(old + "."):
                theirs = new + name.removeprefix(old)
        for old, new in inside.items():
            theirs = theirs.replace(f".{old}.", f".{new}.")
        projection = ".attn_1." in theirs and ".norm." not in theirs and theirs.endswith("weight")
        found[theirs] = tensor[:, :, None, None] if projection else tensor
    return found


def build(folder: Path, seed: int = 0, *, stft: bool = False) -> dict[str, Any]:
    """Write a folder with Tango's file and tensor names; returns the stock modules that it holds."""
    modules = networks(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("main_config", MAIN), ("vae_config", VAE), ("stft_config", STFT)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "diffusion_model_config.json").write_text(json.dumps(UNET))
    main = {
        f"{part}.{name}": tensor for part in ("unet", "text_encoder") for name, tensor in modules[part].state_dict().items()
    }
    torch.save(main, folder / "pytorch_model_main.bin")
    voice = {
        "vocoder." + name.replace("upsampler.", "ups."): tensor
        for name, tensor in modules["vocoder"].state_dict().items()
        if name not in ("mean", "scale")
    }
    torch.save({**first_stage(modules["vae"]), **voice}, folder / "pytorch_model_vae.bin")
    tokenizer().save_pretrained(str(folder / "tokenizer"))
    return modules


def wave(seed: int, seconds: float = 0.4, rate: int = 16000) -> Wave:
    generator = np.random.default_rng(seed)
    return Wave((0.3 * generator.standard_normal(round(seconds * rate))).clip(-1, 1).astype(np.float32), rate)


def adapter_of(base: Path, **settings: Any) -> AudioAdapter:
    """An adapter with few and cheap sampling steps."""
    cheap = {"sampling_steps": 3, "rank": 4, "seconds": SECONDS, "sample_batch": 2, "codec_batch": 2}
    return AudioAdapter(AudioModelSettings(**{"base": str(base), **cheap, **settings}))


def pairs() -> list[dict[str, Any]]:
    prompts = ("a dog barks then a car passes", "rain", "a bell and a cat meows")
    return [
        {"pair_id": f"pair-{n}", "condition": {"prompt": prompt}, "chosen": wave(2 * n), "rejected": wave(2 * n + 1)}
        for n, prompt in enumerate(prompts)
    ]
