"""What a run of a language model, of text alone or with pictures, refuses before it begins, and what its samples depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.modalities.base_folders import local_folder, refuse_what_is_no_base
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.loops import specs_of

CAPABILITIES = frozenset({"value", "per_unit", "dense_kl", "confidence", "runner_up"})
"""What the likelihood of tokens offers to objectives."""

POSITIONS = ("max_position_embeddings", "n_positions")


def positions_of(folder: Path) -> int | None:
    """How many positions the language model in ``folder`` has by its configuration; None where that does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading it will say what is wrong
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    found = [part.get(name) for part in (text, config) if isinstance(part, dict) for name in POSITIONS]
    return next((value for value in found if isinstance(value, int)), None)


def refuse_base(recipe: Any, tiny_base: Path, **opened: str) -> None:
    """Raises UserError for a folder that is no base, or whose model has no room for as long an answer as is asked for.
    ``opened`` is for :func:`polyalign.modalities.base_folders.refuse_what_is_no_base`."""
    folder = tiny_base if recipe.model.base == "tiny" else local_folder(recipe.model.base)
    if folder is None:  # on a model hub
        return
    refuse_what_is_no_base(folder, **opened)
    positions, asked = positions_of(folder), recipe.sampler.max_new_tokens
    if positions is not None and asked >= positions:
        raise UserError(
            f"sampler.max_new_tokens is {asked}, and the model {recipe.model.base} has {positions} positions, for prompt and "
            "answer together. Lower it"
        )


def refuse_start(recipe: Any) -> None:
    """Raises UserError for an adapter to go on from that is not there, or that the reference would be without."""
    start, reference = recipe.model.lora.start, recipe.train.reference.seat
    if start is None:
        return
    fingerprint(start)
    if recipe.model.train == "full":
        raise UserError("model.lora.start is a LoRA to go on from, and model.train is full. Set model.train to lora")
    if reference in ("adapter_off", "cached"):
        raise UserError(
            f"train.reference.seat: {reference} is the base without its LoRA, and this training begins with one "
            "(model.lora.start). Set it to frozen, a copy of that LoRA, or to ema or none"
        )
    online = getattr(recipe, "online", None)
    if online is not None and online.mixture > 0.0:
        raise UserError(
            "online.mixture mixes in the base without its LoRA, and this training begins with one (model.lora.start). Leave "
            "one of the two out"
        )


def refuse_beta(recipe: Any) -> None:
    """Raises UserError for a beta whose convention means nothing on log-probabilities."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    for key, spec in specs_of(recipe).items():
        try:
            Beta.of(spec.beta).effective(Unit("token"))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def base_of(recipe: Any) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it. Full training loads it in float32, and an
    adapter on 4 bits loads it in these."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    changed: dict[str, Any] = {"full": {"dtype": "float32"}, "qlora": {"bits": 4}}.get(recipe.model.train, {})
    start = recipe.model.lora.start
    return base | changed | ({} if start is None else {"start": start})
