"""Tango's checkpoints in the terms of stock classes: published configurations, and names of tensors both ways.

The renaming of the VAE is that of AudioLDM's first stage to diffusers' AutoencoderKL, of the vocoder that of HiFi-GAN to
transformers' SpeechT5HifiGan; UNet and text encoder keep their names. Nothing is computed; the two trailing dimensions of the
middle attention's 1x1 convolutions are dropped and put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyalign.core.errors import UserError

UNET_CONFIG: dict[str, Any] = {
    "sample_size": [32, 2],
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "norm_num_groups": 32,
}
"""Of declare-lab's checkpoints, which only name a file of the code's repository (``configs/diffusion_model_config.json``)."""

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""What the checkpoints fetch from the hub, under the name below."""

SCHEDULER_NAME = "stabilityai/stable-diffusion-2-1"

VOCODER_CONFIG: dict[str, Any] = {
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "normalize_before": False,
}
"""AudioLDM's HiFi-GAN; the strides do not show in the tensors."""


def vae_config(described: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """AutoencoderKL's configuration from ``vae_config.json``, the ``file``.

    Raises:
        UserError: a key is missing, or it describes a VAE that AutoencoderKL is not (subbands, attention between the levels).
    """
    try:
        inner, embed, scale = described["ddconfig"], int(described["embed_dim"]), float(described["scale_factor"])
        levels, width, latent = list(inner["ch_mult"]), int(inner["ch"]), int(inner["z_channels"])
        blocks = int(inner["num_res_blocks"])
    except KeyError as error:
        raise UserError(f"{file} lacks {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: a value is of another kind than expected ({error})") from error
    odd = {
        "subband": described.get("subband", 1) != 1,
        "time_shuffle": described.get("time_shuffle", 1) != 1,
        "attn_resolutions": bool(inner.get("attn_resolutions")),
        "embed_dim": embed != latent,
        "double_z": not inner.get("double_z", True),
        "in_channels": inner.get("in_channels", 1) != 1,
    }
    if any(odd.values()):
        raise UserError(
            f"{file}: {', '.join(key for key, wrong in odd.items() if wrong)} as in no AudioLDM first stage; expected "
            "subband 1, time_shuffle 1, no attn_resolutions, embed_dim equal to z_channels, double_z, one channel"
        )
    return {
        "in_channels": 1,
        "out_channels": int(inner.get("out_ch", 1)),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "block_out_channels": [width * factor for factor in levels],
        "layers_per_block": blocks,
        "latent_channels": latent,
        "norm_num_groups": 32,
        "scaling_factor": scale,
    }


def described_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: ``vae_config.json`` of an AutoencoderKL."""
    width = config["block_out_channels"][0]
    latent = config["latent_channels"]
    return {
        "image_key": "fbank",
        "subband": 1,
        "embed_dim": latent,
        "time_shuffle": 1,
        "ddconfig": {
            "double_z": True,
            "z_channels": latent,
            "resolution": 256,
            "downsample_time": False,
            "in_channels": 1,
            "out_ch": config["out_channels"],
            "ch": width,
            "ch_mult": [channels // width for channels in config["block_out_channels"]],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "scale_factor": config["scaling_factor"],
    }


def t5_config(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """T5Config's sizes, read off the encoder's tensors: the checkpoint itself only names FLAN-T5's hub id.

    Raises:
        UserError: tensors that a T5 encoder has are missing.
    """
    first = "encoder.block.0.layer."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[first + "0.SelfAttention.relative_attention_bias.weight"].shape
        inner = tensors[first + "0.SelfAttention.q.weight"].shape[0]
        gated = first + "1.DenseReluDense.wi_0.weight" in tensors
        hidden = tensors[first + f"1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{file} lacks the tensor text_encoder.{error.args[0]}, which every T5 encoder has") from error
    layers = {match[1] for match in (re.match(r"encoder\.block\.(\d+)\.", name) for name in tensors) if match}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": False,
    }


def vocoder_config(tensors: Mapping[str, Tensor], rate: int, file: Path) -> dict[str, Any]:
    """SpeechT5HifiGanConfig, with the sizes that show in ``vocoder.*``.

    Raises:
        UserError: its first layer is missing.
    """
    first = tensors.get("vocoder.conv_pre.weight")
    if first is None:
        raise UserError(f"{file} lacks vocoder.conv_pre.weight: it holds no HiFi-GAN with plain weights")
    return {
        **VOCODER_CONFIG,
        "model_in_dim": first.shape[1],
        "upsample_initial_channel": first.shape[0],
        "sampling_rate": rate,
    }


def vae_to_stock(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """AutoencoderKL's tensors of a first stage, without its vocoder."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vocoder.")}
    return {_to_stock(name, levels): _linear(name, tensor) for name, tensor in kept.items()}


def vae_from_stock(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The inverse of :func:`vae_to_stock`."""
    renamed = {from_stock(name, levels): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if _is_projection(name) and name.endswith("weight") else tensor
        for name, tensor in renamed.items()
    }


def vocoder_to_stock(tensors: Mapping[str, Tensor], mels: int) -> dict[str, Tensor]:
    """SpeechT5HifiGan's tensors; ``mean`` and ``scale``, which it does not use here, are its defaults."""
    found = {
        re.sub(r"^ups\.", "upsampler.", name.removeprefix("vocoder.")): tensor
        for name, tensor in tensors.items()
        if name.startswith("vocoder.")
    }
    return {"mean": torch.zeros(mels), "scale": torch.ones(mels)} | found


def vocoder_from_stock(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`vocoder_to_stock`."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("mean", "scale")}
    return {"vocoder." + re.sub(r"^upsampler\.", "ups.", name): tensor for name, tensor in kept.items()}


_SWAPS = (
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
)
"""Names of AudioLDM's first stage beside AutoencoderKL's; the levels, which count the other way in the decoder, are apart."""


def _is_projection(name: str) -> bool:
    return re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.", name) is not None


def _linear(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0] if _is_projection(name) and tensor.ndim == 4 else tensor


def _to_stock(name: str, levels: int) -> str:
    for theirs, ours in _SWAPS:
        name = name.replace(theirs, ours)
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.conv", r"encoder.down_blocks.\1.downsamplers.0.conv", name)
    found = re.match(r"^decoder\.up\.(\d+)\.(block|upsample)\.(.*)$", name)
    if found is None:
        return name
    part = "resnets" if found[2] == "block" else "upsamplers.0"
    return f"decoder.up_blocks.{levels - 1 - int(found[1])}.{part}.{found[3]}"


def from_stock(name: str, levels: int) -> str:
    """AudioLDM's name of an AutoencoderKL's tensor."""
    for theirs, ours in _SWAPS:
        name = name.replace(ours, theirs)
    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv", name)
    found = re.match(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.(.*)$", name)
    if found is None:
        return name
    part = "block" if found[2] == "resnets" else "upsample"
    return f"decoder.up.{levels - 1 - int(found[1])}.{part}.{found[3]}"
