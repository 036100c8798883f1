"""Sampling through diffusers' own pipelines, every picture from its own seed.

A picture's noise comes from ``torch.Generator("cpu").manual_seed(seed)``, as stock diffusers draws it, so the same seed gives
the same picture there. Batches all have one size (the last is filled up): a picture's bytes then do not depend on which other
pictures were asked for. Between batch sizes, and between machines, matrix kernels may differ in the last bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.image import latents as latent
from polyalign.modalities.image.families import family_of, network_of
from polyalign.modalities.image.loading import assemble
from polyalign.modalities.image.settings import DTYPES, ImageModelSettings

Encoded = dict[str, Tensor]


def scheduler_of(model: Model, sampler: str) -> Any:
    """The sampler's scheduler on the base's own noise schedule. A flow model's own is an Euler scheduler.

    Raises:
        UserError: an unknown sampler.
    """
    base = model.parts["scheduler"]
    if sampler == "base" or (family_of(model).flow and sampler == "euler"):
        return type(base).from_config(base.config)
    if sampler == "ddim":
        return DDIMScheduler.from_config(base.config, clip_sample=False)
    if sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler.from_config(base.config, algorithm_type="dpmsolver++")
    if sampler == "euler":
        return EulerDiscreteScheduler.from_config(base.config)
    raise UserError(f"sampler {sampler!r} is not known; allowed: base, ddim, dpmsolver++, euler")


def autocast(settings: ImageModelSettings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision of a float32 network; nothing where the weights already have the asked dtype."""
    if settings.weights_dtype == DTYPES[settings.dtype]:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[settings.dtype])


@torch.no_grad()
def sample(
    model: Model,
    settings: ImageModelSettings,
    prompts: Sequence[Encoded],
    empty: Encoded,
    seeds: Sequence[int],
    *,
    resolution: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture for each (encoded prompt, seed); ``empty`` is the unconditional branch; ``progress(done, all)`` each
    batch."""
    pipeline = assemble(model, scheduler_of(model, settings.sampler))
    network = network_of(pipeline)
    was_training = network.training
    network.eval()
    pictures: list[Image.Image] = []
    try:
        for start in range(0, len(prompts), settings.sample_batch):
            part = slice(start, start + settings.sample_batch)
            found = _batch(pipeline, model, settings, prompts[part], empty, list(seeds[part]), resolution)
            pictures += found
            if progress is not None:
                progress(len(pictures), len(prompts))
    finally:
        network.train(was_training)
    return pictures


def _batch(
    pipeline: Any,
    model: Model,
    settings: ImageModelSettings,
    prompts: Sequence[Encoded],
    empty: Encoded,
    seeds: list[int],
    resolution: int,
) -> list[Image.Image]:
    wanted = len(prompts)
    if settings.pad_batches:
        missing = settings.sample_batch - wanted
        prompts, seeds = [*prompts, *[prompts[-1]] * missing], seeds + [seeds[-1]] * missing
    family, device = family_of(model), next(network_of(pipeline).parameters()).device
    conditions: dict[str, Tensor] = {}
    for name, key in (("prompt_embeds", "states"), ("pooled_prompt_embeds", "pooled")):
        if key in empty:
            conditions[name] = torch.stack([prompt[key] for prompt in prompts]).to(device, settings.weights_dtype)
            conditions[f"negative_{name}"] = (
                empty[key].expand_as(conditions[name]).to(device, settings.weights_dtype).contiguous()
            )
    if settings.guidance <= 1.0 or not family.negatives:
        conditions = {name: value for name, value in conditions.items() if not name.startswith("negative")}
    with autocast(settings, device):
        found = pipeline(
            **conditions,
            height=resolution,
            width=resolution,
            num_inference_steps=settings.sampling_steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
    found = family.unpacked(found, resolution // latent.factor_of(model.parts["vae"]))
    pixels = latent.decode(model, found[:wanted] if not settings.pad_batches else found, batch=settings.vae_batch)
    return pipeline.image_processor.postprocess(pixels[:wanted], output_type="pil")
