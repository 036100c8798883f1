"""Rows of answers as tokens: what the modalities that train language models share, whatever their prompts are made of.

Letters: G groups, K candidates in a group, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Candidate, Group
from polyalign.core.errors import UserError

PAIR = ("chosen", "rejected")
TAIL = 4
"""Among so many last tokens of a turn its special token is looked for: templates put a line break after it, some two."""


class Limits(Protocol):
    """What settings say of lengths, in tokens; None is no limit."""

    @property
    def max_prompt_tokens(self) -> int | None: ...
    @property
    def max_completion_tokens(self) -> int | None: ...
    @property
    def max_length(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class RowLength:
    """A row's lengths in tokens, ``longest`` that of its longest sequence, and why it does not fit (None: it does)."""

    prompt: int
    completions: tuple[int, ...]
    longest: int
    reason: str | None = None

    @property
    def chosen(self) -> int:
        return self.completions[0]

    @property
    def rejected(self) -> int:
        return self.completions[-1]


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


def measure(
    model: Model, prompts: Sequence[int], completions: Sequence[int], limits: Limits, *, about_prompt: str = ""
) -> RowLength:
    """A row's lengths, and the limit that it breaks; the model's own number of positions is one.

    Args:
        prompts, completions: lengths in tokens, of each candidate.
        about_prompt: what is added to the reason where a shorter prompt would mend it.
    """
    longest = max(prompt + answer for prompt, answer in zip(prompts, completions, strict=True))
    found = RowLength(max(prompts), tuple(completions), longest)
    for name, value, key in (
        ("the prompt", found.prompt, "max_prompt_tokens"),
        ("the longest answer", max(completions), "max_completion_tokens"),
        ("prompt and longest answer", longest, "max_length"),
    ):
        limit = getattr(limits, key)
        if limit is not None and value > limit:
            more = "" if key == "max_completion_tokens" else about_prompt
            reason = f"{name}: {value} tokens, more than {key}, {limit}{more}"
            return RowLength(found.prompt, found.completions, longest, reason)
    positions = model.parts["positions"]
    if positions is not None and longest > positions:
        reason = f"prompt and longest answer: {longest} tokens, more than the model's {positions} positions{about_prompt}"
        return RowLength(found.prompt, found.completions, longest, reason)
    return found


def refuse_unequal(rows: Sequence[Row], completions: Sequence[Sequence[Any]]) -> None:
    """Raises UserError for rows of one batch that have different numbers of candidates."""
    counts = {len(found): row["pair_id"] for row, found in zip(rows, completions, strict=True)}
    if len(counts) > 1:
        raise UserError(
            f"rows of one batch need the same number of candidates, found {sorted(counts)} (for instance pairs "
            f"{sorted(map(str, counts.values()))})"
        )


def refuse_what_does_not_fit(rows: Sequence[Row], lengths: Sequence[RowLength]) -> None:
    """Raises UserError for a row that breaks a limit."""
    for row, length in zip(rows, lengths, strict=True):
        if length.reason is not None:
            raise UserError(f"pair {row['pair_id']} does not fit: {length.reason}. Nothing is cut; leave the pair out")


def padded_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, P). Which places are padding is known from the lengths and not from the ids, so ``filler`` may be any
    id."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[place, width - len(row) :] = 1
    return ids, mask


