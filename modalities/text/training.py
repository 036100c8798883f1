"""The training of a text run: the model that a recipe describes, and what the training that all modalities share asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.progress import ProgressLine
from polyalign.core.run import RunFolder
from polyalign.datasets.files import listed
from polyalign.datasets.prompts import load_prompts
from polyalign.modalities import fingerprints
from polyalign.modalities.arms import Room, Selected
from polyalign.modalities.text.config import PromptsConfig, TextRecipe

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.modalities.text.adapter import TextAdapter
    from polyalign.modalities.text.settings import TextModelSettings

TINY_BASE = Path(__file__).parent / "tiny_base"
MODEL_FILES = fingerprints.MODEL_FILES | {".jinja"}
DENSE = {"dense_kl": "kl", "confidence": "confidence"}
"""Statistics of whole distributions, by the capability that an objective asks for."""

MEASURED = 256  # pairs whose lengths are looked at together


def settings_of(recipe: TextRecipe, objective: ObjectiveSpec | None = None) -> TextModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.core.objectives.table import build
    from polyalign.modalities.text.settings import TextModelSettings

    model, prepare, sampler = recipe.model, recipe.prepare, recipe.sampler
    needs = build(objective or recipe.objective).needs
    dense = [statistic for capability, statistic in DENSE.items() if capability in needs]
    return TextModelSettings(
        **model.model_dump(exclude={"lora"}),
        **model.lora.model_dump(exclude={"start"}),
        **prepare.model_dump(exclude={"on_long"}),
        **recipe.likelihood.model_dump(exclude={"top_k"}),
        dense=frozenset([*dense, *(["top_k"] if recipe.likelihood.top_k or recipe.train.stop else [])]),
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        max_new_tokens=sampler.max_new_tokens,
        temperature=sampler.temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        sample_batch=sampler.batch_size,
        seed=recipe.seed,
    )


def open_model(
    recipe: TextRecipe, _run: RunFolder | None = None, objective: ObjectiveSpec | None = None
) -> tuple[TextAdapter, Model]:
    """The adapter and the base; texts need no cache in the run folder."""
    import torch

    from polyalign.modalities.text.adapter import TextAdapter

    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    adapter = TextAdapter(settings_of(recipe, objective))
    return adapter, adapter.load()


def open_start(
    recipe: TextRecipe, run: RunFolder | None = None, objective: ObjectiveSpec | None = None
) -> tuple[TextAdapter, Model]:
    """What training begins with: the base, with the LoRA on it that ``model.lora.start`` names."""
    adapter, model = open_model(recipe, run, objective)
    start = recipe.model.lora.start
    return adapter, model if start is None else adapter.load_lora(model, Path(start))


def trainable(recipe: TextRecipe, adapter: TextAdapter, model: Model) -> Model:
    """The model with a fresh LoRA, the one that it came with, or all of its network, to be trained."""
    return adapter.trainable(model, fresh=recipe.model.lora.start is None)


def open_trained(recipe: TextRecipe, trained: Path | None) -> tuple[TextAdapter, Model]:
    """The base (None), or what an export folder holds: a LoRA on the base, or a whole model."""
    if trained is not None and recipe.model.train == "full":
        own = {"base": str(trained), "revision": None}  # a revision is of the base's repository
        return open_model(recipe.model_copy(update={"model": recipe.model.model_copy(update=own)}))
    if trained is None:
        return open_start(recipe)
    adapter, model = open_model(recipe)
    return adapter, adapter.load_lora(model, trained)


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


def _asked(condition: Mapping[str, Any], prompts: PromptsConfig) -> dict[str, Any]:
    """The condition as a user's turn."""
    if "messages" in condition:
        raise UserError(
            f"prompts.chat: the prompt {condition['prompt'][:60]!r} has 'messages' already, the turns of its own conversation. "
            "Leave chat out"
        )
    system = [{"role": "system", "content": prompts.system}] if prompts.system is not None else []
    return {**condition, "messages": [*system, {"role": "user", "content": condition["prompt"]}]}


def model_files(recipe: TextRecipe) -> dict[str, Any]:
    """Hashes of the files that the model is read from, as an input of stages; see
    :func:`polyalign.modalities.fingerprints.model_files`."""
    model = recipe.model
    base = str(TINY_BASE) if model.base == "tiny" else model.base
    places = {"base": base, "chat_template": model.chat_template, "start": model.lora.start}
    return fingerprints.model_files(places, endings=MODEL_FILES)


def pairs_that_fit(recipe: TextRecipe, adapter: TextAdapter, model: Model, store: Any, indices: Sequence[int]) -> Selected:
    """The pairs of ``indices`` that are not too long.

    Raises:
        UserError: some are, and the recipe does not say that they are to be left out; or all of them.
    """
    kept, problems = [], []
    for start in range(0, len(indices), MEASURED):
        part = list(indices[start : start + MEASURED])
        rows = store.rows(part)
        for index, row, found in zip(part, rows, adapter.lengths(model, rows), strict=True):
            if found.reason is None:
                kept.append(index)
            else:
                tokens = f"prompt {found.prompt} tokens, chosen {found.chosen}, rejected {found.rejected}"
                problems.append(f"pair {row['pair_id']} ({tokens}): {found.reason}")
    if not problems:
        return Selected(kept)
    said = f"{len(problems)} of {len(indices)} pairs are too long:\n{listed(problems)}"
    advice = "Nothing is cut. Raise prepare.max_prompt_tokens, max_completion_tokens or max_length as far as the model goes, or"
    if recipe.prepare.on_long == "error":
        raise UserError(f"{store.folder}: {said}\n{advice} leave such pairs out with prepare.on_long: drop")
    if not kept:
        raise UserError(f"{store.folder}: {said}\nNo pair is left to train on. {advice} take another model")
    print(f"{store.folder}: {len(problems)} of {len(indices)} pairs are too long and are left out", file=sys.stderr, flush=True)
    return Selected(kept, {"too_long": len(problems)})


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


def _tell_beta(_adapter: Any, _model: Model, objective: ObjectiveSpec, _rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what beta is on log-probabilities."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    beta = Beta.of(objective.beta)
    effective = beta.effective(Unit("token"))
    said = f"beta {beta.value:g} ({beta.convention}): a log-ratio of {1 / effective:.3g} nats is a reward of 1"
    print(said, file=sys.stderr, flush=True)


def measured(recipe: TextRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward`` on the pairs that were kept aside, where there are any, and ``rewards`` where the recipe asks."""
    from polyalign.modalities.text.rewards import rewards_measured

    return rewards_measured(recipe, run, asked)


ROOM = Room("text", open_start, model_files, conditions_of, _tell_beta, selected, trainable, measured)
"""What this modality gives to the training that all share."""
