"""Conditions of texts as conversations, and as the ids that models read.

A condition has ``prompt`` and may have ``messages``, the turns before the answer. How ids are made is what the text modality
does when it trains (``modalities/text/tokenise.py``), and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from polyalign.core.errors import UserError

Condition = Mapping[str, Any]
TAIL = 4
"""Among so many last tokens of a turn its special token is looked for: templates put a line break after it, some two."""


def turns_of(condition: Condition) -> list[dict[str, str]] | None:
    """The turns before the answer, or None for a plain prompt.

    Raises:
        UserError: no list of turns, or a turn without role and content.
    """
    messages: Any = condition.get("messages")
    if messages is None:
        return None
    turns: list[Any] = list(messages) if isinstance(messages, list | tuple) else []
    if not turns or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise UserError(
            f"the condition of the prompt {condition.get('prompt')!r} has messages {messages!r}; a list of turns is needed, "
            "each with a role and a content"
        )
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]


def spoken(condition: Condition) -> str:
    """What was asked, for a reader: the prompt, or the turns of a conversation with their roles."""
    turns = turns_of(condition)
    if turns is None:
        return str(condition["prompt"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def sequence_ids(tokenizer: Any, condition: Condition, answer: str) -> list[int]:
    """What a reward model reads: the conversation with the answer in the tokenizer's chat template, if it has one (a plain
    prompt is the user's turn); two segments, as encoders have them, if the tokenizer has a start and a separator for that; else
    prompt, answer and end.

    Raises:
        UserError: the chat template refuses the conversation; there is not a single token.
    """
    if tokenizer.chat_template is not None:
        turns = turns_of(condition) or [{"role": "user", "content": str(condition["prompt"])}]
        return _ids(tokenizer, rendered(tokenizer, [*turns, {"role": "assistant", "content": answer}], generation=False))
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return list(tokenizer(spoken(condition), answer).input_ids)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = [*_begun(tokenizer, spoken(condition)), *_ids(tokenizer, answer), *end]
    if not found:
        raise UserError(
            "a prompt and its answer are empty, and the tokenizer has no token to stand for an end, so nothing is left"
        )
    return found


def prompt_and_answer_ids(
    tokenizer: Any, ends: Sequence[int], condition: Condition, answer: str
) -> tuple[list[int], list[int]]:
    """What a language model is asked for: the ids of the prompt, and those of the answer with the end of its turn.

    Args:
        ends: what ends an answer, the first of which is appended where nothing else has ended it.

    Raises:
        UserError: a conversation, and a tokenizer without a chat template or with one that rewrites the prompt; no tokens.
    """
    turns = turns_of(condition)
    prompt = _begun(tokenizer, str(condition["prompt"])) if turns is None else None
    if turns is None or prompt is not None:
        completion = _ids(tokenizer, answer)
        if ends and completion[-1:] != [ends[0]]:
            completion.append(ends[0])
    else:
        prompt, completion = _turn(tokenizer, ends, turns, answer)
    if not prompt and ends:
        prompt = [ends[0]]
    if not prompt or not completion:
        raise UserError(
            f"the {'answer' if prompt else 'prompt'} of the prompt {condition.get('prompt')!r} is empty, and the tokenizer has "
            "no token to stand for it, so there is nothing to score"
        )
    return prompt, completion


def rendered(tokenizer: Any, turns: list[dict[str, str]], *, generation: bool) -> str:
    """The chat template's text.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise UserError("a condition has messages, and the tokenizer has no chat template to write them down with")
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}") from error


def _turn(tokenizer: Any, ends: Sequence[int], turns: list[dict[str, str]], answer: str) -> tuple[list[int], list[int]]:
    prompt = _ids(tokenizer, rendered(tokenizer, turns, generation=True))
    whole = _ids(tokenizer, rendered(tokenizer, [*turns, {"role": "assistant", "content": answer}], generation=False))
    if whole[: len(prompt)] != prompt:
        raise UserError(
            "with this tokenizer's chat template the prompt is not the beginning of the conversation with the answer: it "
            "rewrites earlier turns when there is a later one, or its generation prompt ends inside a token"
        )
    completion = whole[len(prompt) :]
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {*tokenizer.all_special_ids, *ends, *(token for token, content in added if content.special)}
    if ends and not special.intersection(completion[-TAIL:]):
        completion.append(ends[0])
    return prompt, completion


def _begun(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt, with the beginning-of-sequence token where the tokenizer puts one, once; never fewer than it."""
    ids, begin = _ids(tokenizer, text), tokenizer.bos_token_id
    if begin is not None and ids[:1] != [begin] and (not ids or tokenizer("a").input_ids[:1] == [begin]):
        return [begin, *ids]
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
