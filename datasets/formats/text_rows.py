"""Preferences between texts, in all the variants that TRL's preference data sets have, from parquet or Arrow files, a data set
that Hugging Face ``datasets`` saved to disk, JSON lines, or a ``.json`` file that is a list.

What a row may be (a *turn* is ``{"role": ..., "content": ...}``)::

    explicit         prompt: text, chosen: text, rejected: text
    implicit         chosen, rejected: texts that begin with the same prompt
    conversational   prompt: turns, chosen, rejected: the assistant's turn (a list of one), or whole conversations that begin
                     with the prompt
    implicit, conversational   chosen, rejected: whole conversations; a text as prompt beside them has to be one of the user's
                     turns (UltraFeedback)

An implicit prompt of texts is what both begin with, back to the end of a word, as people divide texts: TRL cuts at the first
character that differs, inside a word too, which neither tokens nor readers can follow. ``prompt_ends`` names the words that
end it, such as ``"\\n\\nAssistant:"``, so that answers that begin alike keep their beginning.

Other columns that JSON can hold stay in the condition, since judges may need them; one called ``messages`` does not.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.formats import parquet_files, text_lines
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Pair, Source, entry, identity_of
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import as_condition

LINES = (".jsonl", ".json")
COLUMNS = ("prompt", "chosen", "rejected")
SHOWN = 60  # characters of a text in a message

Turn = Mapping[str, str]


def import_text_rows(
    path: Path,
    store: PairStore,
    *,
    on_bad_row: OnBadRow = "error",
    split: str | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    whole: bool = False,
    prompt_ends: str | None = None,
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file, or a folder of files of one of these kinds.
        split: which of the splits in the folder.
        prompt, chosen, rejected: names of the columns; the prompt's may be missing where it is implicit.
        whole: explicit texts begin with the prompt, which is taken off; a row where they do not is a bad one.
        prompt_ends: for implicit prompts of texts: the words that end the prompt, the last place of them that both share.
    """
    source = TextRows(Path(path), split, (prompt, chosen, rejected), whole=whole, prompt_ends=prompt_ends)
    return import_pairs(source, store, on_bad_row=on_bad_row)


class RowFiles(Source):
    """The rows of one or more ``files``, of JSON objects (``lines``) or tables; ``_read`` makes a pair of one."""

    name = "rows"
    outputs = "text"
    lines: bool
    files: dict[str, Path]

    def total(self) -> int:
        count = text_lines.count_objects if self.lines else parquet_files.rows_in
        return sum(count(file) for file in self.files.values())

    def entries(self, start: int) -> Iterator[Entry]:
        for number, (name, place, given) in enumerate(rows_of(self.lines, self.files, start), start):
            where = place if self.lines else f"{name} {place}"
            yield entry(where, self._read, f"{number:08d}", {"file": name, "place": place}, given)

    @abstractmethod
    def _read(self, pair_id: str, origin: dict[str, Any], given: Any) -> Outcome:
        """The pair of a row; raises ValueError for a bad one."""


class TextRows(RowFiles):
    """The rows of one or more files."""

    rows_per_shard = 2048

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        columns: tuple[str, str, str] = COLUMNS,
        *,
        whole: bool = False,
        prompt_ends: str | None = None,
    ):
        self.path, self.columns, self.whole, self.prompt_ends = path, columns, whole, prompt_ends
        self.lines, self.files = data_files(path, split)
        if not self.lines:
            parquet_files.require_columns(self.files, columns[1:])

    def identity(self) -> dict[str, Any]:
        given = {"columns": list(self.columns), "whole": self.whole, "prompt_ends": self.prompt_ends}
        return {"files": identity_of(self.files), **given}

    def _read(self, pair_id: str, origin: dict[str, Any], given: Any) -> Outcome:
        row = text_lines.as_object(given) if self.lines else given
        condition, chosen, rejected = pair_of_row(row, self.columns, whole=self.whole, prompt_ends=self.prompt_ends)
        return Outcome([Pair(pair_id, condition, chosen, rejected, origin)])


