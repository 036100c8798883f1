"""The training of language models, of text alone or with pictures: what their two modalities do alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder
from polyalign.datasets.files import listed
from polyalign.modalities import fingerprints
from polyalign.modalities.arms import Named, Selected

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec

MODEL_FILES = fingerprints.MODEL_FILES | {".jinja"}
DENSE = {"dense_kl": "kl", "confidence": "confidence", "runner_up": "runner_up"}
"""Statistics of whole distributions, by the capability that an objective asks for."""

NAMED = 20  # prompts that are too long, by name
MEASURED = 256  # pairs whose lengths are looked at together


def shared_settings(recipe: Any, objective: ObjectiveSpec | None = None) -> dict[str, Any]:
    """What the settings of both adapters take from a recipe; the sections of :mod:`polyalign.modalities.token_recipe`."""
    from polyalign.core.objectives.table import build

    model, prepare, sampler = recipe.model, recipe.prepare, recipe.sampler
    needs = build(objective or recipe.objective).needs
    dense = [statistic for capability, statistic in DENSE.items() if capability in needs]
    return {
        **model.model_dump(exclude={"lora"}),
        **model.lora.model_dump(exclude={"start"}),
        **prepare.model_dump(exclude={"on_long"}),
        **recipe.likelihood.model_dump(exclude={"top_k"}),
        "dense": frozenset([*dense, *(["top_k"] if recipe.likelihood.top_k or recipe.train.stop else [])]),
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "max_new_tokens": sampler.max_new_tokens,
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "sample_batch": sampler.batch_size,
        "seed": recipe.seed,
    }


@dataclass(frozen=True)
class TokenModels:
    """How a modality's models are opened. ``adapter_of(recipe, run, objective)`` makes its adapter; ``tiny_base`` is the folder
    of its embedded base."""

    adapter_of: Callable[[Any, RunFolder | None, ObjectiveSpec | None], Any]
    tiny_base: Path

    def open_model(
        self, recipe: Any, run: RunFolder | None = None, objective: ObjectiveSpec | None = None
    ) -> tuple[Any, Model]:
        """The adapter and the base."""
        import torch

        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        adapter = self.adapter_of(recipe, run, objective)
        return adapter, adapter.load()

    def open_start(
        self, recipe: Any, run: RunFolder | None = None, objective: ObjectiveSpec | None = None
    ) -> tuple[Any, Model]:
        """What training begins with: the base, with the LoRA on it that ``model.lora.start`` names."""
        adapter, model = self.open_model(recipe, run, objective)
        start = recipe.model.lora.start
        return adapter, model if start is None else adapter.load_lora(model, Path(start))

    def open_trained(self, recipe: Any, trained: Path | None, run: RunFolder | None = None) -> tuple[Any, Model]:
        """The base (None), or what an export folder holds: a LoRA on the base, or a whole model."""
        if trained is not None and recipe.model.train == "full":
            own = {"base": str(trained), "revision": None}  # a revision is of the base's repository
            whole = recipe.model_copy(update={"model": recipe.model.model_copy(update=own)})
            return self.open_model(whole, run)
        if trained is None:
            return self.open_start(recipe, run)
        adapter, model = self.open_model(recipe, run)
        return adapter, adapter.load_lora(model, trained)

    def model_files(self, recipe: Any) -> dict[str, Any]:
        """Hashes of the files that the model is read from, as an input of stages; see
        :func:`polyalign.modalities.fingerprints.model_files`."""
        model = recipe.model
        base = str(self.tiny_base) if model.base == "tiny" else model.base
        places = {"base": base, "chat_template": model.chat_template, "start": model.lora.start}
        return fingerprints.model_files(places, endings=MODEL_FILES)


def for_evaluation(recipe: Any) -> Any:
    """The recipe with the sampler of its evaluation."""
    if recipe.evaluate.temperature is None:
        return recipe
    sampler = recipe.sampler.model_copy(update={"temperature": recipe.evaluate.temperature})
    return recipe.model_copy(update={"sampler": sampler})


def trainable(recipe: Any, adapter: Any, model: Model) -> Model:
    """The model with a fresh LoRA, the one that it came with, or all of its network, to be trained."""
    return adapter.trainable(model, fresh=recipe.model.lora.start is None)


def pairs_that_fit(recipe: Any, adapter: Any, model: Model, store: Any, indices: Sequence[int]) -> Selected:
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


def askable(recipe: Any, adapter: Any, model: Model, conditions: Sequence[Any], named: Named) -> list[int]:
    """The places of the conditions of the evaluation whose prompts leave room for an answer. Pairs that are kept aside may be
    left out with ``prepare.on_long``; prompts that the recipe gives may not.

    Raises:
        UserError: some leave no room, and are not to be left out; or all of them.
    """
    positions, room = model.parts["positions"], recipe.sampler.max_new_tokens
    if positions is None:
        return list(range(len(conditions)))
    kept, long = [], {}
    for place, condition in enumerate(conditions):
        tokens, about = adapter.prompt_length(model, condition, where=f"condition {place} of the evaluation")
        if tokens + room <= positions:
            kept.append(place)
        else:
            more = f"with sampler.max_new_tokens ({room}) is more than the model's {positions} positions"
            long[place] = f"its prompt has {tokens} tokens{about}, which {more}"
    if not long:
        return kept
    names = named(list(long)[:NAMED])
    problems = [": ".join(words) for words in zip_longest(names, long.values(), fillvalue="")]
    aside = recipe.evaluate.prompts is None
    which = "prompts kept aside for the evaluation (evaluate.held_out)" if aside else "prompts of evaluate.prompts"
    said = f"{len(long)} of {len(conditions)} {which} leave no room for an answer"
    if aside and kept and recipe.prepare.on_long == "drop":
        print(f"{said}, and are left out of the evaluation:\n{listed(problems)}", file=sys.stderr, flush=True)
        return kept
    advice = "Prompts are not cut: shorten them, take them out, or lower sampler.max_new_tokens"
    if aside:
        left = "leave such pairs out with prepare.on_long: drop" if kept else "give evaluate.prompts, since none is left"
        advice = f"{advice}; or {left}"
    raise UserError(f"{said}:\n{listed(problems)}\n{advice}")


def tell_beta(_adapter: Any, _model: Model, objective: ObjectiveSpec, _rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what beta is on log-probabilities."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    beta = Beta.of(objective.beta)
    effective = beta.effective(Unit("token"))
    said = f"beta {beta.value:g} ({beta.convention}): a log-ratio of {1 / effective:.3g} nats is a reward of 1"
    print(said, file=sys.stderr, flush=True)
