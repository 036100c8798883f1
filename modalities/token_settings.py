"""What the settings of text and vision-language models have, and check, alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import HEAD_CHUNK

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


@dataclass(frozen=True)
class TokenModelSettings:
    """The fields of both; their classes say what each means."""

    base: str = "tiny"
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    attention: str = "sdpa"
    chat_template: Path | str | None = None

    train: Literal["lora", "full", "qlora"] = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    gradient_checkpointing: bool = False

    append_eos: bool = True
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_length: int | None = None

    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    head_chunk: int = HEAD_CHUNK
    dense: frozenset[str] = frozenset()

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    sample_batch: int = 16

    seed: int = 0

    def __post_init__(self) -> None:
        refuse_wrong(self)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the network's weights as they are loaded: full training keeps float32 masters."""
        return torch.float32 if self.train == "full" else getattr(torch, self.dtype)

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)


def refuse_wrong(settings: TokenModelSettings) -> None:
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
