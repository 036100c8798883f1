"""The kinds of image model, in one table: what each is made of, and how it is told a caption, a picture and a noise level.

========  =========================  ============================  =========================================
family    text states                network                       target
========  =========================  ============================  =========================================
``sd``    CLIP                       UNet                          noise, or v, as the scheduler says
``sdxl``  two CLIPs, one pooled      UNet, told the picture size   noise, or v, as the scheduler says
``sd3``   two CLIPs and T5 in a row  MMDiT on latents              velocity, noise - x0; constant shift
``flux``  T5, CLIP pooled            MMDiT on packed latents       velocity, noise - x0; shift by resolution
========  =========================  ============================  =========================================

Letters: N rows of one forward pass, C h w latents, S text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.likelihood.schedules import NoiseSchedule, PredictionType
from polyalign.modalities.image.packing import PATCH, image_positions, pack, unpack

Entry = dict[str, Tensor]

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections of a UNet; the published Diffusion-DPO LoRA scripts train these."""

JOINT_ATTENTION_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of an MMDiT: those of the picture's tokens and those of the text's. diffusers' LoRA script for SD3 has
the same; the one for FLUX has the feed-forward layers of the double blocks besides (``ff.net.2``, ``ff_context.net.2``, ...).
"""

FLUX_SIDE = 128
"""Latent elements of a side that FLUX is made for; its configuration does not say, diffusers' pipeline has this number."""


