"""The stages of an image run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import IMAGE_SOURCES
from polyalign.modalities import denoising, verbs
from polyalign.modalities.arms import cache_of, train_arms
from polyalign.modalities.content_cache import tell_size
from polyalign.modalities.denoising import base_of
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.training import ROOM, open_model, open_trained

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SCHEMA", "STAGES", "evaluate", "export", "generate", "open_model", "open_trained", "report", "train"]

SCHEMA = ImageRecipe
STAGES = ("generate", "train", "evaluate", "report")

Condition = Mapping[str, Any]


def refuse_early(recipe: ImageRecipe) -> None:
    """See :func:`polyalign.modalities.denoising.refuse_early`."""
    denoising.refuse_early(recipe, ROOM.outputs, who="an image recipe", loader="ImageAdapter.load_lora(model, file, ")


def generate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="image")
    refuse_early(recipe)
    samples_of = {"model": base_of(recipe), "sampler": recipe.sampler, "resolution": recipe.prepare.resolution}
    verbs.generate(ROOM, recipe, run, formats=IMAGE_SOURCES, samples_of=samples_of)


def train(recipe: ImageRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arms(ROOM, recipe, run)
    if not run.planning and os.environ.get("RANK", "0") == "0":
        tell_size(cache_of(recipe, run))


def evaluate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Base and aligned on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``."""
    verbs.refuse_several_processes("evaluate", run, modality="image")
    verbs.evaluate(ROOM, recipe, run, partial(sampled, recipe, run))


def sampled(
    recipe: ImageRecipe, run: RunFolder, name: str, trained: Path | None, conditions: Sequence[Condition], seeds: Sequence[int]
) -> tuple[list[Image.Image], list[str]]:
    """Pictures of one model, written to ``samples/NAME`` batch by batch; those already there are read again, not made again."""
    from PIL import Image

    from polyalign.datasets.pictures import encode_png

    adapter, model = open_trained(recipe, run, trained)
    size = recipe.sampler.batch_size
    files = verbs.sampled_files(adapter, model, run, name, conditions, seeds, batch_size=size, ending=".png", encode=encode_png)
    return [Image.open(run / file).convert("RGB") for file in files], files


def report(recipe: ImageRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: ImageRecipe, run: RunFolder, destination: Path, arm: str | None = None) -> None:
    """The trained weights, or those of an arm, where the user wants them: what diffusers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination, arm)
