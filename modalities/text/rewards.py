"""Rewards of a text run on pairs that were not trained on: how often the aligned model's implicit reward agrees with the
preference, and explicit reward models beside it (arXiv 2409.03650)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.adapter import Row
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.evaluation.implicit_reward import implicit_reward_accuracy
from polyalign.evaluation.judges import build
from polyalign.evaluation.reward_accuracy import ImplicitMargins, as_text, compare_rewards
from polyalign.modalities.held_out import split_pairs
from polyalign.modalities.text.config import IN_DISTRIBUTION, TextRecipe
from polyalign.modalities.text.training import open_start, open_trained

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge, Model
    from polyalign.core.references import Seat
    from polyalign.evaluation.reward_accuracy import PairScorer
    from polyalign.modalities.text.adapter import TextAdapter

IMPLICIT = "implicit"


def rewards_measured(recipe: TextRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward``: accuracy on the pairs that were kept aside, where there are any. ``rewards``: explicit rewards
    against the implicit one on the splits of ``evaluate.rewards``. Pairs that are too long for the model take no part.

    The implicit reward is the log-likelihood ratio of the aligned model to the one that training began with, summed over an
    answer's tokens, whatever the objective: one without a reference (simpo) trains another quantity.
    """
    kept = held_out_pairs(recipe, asked)
    wanted = recipe.evaluate.rewards
    if not kept and wanted is None:
        return {}
    adapter, model, reference = policy_and_reference(recipe, run / "adapter")
    fitting = _fitting(adapter, model, kept)
    found: dict[str, Any] = {}
    size = recipe.train.micro_batch_size
    if fitting:
        found["implicit_reward"] = implicit_reward_accuracy(
            adapter, model, reference, fitting, draws=1, batch_size=size, seed=recipe.seed
        )
    if wanted is not None:
        splits = {name: _fitting(adapter, model, _all(Path(place))) for name, place in wanted.splits.items()}
        splits = splits if IN_DISTRIBUTION in splits else {IN_DISTRIBUTION: fitting, **splits}
        scorers: dict[str, Judge | PairScorer] = {judge.name: judge for judge in map(build, wanted.judges)}
        scorers[IMPLICIT] = ImplicitMargins(adapter, model, reference, draws=1, batch_size=size)
        found["rewards"] = compare_rewards(scorers, splits, in_distribution=IN_DISTRIBUTION, seed=recipe.seed)
        print(as_text(found["rewards"]), file=sys.stderr, flush=True)
    return found


def held_out_pairs(recipe: TextRecipe, asked: Any) -> list[Row]:
    """The run's pairs that took no part in training; none where rounds made them, or single answers were trained on."""
    if not isinstance(asked, PairStore) or recipe.evaluate.prompts is not None:
        return []
    return list(asked.rows(split_pairs(recipe.evaluate, recipe.seed, asked)[1]))


def policy_and_reference(recipe: TextRecipe, trained: Path) -> tuple[TextAdapter, Model, Seat]:
    """The aligned model, and what its training began with: the base under the LoRA, or a model of its own."""
    from polyalign.core.references import AdapterOff
    from polyalign.core.seats import OtherNetwork

    adapter, model = open_trained(recipe, trained)
    if recipe.model.train != "full" and recipe.model.lora.start is None:
        return adapter, model, AdapterOff(model.network)
    return adapter, model, OtherNetwork(open_start(recipe)[1].network)


def _fitting(adapter: TextAdapter, model: Model, rows: list[Row]) -> list[Row]:
    lengths = adapter.lengths(model, rows)
    return [row for row, found in zip(rows, lengths, strict=True) if found.reason is None]


def _all(folder: Path) -> list[Row]:
    store = PairStore(folder, "text")
    store.validate()
    return list(store.rows(range(len(store))))
