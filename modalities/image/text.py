"""Text states: what the frozen text encoders make of a caption.

Stable Diffusion 1.x and 2.x: the last hidden states of the one encoder. SDXL: the penultimate hidden states of both encoders
side by side, and the pooled state of the second. The encoding is the pipeline's own, so training and sampling cannot differ.
Each caption is encoded alone, so its states do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng


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
def encode(pipeline: Any, prompt: str) -> dict[str, Tensor]:
    """``states`` (S, D) and, for SDXL, ``pooled`` (P,) of one prompt."""
    found = pipeline.encode_prompt(
        prompt, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    entry = {"states": found[0][0]}
    if len(found) == 4:
        entry["pooled"] = found[2][0]
    return entry


@torch.no_grad()
def encode_empty(pipeline: Any, negative: str | None) -> dict[str, Tensor]:
    """The states of the unconditional branch, for guidance and for dropped captions.

    As the pipeline has it: SDXL's base uses zeros where no negative prompt is given (``force_zeros_for_empty_prompt``), which
    is what it was trained on; everything else encodes the empty text. The Salesforce code encodes the empty text for SDXL too.
    """
    entry = encode(pipeline, negative or "")
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt", False):
        entry = {name: torch.zeros_like(tensor) for name, tensor in entry.items()}
    return entry