def rows_of(lines: bool, files: dict[str, Path], start: int) -> Iterator[tuple[str, str, Any]]:
    """(file, place in it, what stands there) from row ``start`` of all ``files`` on; ``lines``: they are of JSON objects."""
    if not lines:
        yield from ((name, f"row {row}", stored) for name, row, stored in parquet_files.rows(files, start))
        return
    before = 0
    for name, file in files.items():
        count = text_lines.count_objects(file) if len(files) > 1 else start + 1
        if before + count > start:
            yield from ((name, place, given) for place, _, given in text_lines.objects(file, max(start - before, 0)))
        before += count


def data_files(path: Path, split: str | None) -> tuple[bool, dict[str, Path]]:
    """Whether the data are JSON objects, and their files by name, in order."""
    if path.suffix.lower() in LINES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such file. It holds an object with prompt, chosen and rejected a line")
        return True, {path.name: path}
    found = sorted(file for file in path.rglob("*.jsonl")) if path.is_dir() else []
    tables = path.is_dir() and any(file.suffix.lower() in parquet_files.ENDINGS for file in path.rglob("*"))
    if found and not tables:
        files = {file.relative_to(path).as_posix(): file for file in found}
        return True, parquet_files.of_split(path, files, split)
    return False, parquet_files.files_of(path, split)


# --- one row ------------------------------------------------------------------------------------------------------------------


def pair_of_row(
    row: Mapping[str, Any], columns: tuple[str, str, str] = COLUMNS, *, whole: bool = False, prompt_ends: str | None = None
) -> tuple[dict[str, Any], str, str]:
    """Condition, chosen and rejected answer of a row in any of the variants.

    Raises:
        ValueError: a column that is missing, empty or of another kind; a prompt that is not the beginning of what should begin
            with it; conversations that differ in more than the last answer.
    """
    prompt_column, *sides = columns
    missing = [f"'{side}'" for side in sides if row.get(side) is None]
    if missing:
        found = ", ".join(repr(str(name)) for name in row if row[name] is not None) or "nothing"
        empty = ", ".join(side for side in missing if side in map(repr, row))
        raise ValueError(
            f"no column {' and no '.join(missing)}; found {found}{f'; there is nothing in {empty}' if empty else ''}"
        )
    prompt, (chosen, rejected) = row.get(prompt_column), (row[side] for side in sides)
    if chosen == rejected:
        raise ValueError(f"columns '{sides[0]}' and '{sides[1]}' are the same, so nothing is preferred")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError(f"column '{sides[0]}' is a {kind_words(chosen)} and column '{sides[1]}' a {kind_words(rejected)}")
    if isinstance(chosen, list):
        turns, answers = _of_conversations(prompt, chosen, rejected, columns)
        own: dict[str, Any] = {"prompt": last_of_user(turns, prompt_column), "messages": turns}
    else:
        text, answers = _of_texts(prompt, chosen, rejected, columns, whole, prompt_ends)
        own = {"prompt": text}
    for side, answer in zip(sides, answers, strict=True):
        if not answer.strip():
            raise ValueError(f"column '{side}': the answer is empty{'' if row[side] == answer else ' after the prompt'}")
    rest = parquet_files.plain_columns(dict(row), (*columns, "prompt", "messages"))
    condition = as_condition({"prompt": own["prompt"], **rest})
    # as_condition strips, which a caption can stand and a prompt that ends before a line break cannot
    return {**condition, **own}, answers[0], answers[1]


def kind_words(value: Any) -> str:
    return "list of turns" if isinstance(value, list) else "text" if isinstance(value, str) else type(value).__name__


