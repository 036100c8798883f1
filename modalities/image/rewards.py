"""The implicit reward of an image run on pairs that were not trained on: how often it agrees with the preference."""

from __future__ import annotations

from functools import partial
from typing import Any

from polyalign.core.run import RunFolder
from polyalign.modalities import denoising
from polyalign.modalities.image.config import ImageRecipe


def rewards_measured(recipe: ImageRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """See :func:`polyalign.modalities.denoising.implicit_reward`. Captions are kept and pictures are not mirrored, whatever
    training did."""
    from polyalign.modalities.image.training import open_model, open_trained

    still = recipe.prepare.model_copy(update={"caption_dropout": 0.0, "flip": False, "crop": "centre"})
    plain = recipe.model_copy(update={"prepare": still})
    policy, base = partial(open_trained, plain, run, run / "adapter"), partial(open_model, plain, run)
    return denoising.implicit_reward(plain, asked, policy=policy, base=base)
