"""The stages of an audio run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import SOUND_FORMATS
from polyalign.modalities import denoising, verbs
from polyalign.modalities.arms import cache_of, train_arms
from polyalign.modalities.audio.config import AudioRecipe
from polyalign.modalities.audio.training import ROOM, open_model, open_trained
from polyalign.modalities.content_cache import tell_size

if TYPE_CHECKING:
    from polyalign.datasets.audio.waves import Wave

__all__ = ["SCHEMA", "STAGES", "evaluate", "export", "generate", "open_model", "open_trained", "report", "train"]

SCHEMA = AudioRecipe
STAGES = ("generate", "train", "evaluate", "report")

Condition = Mapping[str, Any]


def refuse_early(recipe: AudioRecipe) -> None:
    """See :func:`polyalign.modalities.denoising.refuse_early`; and judges of strategies that cannot be told apart."""
    from polyalign.modalities.audio.strategies import refuse_judges

    denoising.refuse_early(recipe, ROOM.outputs, who="an audio recipe", loader="AudioAdapter.load_lora(model, folder, ")
    if recipe.pairs.source == "strategies":
        refuse_judges(recipe.pairs.judges)


def generate(recipe: AudioRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="audio")
    refuse_early(recipe)
    samples_of = {"model": denoising.base_of(recipe), "sampler": recipe.sampler, "seconds": recipe.prepare.seconds}
    verbs.generate(ROOM, recipe, run, formats=SOUND_FORMATS, samples_of=samples_of, makers={"strategies": _by_strategies})


def _by_strategies(recipe: AudioRecipe, run: RunFolder, adapter: Any, model: Any) -> None:
    from polyalign.modalities.audio.pairs import strategy_pairs

    pairs, sampler = recipe.pairs, recipe.sampler.model_dump(mode="json")
    conditions = ROOM.conditions_of(pairs.prompts, recipe.seed)
    strategy_pairs(adapter, model, conditions, pairs, folder=run / "pairs", seed=recipe.seed, sampler=sampler)


def train(recipe: AudioRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arms(ROOM, recipe, run)
    if not run.planning and os.environ.get("RANK", "0") == "0":
        tell_size(cache_of(recipe, run))


def evaluate(recipe: AudioRecipe, run: RunFolder) -> None:
    """Base and aligned on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``."""
    verbs.refuse_several_processes("evaluate", run, modality="audio")
    verbs.evaluate(ROOM, recipe, run, partial(sampled, recipe, run))


def sampled(
    recipe: AudioRecipe, run: RunFolder, name: str, trained: Path | None, conditions: Sequence[Condition], seeds: Sequence[int]
) -> tuple[list[Wave], list[str]]:
    """Sounds of one model, written to ``samples/NAME`` batch by batch; those already there are read again, not made again."""
    from polyalign.datasets.audio.waves import encode_flac, read

    adapter, model = open_trained(recipe, run, trained)
    size = recipe.sampler.batch_size
    files = verbs.sampled_files(
        adapter, model, run, name, conditions, seeds, batch_size=size, ending=".flac", encode=encode_flac
    )
    return [read(run / file) for file in files], files


def report(recipe: AudioRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: AudioRecipe, run: RunFolder, destination: Path, arm: str | None = None) -> None:
    """The trained weights, or those of an arm, where the user wants them: a LoRA in peft's format, or the whole model
    in its family's layout.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination, arm)