def _of_texts(
    prompt: Any, chosen: Any, rejected: Any, columns: tuple[str, str, str], whole: bool, prompt_ends: str | None
) -> tuple[str, tuple[str, str]]:
    for column, value in zip(columns, (prompt, chosen, rejected), strict=True):
        if not isinstance(value, str) and (value is not None or column != columns[0]):
            raise ValueError(f"column '{column}' must be text, as the others are, found {kind_words(value)}")
    if prompt is None:
        prompt = _shared_text(chosen, rejected, columns, prompt_ends)
        whole = True
    if not prompt.strip():
        raise ValueError(f"column '{columns[0]}': the prompt is empty")
    if not whole:
        return prompt, (chosen, rejected)
    for column, text in zip(columns[1:], (chosen, rejected), strict=True):
        if not text.startswith(prompt):
            raise ValueError(
                f"column '{column}' does not begin with the prompt: it has {text[:SHOWN]!r}, the prompt is {prompt[:SHOWN]!r}. "
                "Leave options.whole out if the columns hold the answers alone"
            )
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def _shared_text(chosen: str, rejected: str, columns: Sequence[str], prompt_ends: str | None) -> str:
    """What both texts begin with, back to the end of a word or to the words that end a prompt."""
    shared = os.path.commonprefix([chosen, rejected])
    if prompt_ends is not None:
        place = shared.rfind(prompt_ends)
        cut = place + len(prompt_ends) if place >= 0 else 0
    elif len(shared) in (len(chosen), len(rejected)):
        cut = len(shared)  # one is the other's beginning: its answer is empty, and is refused as that
    else:
        cut = max((place for place, letter in enumerate(shared) if letter.isspace()), default=0)
    if not shared[:cut].strip():
        wanted = "" if prompt_ends is None else f" that ends with {prompt_ends!r}"
        raise ValueError(
            f"no column '{columns[0]}', and '{columns[1]}' and '{columns[2]}' have no common beginning{wanted} that could be "
            f"the prompt: {chosen[:SHOWN]!r}, {rejected[:SHOWN]!r}"
        )
    return shared[:cut]


def _of_conversations(
    prompt: Any, chosen: Any, rejected: Any, columns: tuple[str, str, str]
) -> tuple[list[dict[str, str]], tuple[str, str]]:
    """The turns before the answer, and the two answers."""
    sides = [turns_of(value, column) for column, value in zip(columns[1:], (chosen, rejected), strict=True)]
    if isinstance(prompt, list):
        turns = turns_of(prompt, columns[0])
    else:
        turns = _shared_turns(*sides)
        if not turns:
            raise ValueError(
                f"no turns as '{columns[0]}', and the conversations in '{columns[1]}' and '{columns[2]}' have no common "
                "beginning"
            )
        if isinstance(prompt, str) and prompt.strip() not in {turn["content"].strip() for turn in turns}:
            raise ValueError(
                f"column '{columns[0]}' is none of the turns that '{columns[1]}' and '{columns[2]}' begin with: "
                f"{prompt[:SHOWN]!r}"
            )
    if turns and turns[-1]["role"] == "assistant":
        raise ValueError(f"column '{columns[0]}': the prompt ends with an assistant's turn, so there is nothing to answer")
    return turns, (answer_after(sides[0], turns, columns[1]), answer_after(sides[1], turns, columns[2]))


def turns_of(value: Any, column: str) -> list[dict[str, str]]:
    """A list of turns, each with role and content and nothing else."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"column '{column}' must be a list of turns, found {'an empty list' if value == [] else kind_words(value)}"
        )
    turns = []
    for place, turn in enumerate(value):
        parts = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"column '{column}', turn {place}: expected {{role, content}} as texts, found {str(turn)[:SHOWN]!r}"
            )
        turns.append({"role": parts[0], "content": parts[1]})
    return turns


def _shared_turns(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns that both conversations begin with; the last of the shorter one is always its answer."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((place for place in range(most) if chosen[place] != rejected[place]), most)
    return [dict(turn) for turn in chosen[:count]]


def answer_after(side: Sequence[Turn], turns: Sequence[Turn], column: str) -> str:
    """The assistant's turn that ``side`` is, or that it ends with after the prompt's ``turns``."""
    rest = side
    if side[0]["role"] != "assistant" or len(side) > 1:
        if list(side[: len(turns)]) != list(turns):
            raise ValueError(f"column '{column}': the conversation does not begin with the prompt's turns")
        rest = side[len(turns) :]
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in rest) or "nothing"
        raise ValueError(
            f"column '{column}': after the prompt, one turn of the assistant is expected, found {roles}. Conversations that "
            "differ in an earlier turn are cut there first"
        )
    return rest[0]["content"]


def last_of_user(turns: Sequence[Turn], column: str) -> str:
    said = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
    if not said.strip():
        raise ValueError(f"column '{column}': the conversation before the answer has no turn of a user that says something")
    return said
