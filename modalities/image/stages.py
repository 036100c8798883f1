"""The stages of an image run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import IMAGE_SOURCES
from polyalign.modalities import verbs
from polyalign.modalities.arms import cache_of, train_arms
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.held_out import keeps_pairs
from polyalign.modalities.image.cache import tell_size
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.training import ROOM, open_model, open_trained

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SCHEMA", "STAGES", "evaluate", "export", "generate", "open_model", "open_trained", "report", "train"]

SCHEMA = ImageRecipe
STAGES = ("generate", "train", "evaluate", "report")

Condition = Mapping[str, Any]


def refuse_early(recipe: ImageRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such judge; no such file of prompts to evaluate on; a reference that full training cannot have, or that
            no recipe can load; an objective that needs what the recipe does not give; nothing to measure the implicit reward
            on.
    """
    from polyalign.core.objectives.serves import Offer

    verbs.refuse_unfit_judges(recipe, ROOM.outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    verbs.refuse_seats(recipe, who="an image recipe", loader="ImageAdapter.load_lora(model, file, ")
    if recipe.train.stop is not None:
        raise UserError(
            "train.stop watches the likeliest next tokens of a language model, and an image recipe has none. Leave it out"
        )
    data: frozenset[Any] = frozenset({"labels" if recipe.pairs.labelled else "pairs"})
    verbs.refuse_labels(recipe, "timestep", "pictures of")
    verbs.refuse_objectives(recipe, Offer("an image recipe", "timestep", frozenset({"value", "output_gradient"}), data))
    _refuse_rounds(recipe)
    if recipe.evaluate.implicit_reward is not None and not keeps_pairs(recipe):
        raise UserError(
            "evaluate.implicit_reward is measured on pairs that took no part in training, and this recipe keeps none aside: it "
            "does so where pairs are made or read before the training and evaluate.prompts is left out (evaluate.held_out)"
        )


def _refuse_rounds(recipe: ImageRecipe) -> None:
    """Raises UserError for what rounds have for language models alone."""
    online = recipe.online
    if online is not None and (online.mixture > 0.0 or online.lists):
        key = "mixture" if online.mixture > 0.0 else "lists"
        raise UserError(f"online.{key} is for language models, and this is an image recipe. Leave it out")


def _base_of(recipe: ImageRecipe) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it (full training loads it in float32)."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    return base | ({"dtype": "float32"} if recipe.model.train == "full" else {})


def generate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="image")
    refuse_early(recipe)
    samples_of = {"model": _base_of(recipe), "sampler": recipe.sampler, "resolution": recipe.prepare.resolution}
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
    files = [f"samples/{name}/{index:05d}.png" for index in range(len(conditions))]
    (run / "samples" / name).mkdir(parents=True, exist_ok=True)
    size = recipe.sampler.batch_size
    with ProgressLine(f"sampling, {name}", total=len(files)) as line:
        for part in (slice(start, start + size) for start in range(0, len(files), size)):
            if not all((run / file).exists() for file in files[part]):
                for file, picture in zip(files[part], adapter.sample(model, conditions[part], seeds[part]), strict=True):
                    atomic_write(run / file, encode_png(picture))
            line.advance(count=len(files[part]))
    return [Image.open(run / file).convert("RGB") for file in files], files


def report(recipe: ImageRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: ImageRecipe, run: RunFolder, destination: Path) -> None:
    """The trained weights, where the user wants them: what diffusers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination)
