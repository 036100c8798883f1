"""Rows as tokens.

Plain rows: prompt and completion are tokenised apart and joined as ids. Where the tokenizer would merge the two texts' touching
ends into one token, the joined ids are not those of the joined text; they are those that sampling gives, which also begins
after the prompt's last token. TRL does the same.

Conversations (``condition["messages"]``): the prompt is the chat template's rendering with the generation prompt, the
completion is what the rendering with the answer has after it, the end of the turn included.

Letters: G groups, K candidates in a group, P prompt tokens, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.errors import UserError
from polyalign.modalities.text.settings import TextModelSettings

PAIR = ("chosen", "rejected")
TAIL = 4
"""Among so many last tokens of a turn its special token is looked for: templates put a line break after it, some two."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row's ids."""

    prompt: list[int]
    completions: tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class RowLength:
    """A row's lengths in tokens, and why it does not fit (None: it does)."""

    prompt: int
    completions: tuple[int, ...]
    reason: str | None = None

    @property
    def chosen(self) -> int:
        return self.completions[0]

    @property
    def rejected(self) -> int:
        return self.completions[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + max(self.completions)


def answers_of(row: Row) -> list[str]:
    """The texts of a row's candidates: ``chosen`` and ``rejected``, or ``candidates``, or a single ``completion``.

    Raises:
        UserError: none of them, or something else than text.
    """
    where = f"pair {row.get('pair_id')}"
    found: dict[str, Any]
    if row.get("candidates") is not None:
        found = {f"candidates[{place}]": text for place, text in enumerate(row["candidates"])}
    elif row.get("completion") is not None:
        found = {"completion": row["completion"]}
    else:
        found = {name: row.get(name) for name in PAIR}
    if not found:
        raise UserError(f"{where}: candidates is empty; a row needs at least one answer")
    for name, text in found.items():
        if not isinstance(text, str):
            raise UserError(
                f"{where}: {name} is {text!r}, and has to be text. A row has chosen and rejected, or candidates (a list), or "
                "completion"
            )
    return list(found.values())


def tokens_of(model: Model, row: Row, settings: TextModelSettings) -> TokenRow:
    """The ids of a row, whatever its length.

    Raises:
        UserError: no prompt, an answer without a single token, or a chat template that does not fit; with the pair's id.
    """
    where = f"pair {row.get('pair_id')}"
    condition, answers = row.get("condition"), answers_of(row)
    prompt = prompt_ids(model, condition, where=where)
    messages = messages_of(condition, where=where)
    if messages is None:
        completions = [_plain_completion(model, text, settings) for text in answers]
    else:
        completions = [_turn(model, messages, prompt, text, settings, where=where) for text in answers]
    if not all(completions):
        raise UserError(
            f"{where}: an answer is empty, and without an end-of-sequence token there is nothing of it to score. Set "
            "append_eos (and use a tokenizer that has such a token), or leave the row out."
        )
    return TokenRow(prompt, tuple(completions))


def prompt_ids(model: Model, condition: Any, *, where: str) -> list[int]:
    """The ids of a condition: a text, or a mapping with ``prompt``, or one with ``messages`` (the turns before the answer).

    The tokenizer's beginning-of-sequence token stands before a plain prompt if the tokenizer puts it there, and once, even if
    the text begins with it too. An empty prompt is that token alone, or the end-of-sequence token (GPT-2's way) where there is
    none.

    Raises:
        UserError: no prompt, or nothing to stand for an empty one.
    """
    tokenizer = model.parts["tokenizer"]
    messages = messages_of(condition, where=where)
    if messages is not None:
        return _ids(tokenizer, _rendered(tokenizer, messages, True, where=where))
    text = condition.get("prompt") if isinstance(condition, Mapping) else condition
    if not isinstance(text, str):
        raise UserError(f"{where}: the prompt is missing (condition is {condition!r}); an empty prompt is written ''")
    ids, begin = _ids(tokenizer, text), model.parts["begin"]
    ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
    if ids:
        return ids
    stand_in = next((token for token in (tokenizer.bos_token_id, *model.parts["eos_ids"]) if token is not None), None)
    if stand_in is None:
        raise UserError(
            f"{where}: the prompt is empty, and the tokenizer has neither a beginning- nor an end-of-sequence token to stand "
            "for it: there is nothing from which the first token could be predicted"
        )
    return [stand_in]


def messages_of(condition: Any, *, where: str) -> list[dict[str, str]] | None:
    """The turns before the answer, or None for a plain prompt.

    Raises:
        UserError: no turns in the list, or one without role and content.
    """
    messages = condition.get("messages") if isinstance(condition, Mapping) else None
    if messages is None:
        return None
    found = []
    for place, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: messages[{place}] is {turn!r}; a turn has a role and a content, both text")
        found.append({"role": turn["role"], "content": turn["content"]})
    if not found:
        raise UserError(f"{where}: messages is empty; give the turns before the answer, or leave messages out")
    return found


def ends_of(model: Model, condition: Any, *, where: str) -> frozenset[int]:
    """The ids that end an answer to a condition: the model's, and in a conversation the special token that the chat template
    puts after a turn."""
    tokenizer, found = model.parts["tokenizer"], set(model.parts["eos_ids"])
    messages = messages_of(condition, where=where)
    if messages is not None:
        before = _rendered(tokenizer, messages, True, where=where)
        after = _rendered(tokenizer, [*messages, {"role": "assistant", "content": "x"}], False, where=where)
        if after.startswith(before):
            special = model.parts["special_ids"]
            found.update([token for token in _ids(tokenizer, after[len(before) :]) if token in special][:1])
    return frozenset(found)


def length_of(model: Model, row: Row, settings: TextModelSettings) -> RowLength:
    """A row's lengths, and the limit that it breaks."""
    return measure(model, tokens_of(model, row, settings), settings)


def measure(model: Model, tokens: TokenRow, settings: TextModelSettings) -> RowLength:
    lengths = tuple(len(ids) for ids in tokens.completions)
    found = RowLength(len(tokens.prompt), lengths)
    for name, value, limit in (
        ("the prompt", found.prompt, settings.max_prompt_tokens),
        ("the longest answer", max(lengths), settings.max_completion_tokens),
        ("prompt and longest answer", found.longest, settings.max_length),
    ):
        if limit is not None and value > limit:
            key = {"the prompt": "max_prompt_tokens", "the longest answer": "max_completion_tokens"}.get(name, "max_length")
            return RowLength(found.prompt, lengths, f"{name}: {value} tokens, more than {key}, {limit}")
    positions = model.parts["positions"]
    if positions is not None and found.longest > positions:
        reason = f"prompt and longest answer: {found.longest} tokens, more than the model's {positions} positions"
        return RowLength(found.prompt, lengths, reason)
    return found


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """``prompt_ids``, ``prompt_mask`` (G, P), padded on the left, ``completion_ids``, ``completion_mask`` (G, K, U), padded on
    the right. Which places are padding is known from the lengths and not from the ids, so ``pad_id`` may be any id."""
    width, longest = max(len(row.prompt) for row in rows), max(len(ids) for row in rows for ids in row.completions)
    shape = (len(rows), len(rows[0].completions), longest)
    tensors = {
        "prompt_ids": torch.full((len(rows), width), pad_id),
        "prompt_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "completion_ids": torch.full(shape, pad_id),
        "completion_mask": torch.zeros(shape, dtype=torch.long),
    }
    for place, row in enumerate(rows):
        tensors["prompt_ids"][place, width - len(row.prompt) :] = torch.tensor(row.prompt)
        tensors["prompt_mask"][place, width - len(row.prompt) :] = 1
        for candidate, ids in enumerate(row.completions):
            tensors["completion_ids"][place, candidate, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            tensors["completion_mask"][place, candidate, : len(ids)] = 1
    return tensors


def _plain_completion(model: Model, text: str, settings: TextModelSettings) -> list[int]:
    return _ended(model, _ids(model.parts["tokenizer"], text), settings)


def _ended(model: Model, ids: list[int], settings: TextModelSettings) -> list[int]:
    """With an end-of-sequence token, once."""
    ends = model.parts["eos_ids"]
    if not settings.append_eos or not ends or ids[-1:] == [ends[0]]:
        return ids
    return [*ids, ends[0]]


def _turn(
    model: Model, messages: list[dict[str, str]], prompt: list[int], text: str, settings: TextModelSettings, *, where: str
) -> list[int]:
    """The ids that a conversation has after the prompt's."""
    tokenizer = model.parts["tokenizer"]
    turns = [*messages, {"role": "assistant", "content": text}]
    full = _ids(tokenizer, _rendered(tokenizer, turns, False, where=where))
    if full[: len(prompt)] != prompt:
        shared = min(len(prompt), len(full))
        at = next((place for place in range(shared) if prompt[place] != full[place]), shared)
        raise UserError(
            f"{where}: with this tokenizer's chat template ({_name_of(tokenizer)}) the prompt is not the beginning of the "
            f"conversation with the answer: from token {at} on it has {tokenizer.decode(prompt[at : at + 8])!r} and then "
            f"{tokenizer.decode(full[at : at + 8])!r}. The template rewrites earlier turns when there is a later one, or its "
            "generation prompt ends inside a token. Give another one with chat_template (a jinja file)."
        )
    ids = full[len(prompt) :]
    ended = model.parts["special_ids"].intersection(ids[-TAIL:])
    return ids if ended else _ended(model, ids, settings)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], generation: bool, *, where: str) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: it is a conversation (condition.messages), and the tokenizer has no chat template. "
            "Give one with chat_template (a jinja file), or rows with a plain prompt."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        roles = [turn["role"] for turn in messages]
        raise UserError(f"{where}: the chat template refuses a conversation of the roles {roles}: {error}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Without special tokens but those in the text; ``verbose`` would warn of a length that is checked elsewhere."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _name_of(tokenizer: Any) -> str:
    head = " ".join(str(tokenizer.chat_template).split())
    return f"{tokenizer.name_or_path or 'without a name'}: {head[:60]}..."
