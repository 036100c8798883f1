"""The training of an audio run: the model that a recipe describes, and what the training that all modalities share asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.run import RunFolder
from polyalign.datasets.prompts import load_prompts
from polyalign.modalities import fingerprints
from polyalign.modalities.arms import Room, cache_of
from polyalign.modalities.audio.config import AudioRecipe, PromptsConfig
from polyalign.modalities.denoising import tell_beta

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.modalities.audio.adapter import AudioAdapter
    from polyalign.modalities.audio.settings import AudioModelSettings

TINY_BASE = Path(__file__).parent / "tiny_base"


def settings_of(recipe: AudioRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> AudioModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.core.likelihood.denoising import TimestepSampling
    from polyalign.core.objectives.table import build
    from polyalign.modalities.audio.settings import AudioModelSettings

    model, prepare, sampler = recipe.model, recipe.prepare, recipe.sampler
    return AudioModelSettings(
        **model.model_dump(exclude={"lora"}),
        **model.lora.model_dump(),
        **prepare.model_dump(exclude={"cache", "cache_folder"}),
        cache_folder=cache_of(recipe, run) if prepare.cache else None,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        **recipe.likelihood.model_dump(exclude={"timesteps"}),
        timesteps=TimestepSampling(**recipe.likelihood.timesteps.model_dump()),
        keep_residual="output_gradient" in build(objective or recipe.objective).needs,
        guidance=sampler.guidance,
        sampling_steps=sampler.steps,
        solver=sampler.solver,
        negative_prompt=sampler.negative_prompt,
        sample_batch=sampler.batch_size,
        codec_batch=sampler.codec_batch_size,
        seed=recipe.seed,
    )


def open_model(recipe: AudioRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> tuple[AudioAdapter, Model]:
    import torch

    from polyalign.modalities.audio.adapter import AudioAdapter

    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    adapter = AudioAdapter(settings_of(recipe, run, objective))
    return adapter, adapter.load()


def open_trained(recipe: AudioRecipe, run: RunFolder, trained: Path | None) -> tuple[AudioAdapter, Model]:
    """The base (None), or what an export folder holds: a LoRA on the base, or a whole model."""
    if trained is not None and recipe.model.train == "full":
        own = {"base": str(trained), "checkpoint": None, "revision": None}  # these are of the base
        return open_model(recipe.model_copy(update={"model": recipe.model.model_copy(update=own)}), run)
    adapter, model = open_model(recipe, run)
    return adapter, model if trained is None else adapter.load_lora(model, trained)


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The conditions that a recipe asks for."""
    if prompts.file is not None:
        conditions = load_prompts(prompts.file, limit=prompts.count)
    else:
        from polyalign.datasets.worlds import sounds

        assert prompts.count is not None  # the schema asks for it with a world
        conditions = sounds.prompts(prompts.split, prompts.count, seed)
    if prompts.select is None:
        return conditions
    from polyalign.modalities.audio.selection import selected

    return selected(conditions, prompts.select, seed)


def model_files(recipe: AudioRecipe) -> dict[str, Any]:
    """Hashes of the files that the model is read from, as an input of stages; see
    :func:`polyalign.modalities.fingerprints.model_files`."""
    model = recipe.model
    base = str(TINY_BASE) if model.base == "tiny" else model.base
    return fingerprints.model_files({"base": base, "checkpoint": model.checkpoint, "tokenizer": model.tokenizer})


def _tell_beta(adapter: AudioAdapter, model: Model, objective: ObjectiveSpec, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what beta is in every convention, for latents of this model's clips."""
    from polyalign.modalities.audio.loading import parts_of

    if not rows:
        return  # rounds make their pairs later
    latents = adapter.prepare(model, rows, step=0).tensors["latents"]
    tell_beta(objective, elements=latents[0, 0].numel(), steps=parts_of(model).schedule.steps)


def measured(recipe: AudioRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward`` on the pairs that were kept aside, where the recipe asks for it."""
    from polyalign.modalities.audio.rewards import rewards_measured

    return rewards_measured(recipe, run, asked)


ROOM = Room("sound", open_model, model_files, conditions_of, _tell_beta, measured=measured)
"""What this modality gives to the training that all share."""
