"""The training of a text run: the model that a recipe describes, and what the training that all modalities share asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.progress import ProgressLine
from polyalign.core.run import RunFolder
from polyalign.datasets.prompts import load_prompts, places
from polyalign.modalities.arms import Room, Selected
from polyalign.modalities.text.config import TINY_BASE, PromptsConfig, TextRecipe
from polyalign.modalities.token_training import (
    MEASURED,
    TokenModels,
    askable,
    pairs_that_fit,
    shared_settings,
    tell_beta,
    trainable,
)

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.modalities.text.adapter import TextAdapter
    from polyalign.modalities.text.settings import TextModelSettings


def settings_of(recipe: TextRecipe, objective: ObjectiveSpec | None = None) -> TextModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.modalities.text.settings import TextModelSettings

    return TextModelSettings(**shared_settings(recipe, objective))


def _adapter_of(recipe: TextRecipe, _run: RunFolder | None, objective: ObjectiveSpec | None) -> TextAdapter:
    """Texts need no cache in the run folder."""
    from polyalign.modalities.text.adapter import TextAdapter

    return TextAdapter(settings_of(recipe, objective))


MODELS = TokenModels(_adapter_of, TINY_BASE)
open_model, open_start, open_trained = MODELS.open_model, MODELS.open_start, MODELS.open_trained


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The conditions that a recipe asks for.

    Raises:
        UserError: the file cannot be read; ``chat`` for prompts that are conversations already.
    """
    if prompts.file is not None:
        conditions = load_prompts(prompts.file, limit=prompts.count)
    else:
        from polyalign.datasets.worlds import clinical

        assert prompts.count is not None  # the schema asks for it with a world
        conditions = clinical.prompts(prompts.split, prompts.count, seed)
    return [_asked(condition, prompts) for condition in conditions] if prompts.chat else conditions


def places_of(prompts: PromptsConfig) -> Sequence[str]:
    """Where each prompt stands in the file; nothing of a world's."""
    return places(prompts.file, limit=prompts.count) if prompts.file is not None else ()


def _asked(condition: Mapping[str, Any], prompts: PromptsConfig) -> dict[str, Any]:
    """The condition as a user's turn."""
    if "messages" in condition:
        raise UserError(
            f"prompts.chat: the prompt {condition['prompt'][:60]!r} has 'messages' already, the turns of its own conversation. "
            "Leave chat out"
        )
    system = [{"role": "system", "content": prompts.system}] if prompts.system is not None else []
    return {**condition, "messages": [*system, {"role": "user", "content": condition["prompt"]}]}


def selected(recipe: TextRecipe, adapter: TextAdapter, model: Model, store: Any, indices: Sequence[int]) -> Selected:
    """The pairs that fit, and of these those that ``pairs.filter`` keeps.

    Raises:
        UserError: see :func:`pairs_that_fit` and :mod:`polyalign.core.pair_ranking`.
    """
    fitting = pairs_that_fit(recipe, adapter, model, store, indices)
    if recipe.pairs.filter is None:
        return fitting
    from polyalign.core.pair_ranking import ches_of_pairs, keep_lowest
    from polyalign.modalities.text.adapter import TextAdapter

    given = recipe.pairs.filter.ches
    ranking = TextAdapter(replace(adapter.settings, dense=frozenset({"hidden"})))
    scores: list[float] = []
    with ProgressLine("ranking pairs by CHES", total=len(fitting.indices)) as line:
        for start in range(0, len(fitting.indices), MEASURED):
            rows = store.rows(list(fitting.indices[start : start + MEASURED]))
            scores += ches_of_pairs(ranking, model, rows, normalised=given.normalised)
            line.advance(count=len(rows))
    kept = keep_lowest(scores, given.keep)
    left = len(scores) - len(kept)
    print(f"{store.folder}: {len(kept)} of {len(scores)} pairs are trained on, those with the lowest CHES", file=sys.stderr)
    return Selected([fitting.indices[place] for place in kept], {**fitting.card, "above_ches": left})


def measured(recipe: TextRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward`` on the pairs that were kept aside, where there are any, and ``rewards`` where the recipe asks."""
    from polyalign.modalities.text.rewards import rewards_measured

    return rewards_measured(recipe, run, asked)


ROOM = Room(
    "text",
    open_start,
    MODELS.model_files,
    conditions_of,
    tell_beta,
    selected,
    trainable,
    measured,
    askable=askable,
    places_of=places_of,
)
"""What this modality gives to the training that all share."""
