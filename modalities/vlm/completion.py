"""Answers with gaps, filled in by a model that looks at a picture (Re-Align, arXiv 2502.13146): two ways.

``prompt``: the model is asked in words, and what it writes is the answer. That is the paper's way, and it takes a model that
follows instructions.

``constrained``: the answer is written from left to right. What is not masked is given, as if the model had said it; at a gap
the model goes on by itself, from its own distribution of the next token, and as many words are kept as stood there, fewer if
it goes on with a mark, with its end, or with the word that follows the gap. If it offers no word at all, the words that stood
there stay. What comes after a gap has no say in how it is filled, and the prompt is computed once more for each gap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.modalities.token_rows import completion_after
from polyalign.modalities.vlm import processing, sampling
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.masking import WORD, Masked
from polyalign.modalities.vlm.processing import Prompt
from polyalign.modalities.vlm.re_align_config import ReAlignConfig


@dataclass(frozen=True)
class Task:
    """An answer with gaps, and what the model sees when it fills them in. ``key`` names the task in seeds and messages."""

    condition: Mapping[str, Any]
    masked: Masked
    key: str


def complete(adapter: VlmAdapter, model: Model, tasks: Sequence[Task], config: ReAlignConfig, *, seed: int) -> list[str | None]:
    """The completed answers; None where the model, asked in words, leaves a gap or writes no word."""
    if config.completion == "prompt":
        return _asked(adapter, model, tasks, config, seed)
    return list[str | None](_constrained(adapter, model, tasks, config, seed))


def seed_for(seed: int, key: str, *more: int) -> int:
    """Of a completion, or of one of its gaps."""
    return seed_of(seed, "re_align", "completion", key, *more)


# --- asked in words ----------------------------------------------------------------------------------------------------------


def _asked(adapter: VlmAdapter, model: Model, tasks: Sequence[Task], config: ReAlignConfig, seed: int) -> list[str | None]:
    conditions = []
    for task in tasks:
        values = {"question": last_question(task.condition), "masked": task.masked.text(config.mask), "mask": config.mask}
        conditions.append(with_question(task.condition, filled_in(config.completion_prompt, values)))
    found = adapter.sample(model, conditions, [seed_for(seed, task.key) for task in tasks])
    answers = [text.strip() for text in found]
    return [None if config.mask in answer or not WORD.search(answer) else answer for answer in answers]


def filled_in(template: str, values: Mapping[str, str]) -> str:
    """A template with its {names} replaced; braces in the values, and around other words, stay."""
    return re.sub(r"\{(" + "|".join(map(re.escape, values)) + r")\}", lambda match: values[match[1]], template)


def last_question(condition: Any) -> str:
    """The last text that the user said; pictures and their names may stand before it."""
    turns, turn, part = _asked_last(condition)
    return "" if part is None else turns[turn]["content"][part]["text"].strip()


def with_question(condition: Any, text: str) -> dict[str, Any]:
    """A condition with another text in that place."""
    turns, turn, part = _asked_last(condition)
    content = list(turns[turn]["content"])
    content[len(content) if part is None else part :] = [{"type": "text", "text": text}]
    turns[turn] = {**turns[turn], "content": content}
    return {**condition, "messages": turns}


def _asked_last(condition: Any) -> tuple[list[dict[str, Any]], int, int | None]:
    """All turns, the place of the user's last one, and in it that of the last text."""
    turns = processing.asked_of_text(condition, where="a condition")
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise UserError(
            "a conversation without a turn of the user has no question; a question and its pictures are needed here"
        )
    texts = [place for place, part in enumerate(turns[users[-1]]["content"]) if part["type"] == "text"]
    return turns, users[-1], texts[-1] if texts else None


# --- from the model's own distribution ---------------------------------------------------------------------------------------


