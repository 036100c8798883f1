"""The implicit reward of an audio run on pairs that were not trained on: how often it agrees with the preference."""

from __future__ import annotations

from functools import partial
from typing import Any

from polyalign.core.run import RunFolder
from polyalign.modalities import denoising
from polyalign.modalities.audio.config import AudioRecipe


def rewards_measured(recipe: AudioRecipe, run: RunFolder, asked: Any) -> dict[str, Any]:
    """See :func:`polyalign.modalities.denoising.implicit_reward`. Captions are kept, whatever training did."""
    from polyalign.modalities.audio.training import open_model, open_trained

    plain = recipe.model_copy(update={"prepare": recipe.prepare.model_copy(update={"caption_dropout": 0.0})})
    policy, base = partial(open_trained, plain, run, run / "adapter"), partial(open_model, plain, run)
    return denoising.implicit_reward(plain, asked, policy=policy, base=base)
