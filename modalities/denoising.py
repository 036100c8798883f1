"""What the runs of all denoising modalities share: what is refused early, what beta means, the implicit reward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.randomness import permutation
from polyalign.datasets.pairs import PairStore
from polyalign.modalities import verbs
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.held_out import keeps_pairs, split_pairs

if TYPE_CHECKING:
    from polyalign.core.adapter import Model, Row
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.references import Seat

Opened = tuple[Any, "Model"]


def refuse_early(recipe: Any, outputs: str, *, who: str, loader: str) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Args:
        outputs: the kind. who: the recipe, in words. loader: as for :func:`polyalign.modalities.verbs.refuse_seats`.

    Raises:
        UserError: no such judge; no such file of prompts to evaluate on; a reference that full training cannot have, or that
            no recipe can load; an objective that needs what the recipe does not give; nothing to measure the implicit reward
            on; what only language models have.
    """
    from polyalign.core.objectives.serves import Offer

    verbs.refuse_unfit_judges(recipe, outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    verbs.refuse_seats(recipe, who=who, loader=loader)
    if recipe.train.stop is not None:
        raise UserError(f"train.stop watches the likeliest next tokens of a language model, and {who} has none. Leave it out")
    data: frozenset[Any] = frozenset({"labels" if recipe.pairs.labelled else "pairs"})
    verbs.refuse_labels(recipe, "timestep", f"{outputs}s of")
    verbs.refuse_objectives(recipe, Offer(who, "timestep", frozenset({"value", "output_gradient"}), data))
    online = recipe.online
    if online is not None and (online.mixture > 0.0 or online.lists):
        key = "mixture" if online.mixture > 0.0 else "lists"
        raise UserError(f"online.{key} is for language models, and this is {who}. Leave it out")
    if recipe.evaluate.implicit_reward is not None and not keeps_pairs(recipe):
        raise UserError(
            "evaluate.implicit_reward is measured on pairs that took no part in training, and this recipe keeps none aside: it "
            "does so where pairs are made or read before the training and evaluate.prompts is left out (evaluate.held_out)"
        )


def tell_beta(objective: ObjectiveSpec, *, elements: int, steps: int) -> None:
    """Say what beta is in every convention, for latents of so many elements and so many noise levels."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    beta = Beta.of(objective.beta)
    equivalents = beta.equivalents(Unit("timestep", elements=elements, steps=steps))
    others = [f"{name} {value:.6g}" for name, value in equivalents.items() if name != beta.convention]
    size = f"{elements} latent elements, {steps} noise levels"
    print(f"beta {beta.value:g} ({beta.convention}) is {', '.join(others)} ({size})", file=sys.stderr, flush=True)


def implicit_reward(recipe: Any, asked: Any, *, policy: Callable[[], Opened], base: Callable[[], Opened]) -> dict[str, Any]:
    """``implicit_reward``: accuracy of the aligned model's implicit reward against what training began with, on the pairs kept
    aside, where the recipe asks for it.

    The reward is the log-likelihood ratio whatever the objective: one without a reference (mapo) trains another quantity.

    Args:
        asked: the run's pairs.
        policy, base: open the aligned model and the base, with pairs prepared as they are, without dropped captions.
    """
    from polyalign.evaluation.implicit_reward import implicit_reward_accuracy

    wanted = recipe.evaluate.implicit_reward
    if wanted is None:
        return {}
    rows = _kept_aside(recipe, asked, wanted.pairs)
    adapter, model, reference = _policy_and_reference(recipe, policy, base)
    size = recipe.train.micro_batch_size
    return {
        "implicit_reward": implicit_reward_accuracy(
            adapter, model, reference, rows, draws=wanted.draws, batch_size=size, seed=recipe.seed
        )
    }


def _kept_aside(recipe: Any, store: PairStore, most: int | None) -> Sequence[Row]:
    kept = split_pairs(recipe.evaluate, recipe.seed, store)[1]
    if most is not None and most < len(kept):
        order = permutation(recipe.seed, len(kept), "implicit reward", 0)
        kept = sorted(kept[place] for place in order[:most])
    return store.rows(kept, decode=False)


def _policy_and_reference(recipe: Any, policy: Callable[[], Opened], base: Callable[[], Opened]) -> tuple[Any, Model, Seat]:
    """The aligned model, and what its training began with: the base under the LoRA, or a model of its own."""
    from polyalign.core.references import AdapterOff
    from polyalign.core.seats import OtherNetwork

    adapter, model = policy()
    if recipe.model.train == "lora":
        return adapter, model, AdapterOff(model.network)
    return adapter, model, OtherNetwork(base()[1].network)


def base_of(recipe: Any) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it (full training loads it in float32)."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    return base | ({"dtype": "float32"} if recipe.model.train == "full" else {})
