"""What a recipe says against what its base is: refused in words before any work."""

from __future__ import annotations

from typing import Any

from polyalign.core.errors import UserError
from polyalign.modalities.image.families import FAMILIES, Family
from polyalign.modalities.image.settings import ImageModelSettings


def refuse(pipeline: Any, name: str, settings: ImageModelSettings) -> None:
    """Refuse a loaded pipeline of family ``name`` that contradicts the settings or cannot be trained here.

    Raises:
        UserError: another family or prediction type than the settings say; a folder that mixes two kinds of model; a part that
            is missing; an inpainting, depth or refiner model; a setting that this family does not have.
    """
    family, base = FAMILIES[name], settings.base
    config = getattr(pipeline, family.network).config
    if settings.family is not None and settings.family != name:
        raise UserError(f"family is set to {settings.family!r}, but {base} is {name!r}; leave it out to detect it")
    _refuse_mixtures(pipeline, family, settings)
    channels = family.channels(config)
    if channels != pipeline.vae.config.latent_channels:
        what = "UNet" if family.network == "unet" else family.network
        raise UserError(
            f"the {what} of {base} takes {channels} channels and its VAE makes {pipeline.vae.config.latent_channels}: "
            "inpainting and depth models are not trained here"
        )
    found = family.prediction_type(pipeline.scheduler)
    if settings.prediction_type not in (None, found):
        raise UserError(f"prediction_type is set to {settings.prediction_type!r}, but {base} says {found!r}")
    if family.flow:
        _refuse_of_flow(name, family, settings)
    _refuse_of_text(name, family, settings)
    if settings.guidance_vector is not None and not config.get("guidance_embeds", False):
        raise UserError(
            f"guidance_vector is set to {settings.guidance_vector:g}, but the network of {base} is not told a guidance scale; "
            "only a guidance-distilled FLUX (FLUX.1-dev) is. Leave it out"
        )


def _refuse_mixtures(pipeline: Any, family: Family, settings: ImageModelSettings) -> None:
    """A folder whose parts are not of one model, or that lacks one."""
    base, config = settings.base, getattr(pipeline, family.network).config
    if family.network == "unet" and (config.get("addition_embed_type") == "text_time") != family.sized:
        raise UserError(
            f"{base} is a {type(pipeline).__name__}, but its UNet has addition_embed_type "
            f"{config.get('addition_embed_type')!r}; the folder mixes two kinds of model"
        )
    if pipeline.text_encoder is None:
        raise UserError(f"{base} has no first text encoder (an SDXL refiner?); refiners are not trained here")
    missing = [part for part in family.parts if getattr(pipeline, part) is None and not part.endswith("_3")]
    if missing:
        raise UserError(f"{base} has no {', '.join(missing)}; only SD3's third text encoder may be left out")
    if family.flow != type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        raise UserError(
            f"{base} is a {type(pipeline).__name__}, but its scheduler is a {type(pipeline.scheduler).__name__}; "
            f"{'a FlowMatch... scheduler' if family.flow else 'one of the DDPM family'} is expected there"
        )


def _refuse_of_flow(name: str, family: Family, settings: ImageModelSettings) -> None:
    if settings.sampler not in ("base", "euler"):
        raise UserError(
            f"the sampler's scheduler is {settings.sampler!r}, which samples diffusion models; {name} is a flow model, sampled "
            "with its own. Set sampler.scheduler to base"
        )
    if settings.negative_prompt is not None and not family.negatives:
        raise UserError(
            f"a negative_prompt is set, but {name} has guidance inside the network and no negative branch; leave it out"
        )
    if settings.attention == "xformers":
        raise UserError(f"attention is set to xformers, which diffusers has for UNets only; {name} uses sdpa")


def _refuse_of_text(name: str, family: Family, settings: ImageModelSettings) -> None:
    if settings.text_tokens is not None and not family.text_tokens:
        raise UserError(f"text_tokens is set to {settings.text_tokens}, but {name} has no T5; leave it out")
    if not settings.use_t5 and name != "sd3":
        raise UserError(
            f"use_t5 is set to false, but only sd3 was trained to do without T5, and this base is {name}; leave it out"
        )
