"""Loading a pipeline of :mod:`polyalign.modalities.image.families` from a hub id, a diffusers folder, the embedded base, or
(UNets only) a single file; with a network published alone in the place of its own, if asked.

Weights come from safetensors, or from pickles read with ``weights_only``; a pickle that would run code is refused before
anything else reads it. No code from a model's folder is ever run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.modalities.checkpoint_files import PICKLES, hash_of, refuse_code, weight_files
from polyalign.modalities.image import published
from polyalign.modalities.image.contradictions import refuse
from polyalign.modalities.image.families import FAMILIES, family_named
from polyalign.modalities.image.latents import factor_of
from polyalign.modalities.image.settings import DTYPES, ImageModelSettings

TINY_BASE = Path(__file__).parent / "tiny_base"


def load(settings: ImageModelSettings) -> Model:
    """The model of ``settings.base``, frozen, in evaluation mode, on its device.

    Raises:
        UserError: nothing there, unreadable or dangerous weights, another kind of model, or a setting that contradicts the
        base.
    """
    path = TINY_BASE if settings.base == "tiny" else Path(settings.base).expanduser()
    with quiet():
        if path.is_file():
            pipeline, identity = _from_file(path, settings), f"{path.name}@sha256:{hash_of([path])}"
        elif path.is_dir():
            name = "polyalign-tiny" if settings.base == "tiny" else path.resolve().name
            pipeline, identity = _from_folder(path, settings), f"{name}@sha256:{hash_of(weight_files(path))}"
        else:
            folder = _download(settings)
            pipeline, identity = _from_folder(folder, settings), f"{settings.base}@{folder.name}"
        name = family_named(type(pipeline).__name__)
        assert name is not None  # nothing else is opened above
        refuse(pipeline, name, settings)
        if settings.network is not None:
            identity += f"+{published.place(pipeline, FAMILIES[name], settings)}"
    return _model(pipeline, name, identity, settings)


def assemble(model: Model, scheduler: Any = None) -> Any:
    """A diffusers pipeline around the *current* network, without safety checker or watermark."""
    family = FAMILIES[model.parts["family"]]
    parts = {name: model.parts.get(name) for name in family.parts}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    parts[family.network] = getattr(model.network, "module", model.network)  # DDP's wrapper does not have a network's config
    pipeline = family.pipeline(**parts, **family.fixed, **model.parts["pipeline_config"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars, one for each part of a model, and three warnings that say nothing to a user:
    ``torch_dtype`` has another name in later versions, a LoRA of the network holds nothing for the text encoders, and a base's
    text encoder is not CLIP's."""
    loud = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in loud:
        library.disable_progress_bar()
    loader = logging.getLogger("diffusers.loaders.lora_base")
    loader.addFilter(_not_about_text_encoders)
    opener = logging.getLogger("diffusers.pipelines.pipeline_utils")
    opener.addFilter(_not_about_text_encoders)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        loader.removeFilter(_not_about_text_encoders)
        opener.removeFilter(_not_about_text_encoders)
        for library in loud:
            library.enable_progress_bar()


