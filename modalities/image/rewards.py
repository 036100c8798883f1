"""The implicit reward of an image run on pairs that were not trained on: how often it agrees with the preference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.randomness import permutation
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.held_out import split_pairs
from polyalign.modalities.image.config import ImageRecipe

if TYPE_CHECKING:
    from polyalign.core.adapter import Model, Row
    from polyalign.core.references import Seat
    from polyalign.modalities.image.adapter import ImageAdapter


def rewards_measured(recipe: ImageRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """``implicit_reward``: accuracy of the aligned model's implicit reward against what training began with, on the pairs kept
    aside, where the recipe asks for it. Captions are kept and pictures are not mirrored, whatever training did.

    The reward is the log-likelihood ratio whatever the objective: one without a reference (mapo) trains another quantity.
    """
    from polyalign.evaluation.implicit_reward import implicit_reward_accuracy

    wanted = recipe.evaluate.implicit_reward
    if wanted is None:
        return {}
    rows = _kept_aside(recipe, asked, wanted.pairs)
    still = recipe.prepare.model_copy(update={"caption_dropout": 0.0, "flip": False, "crop": "centre"})
    plain = recipe.model_copy(update={"prepare": still})
    adapter, model, reference = _policy_and_reference(plain, run, run / "adapter")
    size = recipe.train.micro_batch_size
    return {
        "implicit_reward": implicit_reward_accuracy(
            adapter, model, reference, rows, draws=wanted.draws, batch_size=size, seed=recipe.seed
        )
    }


def _kept_aside(recipe: ImageRecipe, store: PairStore, most: int | None) -> Sequence[Row]:
    kept = split_pairs(recipe.evaluate, recipe.seed, store)[1]
    if most is not None and most < len(kept):
        order = permutation(recipe.seed, len(kept), "implicit reward", 0)
        kept = sorted(kept[place] for place in order[:most])
    return store.rows(kept, decode=False)


def _policy_and_reference(recipe: ImageRecipe, run: RunFolder, trained: Path) -> tuple[ImageAdapter, Model, Seat]:
    """The aligned model, and what its training began with: the base under the LoRA, or a model of its own."""
    from polyalign.core.references import AdapterOff
    from polyalign.core.seats import OtherNetwork
    from polyalign.modalities.image.training import open_model, open_trained

    adapter, model = open_trained(recipe, run, trained)
    if recipe.model.train == "lora":
        return adapter, model, AdapterOff(model.network)
    return adapter, model, OtherNetwork(open_model(recipe, run)[1].network)
