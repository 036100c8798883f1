"""The training of a vision-language run: the model that a recipe describes, and what the training that all modalities share
asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder
from polyalign.modalities.arms import Room
from polyalign.modalities.token_training import TokenModels, askable, pairs_that_fit, shared_settings, tell_beta, trainable
from polyalign.modalities.vlm.config import TINY_BASE, PromptsConfig, VlmRecipe

if TYPE_CHECKING:
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.modalities.vlm.adapter import VlmAdapter
    from polyalign.modalities.vlm.settings import VlmModelSettings


BRANCHES = {
    "visual triples": ("chosen", "response", "image"),
    "visual eights": (
        "chosen",
        "response",
        "image",
        "image+response",
        "context",
        "context+response",
        "context+image",
        "context+image+response",
    ),
}
"""The candidates that objectives compare, in order, by the data that they ask for. Of objectives that name their branches it is
chosen and these, of others chosen and response."""


def branches_of(recipe: VlmRecipe, objective: ObjectiveSpec | None = None) -> tuple[str, ...]:
    """The candidates of a pair: those that the recipe names, or that the objective needs.

    Raises:
        UserError: the recipe names other ones than the objective's terms are about.
    """
    from polyalign.core.objectives.table import build
    from polyalign.modalities.vlm.settings import losing_in

    built, named = build(objective or recipe.objective), recipe.prepare.branches
    if built.branches:
        asked = ("chosen", *built.branches)
        if named is not None and list(map(losing_in, named)) != list(map(losing_in, asked)):
            raise UserError(
                f"prepare.branches is {list(named)}, and the terms of the objective {built.name} are about {list(asked)}, in "
                "this order. Leave prepare.branches out: the objective says what it needs"
            )
        return asked
    if named is not None:
        return named
    return next((branches for name, branches in BRANCHES.items() if name in built.data), ("chosen", "response"))


def settings_of(recipe: VlmRecipe, run: RunFolder | None = None, objective: ObjectiveSpec | None = None) -> VlmModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.modalities.vlm.settings import VlmModelSettings

    given = shared_settings(recipe, objective)
    cache = given.pop("cache_folder")
    branches = branches_of(recipe, objective)
    return VlmModelSettings(
        **{**given, "branches": branches, "cache_folder": None if cache is None else Path(cache).expanduser()}
    )


def _adapter_of(recipe: VlmRecipe, run: RunFolder | None, objective: ObjectiveSpec | None) -> VlmAdapter:
    from polyalign.modalities.vlm.adapter import VlmAdapter

    return VlmAdapter(settings_of(recipe, run, objective))


MODELS = TokenModels(_adapter_of, TINY_BASE)
open_model, open_start, open_trained = MODELS.open_model, MODELS.open_start, MODELS.open_trained


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The questions that a recipe asks for. ``group`` is the number and arrangement of a question's pictures.

    Raises:
        UserError: the file, or a picture that it names, cannot be read.
    """
    if prompts.file is not None:
        from polyalign.datasets.visual_prompts import load_visual_prompts

        return [grouped(one) for one in load_visual_prompts(prompts.file, limit=prompts.count)]
    from polyalign.datasets.visual_prompts import last_words
    from polyalign.datasets.worlds import scenes_rows

    assert prompts.count is not None  # the schema asks for it with a world
    made = [
        scenes_rows.rows(prompts.split, prompts.count, seed, pictures=number, tasks=prompts.tasks, format=arrangement)
        for arrangement, numbers in prompts.pictures.items()
        for number in numbers
    ]
    return [
        grouped({"prompt": last_words(row["condition"]["messages"]), **row["condition"], "chosen": row["chosen"]})
        for rows in made
        for row in rows
    ]


def grouped(condition: dict[str, Any]) -> dict[str, Any]:
    """The condition with its ``group``, unless it has one."""
    if "group" in condition:
        return condition
    layout = condition.get("layout") or {}
    number = len(layout.get("places") or condition.get("images") or ())
    arrangement = str(layout.get("format", "sequence")).replace("_", " ")
    name = "no picture" if not number else "1 picture" if number == 1 else f"{number} pictures, {arrangement}"
    return {**condition, "group": name}


def named_pictures(prompts: PromptsConfig) -> Sequence[Path]:
    """The pictures that a file of questions names."""
    from polyalign.datasets import visual_prompts

    return visual_prompts.named_pictures(prompts.file) if prompts.file else ()


def places_of(prompts: PromptsConfig) -> Sequence[str]:
    """Where each question stands in the file; nothing of a world's."""
    from polyalign.datasets import visual_prompts

    return visual_prompts.places(prompts.file, limit=prompts.count) if prompts.file else ()


def tables(evaluation: Mapping[str, Any], conditions: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """``groups``: how many answers are right by the number and arrangement of pictures and by task, where the judge says from
    which score on one is."""
    from polyalign.evaluation.groups import ALL
    from polyalign.evaluation.groups import grouped as shares
    from polyalign.evaluation.pictured import key_of

    judge, items = evaluation["judge"], evaluation["items"]
    if "right_from" not in judge:
        return {}
    others = {"aligned": [item["aligned_score"] for item in items]}
    others |= {name: [item["arms"][name]["score"] for item in items] for name in evaluation["arms"]}
    base, clusters = [item["base_score"] for item in items], [key_of(condition) for condition in conditions]
    titles = {"Pictures": "group", "Task": "task"}
    found = {}
    for title, key in titles.items():
        named = [str(condition.get(key, "none")) for condition in conditions]
        named = [f"'{name}'" if name == ALL else name for name in named]  # a task may be called so
        if len(set(named)) > 1 or key == "group":
            limits = {"right_from": judge["right_from"], "broken_below": judge.get("broken_below"), "clusters": clusters}
            found[title] = shares(base, others, named, seed, **limits)
    return {"groups": found}


ROOM = Room(
    "text",
    open_start,
    MODELS.model_files,
    conditions_of,
    tell_beta,
    pairs_that_fit,
    trainable,
    pictured=True,
    tables=tables,
    named_by=named_pictures,
    askable=askable,
    places_of=places_of,
)
"""What this modality gives to the training that all share."""