def padded_completions(rows: Sequence[Sequence[Sequence[int]]], filler: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (G, K, U), padded on the right."""
    shape = (len(rows), len(rows[0]), max(len(ids) for row in rows for ids in row))
    found, mask = torch.full(shape, filler), torch.zeros(shape, dtype=torch.long)
    for place, row in enumerate(rows):
        for candidate, ids in enumerate(row):
            found[place, candidate, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[place, candidate, : len(ids)] = 1
    return found, mask


def ended(model: Model, ids: list[int], append_eos: bool) -> list[int]:
    """With an end-of-sequence token, once."""
    ends = model.parts["eos_ids"]
    if not append_eos or not ends or ids[-1:] == [ends[0]]:
        return ids
    return [*ids, ends[0]]


def turn_ended(model: Model, ids: list[int], append_eos: bool) -> list[int]:
    """As :func:`ended`, unless a chat template has put a special token at the end of the turn."""
    return ids if model.parts["special_ids"].intersection(ids[-TAIL:]) else ended(model, ids, append_eos)


def completion_after(
    model: Model, prompt: Sequence[int], full: Sequence[int], append_eos: bool, *, template: str | None, where: str
) -> list[int]:
    """The ids that a conversation ``full`` has after its ``prompt``, the end of the turn included.

    Raises:
        UserError: the prompt is not the beginning of the conversation, with what they differ in.
    """
    if list(full[: len(prompt)]) == list(prompt):
        return turn_ended(model, list(full[len(prompt) :]), append_eos)
    tokenizer, shared = model.parts["tokenizer"], min(len(prompt), len(full))
    at = next((place for place in range(shared) if prompt[place] != full[place]), shared)
    named = f"{tokenizer.name_or_path or 'without a name'}: {' '.join(str(template).split())[:60]}..."
    raise UserError(
        f"{where}: with this tokenizer's chat template ({named}) the prompt is not the beginning of the "
        f"conversation with the answer: from token {at} on it has {tokenizer.decode(prompt[at : at + 8])!r} and then "
        f"{tokenizer.decode(full[at : at + 8])!r}. The template rewrites earlier turns when there is a later one, or its "
        "generation prompt ends inside a token. Give another one with chat_template (a jinja file)."
    )


def ends_after(model: Model, prompt: str, full: str) -> frozenset[int]:
    """The ids that end an answer: the model's, and the special token that a chat template puts after a turn, found in a
    conversation ``full`` that begins with its ``prompt``."""
    found, special = set(model.parts["eos_ids"]), model.parts["special_ids"]
    if full.startswith(prompt):
        ids = model.parts["tokenizer"](full[len(prompt) :], add_special_tokens=False, verbose=False).input_ids
        found.update([token for token in ids if token in special][:1])
    return frozenset(found)


def rendered(templated: Any, messages: Sequence[Any], generation: bool, *, lacking: str, where: str) -> str:
    """The text that a chat template makes of turns.

    Args:
        templated: a tokenizer or a processor, which has the template.
        generation: end with what an answer begins with.
        lacking: what to say where there is no template.

    Raises:
        UserError: no template, or it refuses these turns.
    """
    if templated.chat_template is None:
        raise UserError(f"{where}: {lacking}")
    try:
        return templated.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        roles = [turn["role"] for turn in messages]
        raise UserError(f"{where}: the chat template refuses a conversation of the roles {roles}: {error}") from error


def refuse_empty(completions: Sequence[Sequence[int]], *, where: str) -> None:
    """Raises UserError for an answer without a single token."""
    if not all(completions):
        raise UserError(
            f"{where}: an answer is empty, and without an end-of-sequence token there is nothing of it to score. Set "
            "append_eos (and use a tokenizer that has such a token), or leave the row out."
        )


def refuse_beyond_positions(prompts: Tensor, answers: Tensor, positions: int | None) -> None:
    """Rows fit, each by itself; an answer that a baseline joins to another prompt (kto's mismatched) may not.

    Args:
        prompts, answers: lengths in tokens, of each candidate (G, K), or for the prompts (G, 1).

    Raises:
        UserError: one is longer than the model's positions.
    """
    longest = int((prompts + answers).max())
    if positions is not None and longest > positions:
        raise UserError(
            f"a prompt and an answer have {longest} tokens together, and this model has {positions} positions. Each row fits "
            "by itself, so the answer was joined to another row's prompt (objective.baseline: mismatched): set "
            f"prepare.max_prompt_tokens and prepare.max_completion_tokens so that they add up to {positions} at most, or take "
            "another baseline"
        )


def group_of(row: Row, candidates: tuple[Candidate, ...]) -> Group:
    """The preference side of a row. Candidates without a target share it evenly, unless they are a pair or branches of one,
    of which the first is preferred to all others.

    Raises:
        UserError: not as many values as candidates, with the pair's id.
    """
    given: dict[str, Any] = {name: tuple(row[name]) for name in ("target", "margins", "desirable") if row.get(name) is not None}
    if row.get("weight") is not None:
        given["weight"] = float(row["weight"])
    if row.get("completion") is not None and row.get("candidates") is None:
        if row.get("label") is not None:
            given["desirable"] = (bool(row["label"]),)
        given.setdefault("target", (1.0,))
    elif row.get("candidates") is not None:
        given.setdefault("target", (1.0 / len(candidates),) * len(candidates))
    given.setdefault("target", (1.0,) + (0.0,) * (len(candidates) - 1))
    try:
        return Group(str(row["pair_id"]), candidates, **given)
    except ValueError as error:
        raise UserError(f"pair {row['pair_id']}: {error}") from error


def text_of(model: Model, ids: list[int], ends: frozenset[int]) -> str:
    """An answer without its end and without special tokens; spaces stay as the model wrote them."""
    ids = ids[:-1] if ids[-1] in ends else ids
    return model.parts["tokenizer"].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
