"""What a text model is, and how it is prepared, scored, sampled and trained: the record a recipe is mapped onto."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from polyalign.core.likelihood.tokens import HEAD_CHUNK
from polyalign.modalities.token_settings import refuse_wrong

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TextModelSettings:
    """Settings of a causal language model.

    Which model:
        base: ``tiny`` (the embedded base), a hub id, or a transformers folder.
        revision: of a hub repository.
        dtype: of the frozen weights; with ``train="full"`` they are float32 and the forward pass is cast.
        device: ``auto`` is this process's GPU if there is one, else the CPU.
        attention: ``sdpa``, ``eager``, or ``flash_attention_2`` (needs CUDA and its package).
        chat_template: a jinja file that takes the place of the tokenizer's own template.
    Training:
        train: ``lora``, ``full``, or ``qlora`` (a LoRA on weights of 4 bits; needs CUDA and bitsandbytes).
        rank, alpha: of the LoRA; alpha None is rank.
        dropout: of the LoRA's input; a reference that has a LoRA (frozen, ema, adapter) has it too. The base's own dropout is
            always off: policy and reference are compared under the same draws, and two dropout masks would be two draws.
        targets: ``("all-linear",)`` is every linear layer but the LM head; else names of modules.
        gradient_checkpointing: recompute activations in the backward pass.
    Preparation (nothing is ever cut):
        append_eos: end completions with the end-of-sequence token. A chat template that ends the turn with a special token has
            done so.
        max_prompt_tokens, max_completion_tokens, max_length: a row beyond one of them does not fit. The model's own number of
            positions is a limit too.
    Scoring (see :mod:`polyalign.core.likelihood.tokens`):
        prefix_sharing: compute the prompt once for all candidates of a group.
        head_chunk: positions a piece of the LM head.
        dense: further statistics of each position.
    Sampling:
        max_new_tokens: includes the one that ends the answer. temperature 0 is greedy. top_k, top_p: cut the distribution.
        sample_batch: prompts at once.
    """

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
        return torch.float32 if self.train == "full" else DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)
