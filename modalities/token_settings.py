"""What the settings of text and vision-language models check alike."""

from __future__ import annotations

from typing import Any

from polyalign.core.errors import UserError

COUNTS = (
    "rank",
    "head_chunk",
    "max_new_tokens",
    "sample_batch",
    "top_k",
    "max_prompt_tokens",
    "max_completion_tokens",
    "max_length",
)


def refuse_wrong(settings: Any) -> None:
    """Raises UserError for a count below 1, or a dropout, temperature, top_p or targets that are none."""
    for name in COUNTS:
        value: int | None = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; allowed: 1 or more")
    if not 0.0 <= settings.dropout < 1.0:
        raise UserError(f"dropout is {settings.dropout}; allowed: from 0 to below 1 (it is the LoRA's)")
    if not settings.temperature >= 0.0:
        raise UserError(f"temperature is {settings.temperature}; allowed: 0 (greedy) or more")
    if not 0.0 < settings.top_p <= 1.0:
        raise UserError(f"top_p is {settings.top_p}; allowed: above 0, up to 1 (no cut)")
    if not settings.targets:
        raise UserError("targets is empty; allowed: all-linear, or names of modules such as q_proj")