def _constrained(adapter: VlmAdapter, model: Model, tasks: Sequence[Task], config: ReAlignConfig, seed: int) -> list[str]:
    """All tasks at once, the first gap of each, then the second, and so on."""
    openings = [_Opening.of(adapter, model, task) for task in tasks]
    fills: list[list[str]] = [[] for _ in tasks]
    for gap in range(max((len(task.masked.gaps) for task in tasks), default=0)):
        going = [place for place, task in enumerate(tasks) if len(task.masked.gaps) > gap]
        most = [config.tokens_per_word * tasks[place].masked.gaps[gap].words for place in going]
        settings = replace(adapter.settings, max_new_tokens=max(most))
        befores = [openings[place].ids_before(model, tasks[place], fills[place]) for place in going]
        questions = [
            (openings[place].followed_by(before), openings[place].ends, seed_for(seed, tasks[place].key, gap))
            for place, before in zip(going, befores, strict=True)
        ]
        found = sampling.sample(model, settings, questions, adapter.features_of(model))
        for place, ids, before, limit in zip(going, found, befores, most, strict=True):
            said = _text_after(model, before, ids[:limit])
            masked = tasks[place].masked
            fills[place].append(kept_words(said, masked.gaps[gap].words, masked.pieces[gap + 1]) or masked.taken[gap])
    return [task.masked.filled(words) for task, words in zip(tasks, fills, strict=True)]


@dataclass(frozen=True)
class _Opening:
    """A prompt with its pictures, its text, what the chat template puts between it and an answer, and the ids that end one."""

    prompt: Prompt
    text: str
    lead: str
    ends: frozenset[int]

    @classmethod
    def of(cls, adapter: VlmAdapter, model: Model, task: Task) -> _Opening:
        prompt = adapter.prompt(model, task.condition, where=task.key)
        turns = processing.asked_of_text(task.condition, where=task.key)
        said = {"role": "assistant", "content": [{"type": "text", "text": task.masked.answer}]}
        before = processing.rendered(model, turns, True, where=task.key)
        whole = processing.rendered(model, [*turns, said], False, where=task.key)
        at = whole.find(task.masked.answer, len(before))
        if at < 0 or not whole.startswith(before):
            raise UserError(
                f"{task.key}: the chat template rewrites the prompt or the answer of a conversation, so an answer cannot be "
                "gone on with; set completion: prompt, or give another chat_template"
            )
        ends = processing.ends_of(model, task.condition, where=task.key)
        return cls(prompt, before, whole[len(before) : at], ends)

    def ids_before(self, model: Model, task: Task, fills: Sequence[str]) -> list[int]:
        """The ids of the answer up to the next gap, without the space before that: tokens begin with it."""
        pieces = task.masked.pieces
        so_far = pieces[0] + "".join(word + piece for word, piece in zip(fills, pieces[1:], strict=False))
        tokenizer, full = model.parts["tokenizer"], (self.text + self.lead + so_far)
        full = self.text if not (self.lead + so_far).strip() else full.rstrip()
        ids, prompt = (list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in (full, self.text))
        return completion_after(model, prompt, ids, False, template=model.parts["processor"].chat_template, where=task.key)

    def followed_by(self, ids: Sequence[int]) -> Prompt:
        """The prompt with the beginning of an answer behind it."""
        positions = self.prompt.positions
        if positions is not None and ids:
            first = int(positions.max()) + 1
            behind = torch.arange(first, first + len(ids), dtype=positions.dtype)
            positions = torch.cat([positions, behind.expand(len(positions), -1)], 1)
        return Prompt([*self.prompt.ids, *ids], self.prompt.pictures, positions)


def _text_after(model: Model, before: list[int], ids: list[int]) -> str:
    """What ``ids`` say behind ``before``, its space in front kept."""
    told = [
        model.parts["tokenizer"].decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (before, [*before, *ids])
    ]
    return told[1][len(told[0]) :] if told[1].startswith(told[0]) else ""


def kept_words(said: str, most: int, following: str) -> str:
    """The words that ``said`` begins with: at most so many, none behind a mark, and (but for the first) none from the one on
    that comes after the gap anyway."""
    after = WORD.search(following)
    start, end = None, 0
    for number, match in enumerate(WORD.finditer(said)):
        if number == most or said[end : match.start()].strip():
            break
        if number and after is not None and match[0] == after[0]:
            break
        start, end = match.start() if start is None else start, match.end()
    return "" if start is None else said[start:end]