def _not_about_text_encoders(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "No LoRA keys associated" not in said and not said.startswith("Expected types for text_encoder:")


def resolution_of(model: Model, settings: ImageModelSettings) -> int:
    """Pixels of one side: as set, or the base's own.

    Raises:
        UserError: a size that the VAE and the network's halvings or patches do not divide, or one beyond the network's table of
            positions.
    """
    return _resolution(model.parts["network_config"], model.parts["family"], model.parts["vae"], settings)


def _resolution(config: Mapping[str, Any], name: str, vae: Any, settings: ImageModelSettings) -> int:
    factor, (multiple, side) = factor_of(vae), FAMILIES[name].grid(config)
    resolution = settings.resolution or side * factor
    if resolution % (factor * multiple):
        raise UserError(f"resolution is {resolution}; this base needs a multiple of {factor * multiple}")
    most = config.get("pos_embed_max_size")
    if most is not None and resolution > most * factor * multiple:
        raise UserError(f"resolution is {resolution}; this base knows positions up to {most * factor * multiple} pixels")
    return resolution


def _download(settings: ImageModelSettings) -> Path:
    """A hub repository's folder; its name is the commit."""
    if settings.base.startswith((".", "/", "~")) or settings.base.count("/") != 1:
        raise UserError(
            f"base is {settings.base!r}: there is no such file or folder, and it is no hub id (owner/name). "
            "Allowed: tiny, a hub id, a diffusers folder, a single-file checkpoint."
        )
    try:
        folder = DiffusionPipeline.download(
            settings.base, revision=settings.revision, variant=settings.variant, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"base {settings.base!r} could not be fetched from the model hub ({str(error).splitlines()[0]}). "
            "Check the name and the network, or give a folder or file that is on this machine."
        ) from error
    return Path(folder)


def _from_folder(folder: Path, settings: ImageModelSettings) -> Any:
    index = folder / "model_index.json"
    try:
        described = json.loads(index.read_text())["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is no diffusers pipeline: model_index.json with a _class_name is expected there ({error})"
        ) from error
    family = family_named(described)
    if family is None:
        allowed = ", ".join(row.pipeline.__name__ for row in FAMILIES.values())
        raise UserError(f"{index} describes a {described}; this modality trains {allowed}")
    for file in weight_files(folder):
        if file.suffix in PICKLES and not any(file.parent.glob("*.safetensors")):
            refuse_code(file)
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
    if family == "sd3" and not settings.use_t5:
        extra |= {"text_encoder_3": None, "tokenizer_3": None}
    try:
        return FAMILIES[family].pipeline.from_pretrained(
            folder,
            # The VAE is read in float32 and made narrower afterwards if asked: rounded weights do not come back.
            torch_dtype={"default": settings.weights_dtype, "vae": torch.float32},
            variant=settings.variant,
            local_files_only=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error


def _from_file(file: Path, settings: ImageModelSettings) -> Any:
    """A single-file checkpoint through diffusers; the kind is told by its tensors' names."""
    names = _names(file)
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        family = "sdxl"
    elif any(name.startswith("cond_stage_model.") for name in names):
        family = "sd"
    else:
        raise UserError(
            f"{file} is no whole Stable Diffusion 1.x, 2.x or SDXL checkpoint: it has no text encoder "
            f"(its tensors are named like {sorted(names)[:3]}). A LoRA, a VAE or a UNet alone is not a base. "
            "SD3 and FLUX are read from a diffusers folder or a hub id."
        )
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
    local = settings.single_file_config is not None and os.path.isdir(settings.single_file_config)
    try:
        pipeline = FAMILIES[family].pipeline.from_single_file(
            str(file),
            config=settings.single_file_config,
            torch_dtype=torch.float32,
            local_files_only=local,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read as a checkpoint ({str(error).strip().splitlines()[0]}). A single file lacks configs and "
            "tokenizers, which diffusers fetches from the model hub; without a network give single_file_config, a folder that "
            "holds them (any diffusers folder of the same kind)."
        ) from error
    if settings.prediction_type is not None:  # a single file often does not say
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=settings.prediction_type
        )
    return pipeline


def _names(file: Path) -> set[str]:
    if file.suffix in PICKLES:
        refuse_code(file)
        content = torch.load(file, map_location="meta", weights_only=True)
        return set(content.get("state_dict", content))
    if file.suffix != ".safetensors":
        raise UserError(f"base is {file}: a single-file checkpoint is a .safetensors (or a .ckpt of weights only)")
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from error


def device_of(settings: ImageModelSettings) -> torch.device:
    """The device of this process."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _model(pipeline: Any, family_name: str, identity: str, settings: ImageModelSettings) -> Model:
    device, family = device_of(settings), FAMILIES[family_name]
    parts: dict[str, Any] = {}
    for name in (family.network, *family.parts):
        part = getattr(pipeline, name, None)
        if isinstance(part, torch.nn.Module):
            dtype = _vae_dtype(part, settings) if name == "vae" else settings.weights_dtype
            part = part.requires_grad_(False).eval().to(device)
            part = part if part.dtype == dtype else part.to(dtype)  # diffusers warns at a cast to the same type too
        if part is not None:
            parts[name] = part
    network = parts.pop(family.network)
    if settings.attention == "xformers":
        require("xformers", extra="cuda", purpose="attention: xformers")
        if device.type != "cuda":
            raise UserError(f"attention is set to xformers, which has no operators for {device.type}; use sdpa")
        network.enable_xformers_memory_efficient_attention()
    options = {name: pipeline.config.get(name) for name in ("force_zeros_for_empty_prompt",) if name in pipeline.config}
    parts |= {"family": family_name, "pipeline_class": family.pipeline, "pipeline_config": options}
    parts["network_config"] = dict(network.config)
    side = _resolution(parts["network_config"], family_name, parts["vae"], settings) // factor_of(parts["vae"])
    parts["schedule"] = family.schedule(pipeline.scheduler, side)
    return Model(network=network, parts=parts, identity=identity)


def _vae_dtype(vae: Any, settings: ImageModelSettings) -> torch.dtype:
    if settings.vae_dtype != "auto":
        return DTYPES[settings.vae_dtype]
    return torch.float32 if vae.config.get("force_upcast", True) else DTYPES[settings.dtype]
