"""Text states: what the frozen text encoders make of a caption.

What they are for each kind of model is said in :mod:`polyalign.modalities.image.families`. The encoding is the pipeline's own,
so training and sampling cannot differ. Each caption is encoded alone, so its states do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng
from polyalign.modalities.image.families import Family


def caption_of(row: Any, *, where: str) -> str:
    """The caption of a row.

    Raises:
        UserError: there is none.
    """
    condition = row.get("condition")
    caption = condition.get("prompt") if hasattr(condition, "get") else condition
    if not isinstance(caption, str):
        raise UserError(
            f"{where}: the caption is missing (condition is {condition!r}). "
            "Every pair needs condition.prompt; an empty caption is written ''."
        )
    return caption


def dropped(pair_id: str, step: int, *, seed: int, share: float) -> bool:
    """Whether this pair's caption is dropped at this step: one draw for both candidates, keyed by pair and step."""
    return share > 0 and float(torch.rand((), generator=rng(seed, "caption", pair_id, step), dtype=torch.float64)) < share


@torch.no_grad()
def encode(family: Family, pipeline: Any, prompt: str, tokens: int | None = None) -> dict[str, Tensor]:
    """``states`` (S, D) and, except for SD 1.x and 2.x, ``pooled`` (P,) of one prompt; T5 reads ``tokens``, or as many as the
    family's pipeline lets it."""
    return family.encode(pipeline, prompt, tokens or family.text_tokens)


@torch.no_grad()
def encode_empty(family: Family, pipeline: Any, negative: str | None, tokens: int | None = None) -> dict[str, Tensor]:
    """The states of the unconditional branch, for guidance and for dropped captions.

    As the pipeline has it: SDXL's base uses zeros where no negative prompt is given (``force_zeros_for_empty_prompt``), which
    is what it was trained on; everything else encodes the empty text. The Salesforce code encodes the empty text for SDXL too.
    """
    entry = encode(family, pipeline, negative or "", tokens)
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt", False):
        entry = {name: torch.zeros_like(tensor) for name, tensor in entry.items()}
    return entry