class Told(NamedTuple):
    """What the network is told besides latents and noise level, for every row: states (N, S, D), pooled (N, P), SDXL's
    micro-conditioning (N, 6), and FLUX's guidance."""

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Made of: the diffusers ``pipeline``; the name of its trained ``network`` (also its folder's); its frozen ``parts``;
    ``fixed``, what else the pipeline's constructor is given.
    Told: ``encode(pipeline, prompt, tokens)`` gives states (S, D) and pooled (P,), T5 padded to ``text_tokens``;
    ``call(network, noisy, timesteps, told)`` is one forward pass, (N, C, h, w) to (N, C, h, w).
    Sized: ``grid(network config)`` is (elements of a latent side that it needs multiples of, elements that it is made for).
    """

    pipeline: Any
    network: str
    parts: tuple[str, ...]
    encode: Callable[[Any, str, int], Entry]
    call: Callable[[Any, Tensor, Tensor, Told], Tensor]
    grid: Callable[[Mapping[str, Any]], tuple[int, int]]
    targets: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False
    sized: bool = False
    negatives: bool = True
    packed: bool = False
    text_tokens: int = 0

    def prediction_type(self, scheduler: Any) -> PredictionType:
        """What the network predicts."""
        return "flow" if self.flow else scheduler.config.get("prediction_type", "epsilon")

    def schedule(self, scheduler: Any, side: int) -> NoiseSchedule:
        """The noise levels of training, for latents of ``side`` x ``side`` elements, which both transformers see as 2x2
        patches. For SD3 a constant shift (3), for FLUX.1-dev one that follows the number of patches, as in sampling;
        diffusers' LoRA script for FLUX trains without a shift."""
        config = {"_class_name": type(scheduler).__name__, **scheduler.config}
        return NoiseSchedule.from_scheduler_config(config, tokens=(side // PATCH) ** 2)

    def channels(self, network_config: Mapping[str, Any]) -> int:
        """Latent channels that the network takes."""
        return int(network_config["in_channels"]) // (PATCH**2 if self.packed else 1)

    def unpacked(self, latents: Tensor, side: int) -> Tensor:
        """What the pipeline gives with ``output_type="latent"``, as (N, C, side, side)."""
        return unpack(latents, side, side) if self.packed else latents


def _encode_clip(pipeline: Any, prompt: str, tokens: int) -> Entry:
    """Stable Diffusion 1.x, 2.x: the last hidden states. SDXL: the penultimate ones of both encoders side by side, and the
    pooled state of the second."""
    device = pipeline.text_encoder.device
    found = pipeline.encode_prompt(prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    entry = {"states": found[0][0]}
    if len(found) == 4:
        entry["pooled"] = found[2][0]
    return entry


def _encode_sd3(pipeline: Any, prompt: str, tokens: int) -> Entry:
    """Both CLIPs' penultimate states side by side, filled up with zeros to T5's width, then T5's (zeros where it was left out,
    as the model was trained for); both CLIPs' pooled states side by side."""
    states, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, device=pipeline.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return {"states": states[0], "pooled": pooled[0]}


def _encode_flux(pipeline: Any, prompt: str, tokens: int) -> Entry:
    """T5's last states, and CLIP's pooled state."""
    states, pooled, _ = pipeline.encode_prompt(prompt, device=pipeline.text_encoder.device, max_sequence_length=tokens)
    return {"states": states[0], "pooled": pooled[0]}


def _call_unet(network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    added = None if told.time_ids is None else {"text_embeds": told.pooled, "time_ids": told.time_ids}
    return network(noisy, timesteps, encoder_hidden_states=told.states, added_cond_kwargs=added, return_dict=False)[0]


def _call_sd3(network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    return network(
        hidden_states=noisy,
        encoder_hidden_states=told.states,
        pooled_projections=told.pooled,
        timestep=timesteps,
        return_dict=False,
    )[0]


def _call_flux(network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
    """FLUX counts noise levels from 0 to 1, and knows a guidance scale where it was distilled from a guided model."""
    height, width = noisy.shape[-2:]
    guidance = None
    if told.guidance is not None:
        guidance = torch.full((len(noisy),), told.guidance, device=noisy.device, dtype=torch.float32)
    found = network(
        hidden_states=pack(noisy),
        encoder_hidden_states=told.states,
        pooled_projections=told.pooled,
        timestep=timesteps / 1000,
        img_ids=image_positions(height, width, noisy),
        txt_ids=torch.zeros(told.states.shape[1], 3, device=noisy.device),
        guidance=guidance,
        return_dict=False,
    )[0]
    return unpack(found, height, width)


def _side(sample_size: Any) -> int:
    return sample_size if isinstance(sample_size, int) else sample_size[0]


def _grid_unet(config: Mapping[str, Any]) -> tuple[int, int]:
    return 2 ** (len(config["block_out_channels"]) - 1), _side(config["sample_size"])


def _grid_sd3(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["patch_size"]), _side(config["sample_size"])


def _grid_flux(config: Mapping[str, Any]) -> tuple[int, int]:
    return PATCH, FLUX_SIDE


FAMILIES: dict[str, Family] = {
    "sd": Family(
        pipeline=StableDiffusionPipeline,
        network="unet",
        parts=("vae", "text_encoder", "tokenizer", "scheduler"),
        encode=_encode_clip,
        call=_call_unet,
        grid=_grid_unet,
        targets=ATTENTION_TARGETS,
        fixed={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "sdxl": Family(
        pipeline=StableDiffusionXLPipeline,
        network="unet",
        parts=("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
        encode=_encode_clip,
        call=_call_unet,
        grid=_grid_unet,
        targets=ATTENTION_TARGETS,
        fixed={"add_watermarker": False},
        sized=True,
    ),
    "sd3": Family(
        pipeline=StableDiffusion3Pipeline,
        network="transformer",
        parts=(
            *("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
            *("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"),
        ),
        encode=_encode_sd3,
        call=_call_sd3,
        grid=_grid_sd3,
        targets=JOINT_ATTENTION_TARGETS,
        flow=True,
        text_tokens=256,
    ),
    "flux": Family(
        pipeline=FluxPipeline,
        network="transformer",
        parts=("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
        encode=_encode_flux,
        call=_call_flux,
        grid=_grid_flux,
        targets=JOINT_ATTENTION_TARGETS,
        flow=True,
        negatives=False,
        packed=True,
        text_tokens=512,
    ),
}
"""Family by name. T5's tokens are those of diffusers' pipelines."""


def family_named(pipeline_class: str) -> str | None:
    """The family whose diffusers pipeline has this name, as ``model_index.json`` has it; None if it is not of this table."""
    return next((name for name, row in FAMILIES.items() if row.pipeline.__name__ == pipeline_class), None)


def family_of(model: Model) -> Family:
    """The row of a loaded model."""
    return FAMILIES[model.parts["family"]]


def network_of(pipeline: Any) -> Any:
    """The trained part of a pipeline of this table."""
    name = family_named(type(pipeline).__name__)
    if name is None:
        raise TypeError(f"{type(pipeline).__name__} is no pipeline of this modality")
    return getattr(pipeline, FAMILIES[name].network)
