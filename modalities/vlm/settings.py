"""What a vision-language model is, and how it is prepared, scored, sampled and trained: the record a recipe is mapped onto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyalign.core.errors import UserError
from polyalign.modalities.token_settings import TokenModelSettings

Part = Literal["language", "projector", "vision"]
PARTS: tuple[Part, ...] = ("language", "projector", "vision")
LOSING = ("response", "image", "context")
"""What may be the losing one in a branch of a row; see :func:`losing_in`."""


def losing_in(branch: str) -> frozenset[str]:
    """What loses in a branch: nothing in ``chosen``, else the names in it, joined by ``+``: ``image+response`` is the rejected
    answer to the rejected images.

    Raises:
        UserError: a name that is none of these.
    """
    found = frozenset() if branch == "chosen" else frozenset(branch.split("+"))
    if found - set(LOSING):
        raise UserError(
            f"the branch {branch!r} is unknown. Allowed: chosen, or what loses in it, of {', '.join(LOSING)}, joined by + "
            "(such as image+response)"
        )
    return found


@dataclass(frozen=True)
class VlmModelSettings(TokenModelSettings):
    """Settings of a vision-language model.

    Which model:
        base: ``tiny`` (the embedded base), a hub id, or a transformers folder with its processor.
        revision: of a hub repository.
        dtype: of the frozen weights; with ``train="full"`` they are float32 and the forward pass is cast.
        device: ``auto`` is this process's GPU if there is one, else the CPU.
        attention: ``sdpa``, ``eager``, or ``flash_attention_2`` (needs CUDA and its package).
        chat_template: a jinja file that takes the place of the processor's own template.
    Training:
        train: ``lora``, ``full``, or ``qlora`` (a LoRA on weights of 4 bits; needs CUDA and bitsandbytes).
        parts: of the model that are trained; the rest stays as it is. What pictures become is computed once for good where
            neither projector nor vision tower is trained.
        rank, alpha: of the LoRA; alpha None is rank.
        dropout: of the LoRA's input; a reference that has a LoRA (frozen, ema, adapter) has it too.
        targets: ``("all-linear",)`` is every linear layer of the parts; else last names of modules in them, such as q_proj.
        gradient_checkpointing: recompute activations in the backward pass.
    Preparation (nothing is ever cut):
        branches: the candidates of a row, the first preferred to all others; names as :func:`losing_in` has them.
        append_eos: end completions with the end-of-sequence token, unless the chat template ends the turn with a token.
        max_prompt_tokens, max_completion_tokens, max_length: a row beyond one of them does not fit; image tokens count. The
            model's own number of positions is a limit too.
        picture_options: options of the family's image processor, by its own names (such as size, or do_pan_and_scan).
        prompt_bytes: most memory for prompts with their processed pictures, which are processed anew beyond it.
    Scoring (see :mod:`polyalign.core.likelihood.tokens`):
        prefix_sharing: compute a prompt and its images once for all candidates that have them.
        head_chunk: positions a piece of the LM head.
        dense: further statistics of each position.
        cache_folder: where features of pictures are kept on the disk too. cache_bytes: most memory for them.
    Sampling:
        max_new_tokens: includes the one that ends the answer. temperature 0 is greedy. top_k, top_p: cut the distribution.
        sample_batch: answers at once.
    """

    parts: tuple[Part, ...] = ("language",)
    branches: tuple[str, ...] = ("chosen", "response")
    picture_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_bytes: int = 2**28
    cache_folder: Path | None = None
    cache_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or set(self.parts) - set(PARTS):
            raise UserError(f"parts is {list(self.parts)}; allowed: one or more of {', '.join(PARTS)}")
        if len(set(map(losing_in, self.branches))) != len(self.branches) or not self.branches:
            raise UserError(f"branches is {list(self.branches)}; allowed: one or more, each once")
