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
from polyalign.datasets.formats.table import TEXT_FORMATS
from polyalign.modalities import verbs
from polyalign.modalities.arms import train_arms
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.text.config import TextRecipe
from polyalign.modalities.text.training import ROOM, open_trained

SCHEMA = TextRecipe
STAGES = ("generate", "train", "evaluate", "report")
CAPABILITIES = frozenset({"value", "per_unit", "dense_kl", "confidence"})

Condition = Mapping[str, Any]


def refuse_early(recipe: TextRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such judge; no such file of prompts to evaluate on, or chat template; a reference that full training
        cannot
            have, or that no recipe can load; an objective that needs more than pairs; a beta for squared errors.
    """
    from polyalign.core.objectives.serves import Offer

    verbs.refuse_unfit_judges(recipe, ROOM.outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    fingerprint(recipe.model.chat_template)
    verbs.refuse_seats(recipe, who="a text recipe", loader="TextAdapter.load_lora(model, folder, ")
    verbs.refuse_objectives(recipe, Offer("a text recipe", "token", CAPABILITIES))
    _refuse_beta(recipe)


def _refuse_beta(recipe: TextRecipe) -> None:
    """Raises UserError for a beta whose convention means nothing on log-probabilities."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    for key, spec in {"objective": recipe.objective, **{f"arms.{name}": arm for name, arm in recipe.arms.items()}}.items():
        try:
            Beta.of(spec.beta).effective(Unit("token"))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def _base_of(recipe: TextRecipe) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it. Full training loads it in float32, and an
    adapter on 4 bits loads it in these."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    changed = {"full": {"dtype": "float32"}, "qlora": {"bits": 4}}
    return base | changed.get(recipe.model.train, {})


def generate(recipe: TextRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="text")
    refuse_early(recipe)
    samples_of = {"model": _base_of(recipe), "sampler": recipe.sampler}
    verbs.generate(ROOM, recipe, run, formats=TEXT_FORMATS, samples_of=samples_of)


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


def export(recipe: TextRecipe, run: RunFolder, destination: Path) -> None:
    """The trained weights, where the user wants them: what peft or transformers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination)
