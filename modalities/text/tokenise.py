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

from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.errors import UserError
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.token_rows import (
    RowLength,
    answers_of,
    completion_after,
    ended,
    ends_after,
    measure,
    padded_completions,
    padded_left,
    refuse_empty,
    rendered,
)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row's ids."""

    prompt: list[int]
    completions: tuple[list[int], ...]


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
    refuse_empty(completions, where=where)
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
    tokenizer, messages = model.parts["tokenizer"], messages_of(condition, where=where)
    if messages is None:
        return frozenset(model.parts["eos_ids"])
    before = _rendered(tokenizer, messages, True, where=where)
    after = _rendered(tokenizer, [*messages, {"role": "assistant", "content": "x"}], False, where=where)
    return ends_after(model, before, after)


def length_of(model: Model, row: Row, settings: TextModelSettings) -> RowLength:
    """A row's lengths, and the limit that it breaks."""
    return length_of_tokens(model, tokens_of(model, row, settings), settings)


def length_of_tokens(model: Model, tokens: TokenRow, settings: TextModelSettings) -> RowLength:
    """As :func:`length_of`."""
    lengths = [len(ids) for ids in tokens.completions]
    return measure(model, [len(tokens.prompt)] * len(lengths), lengths, settings)


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """``prompt_ids``, ``prompt_mask`` (G, P), padded on the left, ``completion_ids``, ``completion_mask`` (G, K, U), padded on
    the right."""
    prompts, completions = padded_left([row.prompt for row in rows], pad_id), [row.completions for row in rows]
    ids, mask = padded_completions(completions, pad_id)
    return {"prompt_ids": prompts[0], "prompt_mask": prompts[1], "completion_ids": ids, "completion_mask": mask}


def _plain_completion(model: Model, text: str, settings: TextModelSettings) -> list[int]:
    return ended(model, _ids(model.parts["tokenizer"], text), settings.append_eos)


def _turn(
    model: Model, messages: list[dict[str, str]], prompt: list[int], text: str, settings: TextModelSettings, *, where: str
) -> list[int]:
    """The ids that a conversation has after the prompt's."""
    tokenizer = model.parts["tokenizer"]
    turns = [*messages, {"role": "assistant", "content": text}]
    full = _ids(tokenizer, _rendered(tokenizer, turns, False, where=where))
    return completion_after(model, prompt, full, settings.append_eos, template=tokenizer.chat_template, where=where)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], generation: bool, *, where: str) -> str:
    lacking = (
        "it is a conversation (condition.messages), and the tokenizer has no chat template. "
        "Give one with chat_template (a jinja file), or rows with a plain prompt."
    )
    return rendered(tokenizer, messages, generation, lacking=lacking, where=where)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Without special tokens but those in the text; ``verbose`` would warn of a length that is checked elsewhere."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
