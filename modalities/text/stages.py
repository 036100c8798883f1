"""The stages of a text run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import TEXT_SOURCES
from polyalign.modalities import verbs
from polyalign.modalities.arms import train_arms
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.held_out import keeps_pairs
from polyalign.modalities.loops import specs_of
from polyalign.modalities.text.base_folder import TINY_BASE, local_folder, positions_of, refuse_what_is_no_base
from polyalign.modalities.text.config import IN_DISTRIBUTION, TextRecipe
from polyalign.modalities.text.training import ROOM, open_trained

SCHEMA = TextRecipe
STAGES = ("generate", "train", "evaluate", "report")
CAPABILITIES = frozenset({"value", "per_unit", "dense_kl", "confidence"})

Condition = Mapping[str, Any]


def refuse_early(recipe: TextRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such base, or no model in it; no such judge; no such file of prompts to evaluate on, chat template,
            adapter or pair store; a reference that full training cannot have, or that no recipe can load; an objective that
            needs what the recipe does not give; a beta for squared errors.
    """
    from polyalign.core.objectives.serves import Offer

    _refuse_base(recipe)
    if recipe.pairs.location is not None and not Path(recipe.pairs.location).exists():
        fingerprint(recipe.pairs.location)  # it says what is missing
    verbs.refuse_unfit_judges(recipe, ROOM.outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    fingerprint(recipe.model.chat_template)
    verbs.refuse_seats(recipe, who="a text recipe", loader="TextAdapter.load_lora(model, folder, ")
    _refuse_start(recipe)
    verbs.refuse_labels(recipe, "token", "answers to")
    data: frozenset[Any] = frozenset({"labels" if recipe.pairs.labelled else "pairs"})
    verbs.refuse_objectives(recipe, Offer("a text recipe", "token", CAPABILITIES, data))
    _refuse_beta(recipe)
    _refuse_rewards(recipe)


def _refuse_base(recipe: TextRecipe) -> None:
    """Raises UserError for a folder that is no base, or whose model has no room for as long an answer as is asked for."""
    folder = TINY_BASE if recipe.model.base == "tiny" else local_folder(recipe.model.base)
    if folder is None:  # on a model hub
        return
    refuse_what_is_no_base(folder)
    positions, asked = positions_of(folder), recipe.sampler.max_new_tokens
    if positions is not None and asked >= positions:
        raise UserError(
            f"sampler.max_new_tokens is {asked}, and the model {recipe.model.base} has {positions} positions, for prompt and "
            "answer together. Lower it"
        )


def _refuse_start(recipe: TextRecipe) -> None:
    """Raises UserError for an adapter to go on from that is not there, or that the reference would be without."""
    start, reference = recipe.model.lora.start, recipe.train.reference.seat
    if start is None:
        return
    fingerprint(start)
    if recipe.model.train == "full":
        raise UserError("model.lora.start is a LoRA to go on from, and model.train is full. Set model.train to lora")
    if reference in ("adapter_off", "cached"):
        raise UserError(
            f"train.reference.seat: {reference} is the base without its LoRA, and this training begins with one "
            "(model.lora.start). Set it to frozen, a copy of that LoRA, or to ema or none"
        )
    if recipe.online is not None and recipe.online.mixture > 0.0:
        raise UserError(
            "online.mixture mixes in the base without its LoRA, and this training begins with one (model.lora.start). Leave "
            "one of the two out"
        )


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


def _refuse_beta(recipe: TextRecipe) -> None:
    """Raises UserError for a beta whose convention means nothing on log-probabilities."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    for key, spec in specs_of(recipe).items():
        try:
            Beta.of(spec.beta).effective(Unit("token"))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def _base_of(recipe: TextRecipe) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it. Full training loads it in float32, and an
    adapter on 4 bits loads it in these."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    changed: dict[str, Any] = {"full": {"dtype": "float32"}, "qlora": {"bits": 4}}.get(recipe.model.train, {})
    start = recipe.model.lora.start
    return base | changed | ({} if start is None else {"start": start})


def generate(recipe: TextRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="text")
    refuse_early(recipe)
    samples_of = {"model": _base_of(recipe), "sampler": recipe.sampler}
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
    if recipe.evaluate.temperature is not None:
        sampler = recipe.sampler.model_copy(update={"temperature": recipe.evaluate.temperature})
        recipe = recipe.model_copy(update={"sampler": sampler})
    adapter, model = open_trained(recipe, trained)
    folder, size = run / "samples" / name, recipe.sampler.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    answers: list[str] = []
    with ProgressLine(f"sampling, {name}", total=len(conditions)) as line:
        for start in range(0, len(conditions), size):
            part, file = slice(start, start + size), folder / f"{start // size:05d}.json"
            if not file.is_file():
                made = adapter.sample(model, conditions[part], seeds[part])
                atomic_write(file, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
            answers += json.loads(file.read_text(encoding="utf-8"))
            line.advance(count=len(conditions[part]))
    return answers, None


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
