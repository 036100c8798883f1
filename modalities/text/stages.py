"""The stages of a text run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import TEXT_SOURCES
from polyalign.modalities import verbs
from polyalign.modalities.arms import train_arms
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.held_out import keeps_pairs
from polyalign.modalities.text.config import IN_DISTRIBUTION, TINY_BASE, TextRecipe
from polyalign.modalities.text.training import ROOM, open_trained
from polyalign.modalities.token_refusals import CAPABILITIES, base_of, refuse_base, refuse_beta, refuse_start
from polyalign.modalities.token_training import for_evaluation

SCHEMA = TextRecipe
STAGES = ("generate", "train", "evaluate", "report")

Condition = Mapping[str, Any]


def refuse_early(recipe: TextRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such base, or no model in it; no such judge; no such file of prompts to evaluate on, chat template,
            adapter or pair store; a reference that full training cannot have, or that no recipe can load; an objective that
            needs what the recipe does not give; a beta for squared errors.
    """
    from polyalign.core.objectives.serves import Offer

    refuse_base(recipe, TINY_BASE)
    if recipe.pairs.location is not None and not Path(recipe.pairs.location).exists():
        fingerprint(recipe.pairs.location)  # it says what is missing
    verbs.refuse_unfit_judges(recipe, ROOM.outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    fingerprint(recipe.model.chat_template)
    verbs.refuse_seats(recipe, who="a text recipe", loader="TextAdapter.load_lora(model, folder, ")
    refuse_start(recipe)
    verbs.refuse_labels(recipe, "token", "answers to")
    data: frozenset[Any] = frozenset({"labels" if recipe.pairs.labelled else "pairs"})
    verbs.refuse_objectives(recipe, Offer("a text recipe", "token", CAPABILITIES, data))
    refuse_beta(recipe)
    _refuse_rewards(recipe)


def _refuse_rewards(recipe: TextRecipe) -> None:
    """Raises UserError where rewards would be compared on pairs that are not there, or in distribution alone."""
    rewards = recipe.evaluate.rewards
    if rewards is None:
        return
    for place in rewards.splits.values():
        fingerprint(place)
    if IN_DISTRIBUTION not in rewards.splits and not keeps_pairs(recipe):
        raise UserError(
            f"evaluate.rewards.splits needs '{IN_DISTRIBUTION}', a pair store, since this recipe keeps no pairs aside: it does "
            "so where pairs are made or read before the training and evaluate.prompts is left out (evaluate.held_out)"
        )
    if not set(rewards.splits) - {IN_DISTRIBUTION}:
        raise UserError(
            "evaluate.rewards.splits needs one or more pair stores out of distribution, such as 'prompt shift' or 'response "
            "shift'"
        )


def generate(recipe: TextRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="text")
    refuse_early(recipe)
    samples_of = {"model": base_of(recipe), "sampler": recipe.sampler}
    verbs.generate(ROOM, recipe, run, formats=TEXT_SOURCES, samples_of=samples_of)


def train(recipe: TextRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arms(ROOM, recipe, run)


def evaluate(recipe: TextRecipe, run: RunFolder) -> None:
    """Base and aligned on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``. ``samples/outputs.jsonl``
    has the answers of all models side by side."""
    verbs.refuse_several_processes("evaluate", run, modality="text")
    verbs.evaluate(ROOM, recipe, run, partial(sampled, recipe, run), finish=partial(write_side_by_side, run))


def sampled(
    recipe: TextRecipe, run: RunFolder, name: str, trained: Path | None, conditions: Sequence[Condition], seeds: Sequence[int]
) -> tuple[list[str], None]:
    """Answers of one model, written to ``samples/NAME`` batch by batch; those already there are read again, not made again."""
    adapter, model = open_trained(for_evaluation(recipe), trained)
    return verbs.sampled_texts(adapter, model, run, name, conditions, seeds, batch_size=recipe.sampler.batch_size), None


def write_side_by_side(
    run: RunFolder, outputs: Mapping[str, Sequence[str]], conditions: Sequence[Condition], seeds: Sequence[int]
) -> None:
    """``samples/outputs.jsonl``: a line for each prompt and seed, with what every model answered."""
    rows = [
        {**condition, "seed": seed, **{name: answers[index] for name, answers in outputs.items()}}
        for index, (condition, seed) in enumerate(zip(conditions, seeds, strict=True))
    ]
    atomic_write(run / "samples" / "outputs.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def report(recipe: TextRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: TextRecipe, run: RunFolder, destination: Path, arm: str | None = None) -> None:
    """The trained weights, or those of an arm, where the user wants them: what peft or transformers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination, arm)
