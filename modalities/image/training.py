"""The training of an image run: the model that a recipe describes, and what the training that all modalities share asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.run import RunFolder
from polyalign.datasets.picture_labels import PictureLabelStore
from polyalign.datasets.prompts import load_prompts
from polyalign.modalities import fingerprints
from polyalign.modalities.arms import Room, cache_of, reference_identity
from polyalign.modalities.denoising import tell_beta
from polyalign.modalities.image.config import ImageRecipe, PromptsConfig

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.modalities.image.adapter import ImageAdapter
    from polyalign.modalities.image.settings import ImageModelSettings

__all__ = ["ROOM", "conditions_of", "model_files", "open_model", "open_trained", "reference_identity", "settings_of"]

TINY_BASE = Path(__file__).parent / "tiny_base"


def settings_of(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> ImageModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.core.likelihood.denoising import TimestepSampling
    from polyalign.core.objectives.table import build
    from polyalign.modalities.image.settings import ImageModelSettings

    model, prepare, sampler = recipe.model, recipe.prepare, recipe.sampler
    return ImageModelSettings(
        **model.model_dump(exclude={"lora"}),
        **model.lora.model_dump(),
        **prepare.model_dump(exclude={"cache", "cache_folder"}),
        cache_folder=cache_of(recipe, run) if prepare.cache else None,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        weighting=recipe.likelihood.weighting,
        gamma=recipe.likelihood.gamma,
        timesteps_per_pair=recipe.likelihood.timesteps_per_pair,
        timesteps=TimestepSampling(**recipe.likelihood.timesteps.model_dump()),
        keep_residual="output_gradient" in build(objective or recipe.objective).needs,
        guidance=sampler.guidance,
        sampling_steps=sampler.steps,
        sampler=sampler.scheduler,
        negative_prompt=sampler.negative_prompt,
        sample_batch=sampler.batch_size,
        vae_batch=sampler.vae_batch_size,
        seed=recipe.seed,
    )


def open_model(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> tuple[ImageAdapter, Model]:
    import torch

    from polyalign.modalities.image.adapter import ImageAdapter

    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    adapter = ImageAdapter(settings_of(recipe, run, objective))
    return adapter, adapter.load()


def open_trained(recipe: ImageRecipe, run: RunFolder, trained: Path | None) -> tuple[ImageAdapter, Model]:
    """The base (None), or what an export folder holds: a LoRA on the base, or a whole model."""
    if trained is not None and recipe.model.train == "full":
        # what says where in a repository, or how a single file is read, is of the base and not of the folder that was written
        own = {"base": str(trained), "network": None, "variant": None, "revision": None, "single_file_config": None}
        return open_model(recipe.model_copy(update={"model": recipe.model.model_copy(update=own)}), run)
    adapter, model = open_model(recipe, run)
    return adapter, model if trained is None else adapter.load_lora(model, trained)


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The conditions that a recipe asks for."""
    if prompts.file is not None:
        return load_prompts(prompts.file, limit=prompts.count)
    from polyalign.datasets.worlds import shapes

    assert prompts.count is not None  # the schema asks for it with a world
    return shapes.prompts(prompts.split, prompts.count, seed)


def model_files(recipe: ImageRecipe) -> dict[str, Any]:
    """Hashes of the files that the model is read from, as an input of stages; see
    :func:`polyalign.modalities.fingerprints.model_files`."""
    model = recipe.model
    return fingerprints.model_files(
        {
            "base": str(TINY_BASE) if model.base == "tiny" else model.base,
            "single_file_config": model.single_file_config,
            **({"network": model.network} if model.network is not None else {}),
        }
    )


def _tell_beta(adapter: ImageAdapter, model: Model, objective: ObjectiveSpec, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what beta is in every convention, for latents of this model's size."""
    if not rows:
        return  # rounds make their pairs later, and nothing says how large they are
    latents = adapter.prepare(model, rows, step=0).tensors["latents"]
    tell_beta(objective, elements=latents[0, 0].numel(), steps=model.parts["schedule"].steps)


def measured(recipe: ImageRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward`` on the pairs that were kept aside, where the recipe asks for it."""
    from polyalign.modalities.image.rewards import rewards_measured

    return rewards_measured(recipe, run, asked)


ROOM = Room("picture", open_model, model_files, conditions_of, _tell_beta, measured=measured, label_store=PictureLabelStore)
"""What this modality gives to the training that all share."""
