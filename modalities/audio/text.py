"""Text states of T5 encoders, as Tango's denoiser is told them, and the tokenizer, which Tango's files lack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.modalities.audio.parts import Told

LONGEST = 512
"""Tokens at which FLAN-T5's tokenizer cuts."""

MULTIPLE = 32
"""Tokens are filled up to multiples of this under the mask, so that prompts of about one length share batches."""


class T5Text:
    """The contract of :class:`polyalign.modalities.audio.parts.TextEncoder` for one T5 encoder: its last states and the mask.
    What stands in the place of a prompt for guidance are the states of the empty text."""

    def __init__(self, encoder: Any, tokenizer: Any, *, multiple: int = MULTIPLE):
        self.encoder, self.tokenizer, self.multiple = encoder, tokenizer, multiple

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, seconds: float, tokens: int | None = None) -> Told:
        longest = min(LONGEST, self.tokenizer.model_max_length)
        multiple = min(self.multiple, longest)
        found = self.tokenizer(
            list(prompts),
            padding=True if tokens is None else "max_length",
            pad_to_multiple_of=multiple if tokens is None else None,
            truncation=True,
            max_length=longest - longest % multiple if tokens is None else tokens,
            return_tensors="pt",
        )
        ids, mask = found.input_ids.to(self.encoder.device), found.attention_mask.to(self.encoder.device)
        return Told(self.encoder(input_ids=ids, attention_mask=mask)[0], mask.bool())

    def unconditional(self, *, seconds: float, tokens: int | None = None) -> Told:
        return self.encode([""], seconds=seconds, tokens=tokens)

    def to(self, device: torch.device) -> T5Text:
        self.encoder.to(device)
        return self


def t5_tokenizer(folder: Path, given: str | None, named: str, vocabulary: int) -> Any:
    """The tokenizer of a base in ``folder``: the one ``given``, else that of ``folder/tokenizer``, else the hub's under the
    name that the base gives.

    Raises:
        UserError: none of them can be had, or it has more tokens than the encoder's ``vocabulary``.
    """
    inner = folder / "tokenizer"
    place = given if given is not None else str(inner) if inner.is_dir() else named
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the tokenizer {place!r} cannot be had ({str(error).strip().splitlines()[0]}). Tango's files hold none: give the "
            f"folder with tokenizer.json or spiece.model of {named} as tokenizer, or put it into {inner}"
        ) from error
    if len(tokenizer) > vocabulary:
        raise UserError(f"the tokenizer {place!r} has {len(tokenizer)} tokens, and the base's text encoder knows {vocabulary}")
    return tokenizer
