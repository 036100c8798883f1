"""A benchmark's questions and a model's answers to them: read from local files and brought together by their ids.

Answers are JSON lines (or one JSON list) of objects with the question's id and the answer's text. The id is ``id``, or what
the benchmark's own files call it. Missing, doubled and unknown ids are errors unless the user says what to do with them, and
are counted then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError

ANSWER_KEYS = ("response", "prediction", "model_prediction", "output", "caption", "answer", "text")
"""Where an answer's text is looked for, the first that is there: benchmarks name the right answer ``answer`` or ``text``."""
POLICIES = {
    "missing": ("error", "drop", "empty"),
    "doubled": ("error", "first", "last"),
    "unknown": ("error", "drop"),
}
SHOWN = 3


@dataclass(frozen=True)
class Question:
    """One thing that a model answers. ``truth`` is the benchmark's; ``cluster`` is what it shares with other questions (its
    image), and is drawn with them for intervals."""

    id: str
    truth: Any
    cluster: str
    group: str = ""
    text: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A benchmark as read: its questions, the files it was read from, and what else scoring needs (word lists)."""

    questions: tuple[Question, ...]
    files: tuple[Path, ...]
    material: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What becomes of answers that do not fit the questions one to one; "error" refuses them."""

    missing: str = "error"
    doubled: str = "error"
    unknown: str = "error"

    def __post_init__(self) -> None:
        for name, allowed in POLICIES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Answers:
    """Texts by id, and how the ids fitted the benchmark's."""

    said: Mapping[str, str]
    record: Mapping[str, Any] = field(default_factory=dict)


def read_text(path: Path, what: str) -> str:
    """A text file of the benchmark.

    Raises:
        UserError: absent or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {what} cannot be read ({error})") from error


def read_json(path: Path, what: str) -> Any:
    """One JSON value.

    Raises:
        UserError: absent, unreadable, or no JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{path}: {what} is no JSON ({error})") from error


def read_rows(path: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of every object in a JSON list or in JSON lines, whatever the suffix: benchmarks name both ``.json``.

    Raises:
        UserError: unreadable, neither of the two, or without a single object.
    """
    text = read_text(path, what)
    try:
        if text.lstrip().startswith("["):
            rows = [(f"{path}: entry {number}", row) for number, row in enumerate(json.loads(text), start=1)]
        else:
            lines = enumerate(text.split("\n"), start=1)
            rows = [(f"{path}: line {number}", json.loads(line)) for number, line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: {what} is neither a JSON list nor JSON lines ({error})") from error
    if not rows:
        raise UserError(f"{path}: {what} is empty")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    return rows


def field_of(row: Mapping[str, Any], key: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """``row[key]`` of the wanted type.

    Raises:
        UserError: absent or of another type.
    """
    if key not in row:
        raise UserError(f"{where}: has no {key!r}; found {', '.join(map(repr, row)) or 'nothing'}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(one.__name__ for one in kinds)
        raise UserError(f"{where}: {key!r} is {value!r} ({type(value).__name__}); {names} is expected")
    return value


def only_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The one file of ``folder`` with one of these names (patterns); ``folder`` may be the file itself.

    Raises:
        UserError: none, or several.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; {what} is expected there")
    found = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: one file named {' or '.join(names)} is expected ({what}); found {listed}")
    return found[0]


def without_doubles(questions: Sequence[Question], path: Path) -> tuple[Question, ...]:
    """The questions, whose ids all differ.

    Raises:
        UserError: two have the same id, or there are none.
    """
    if not questions:
        raise UserError(f"{path}: has no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: two questions have the id {question.id!r}")
        seen.add(question.id)
    return tuple(questions)


def simple_id(*keys: str) -> Callable[[Mapping[str, Any]], str | None]:
    """An id from a row: ``id``, or the benchmark's own keys joined by "/"."""

    def of(row: Mapping[str, Any]) -> str | None:
        if "id" in row:
            return str(row["id"])
        return "/".join(str(row[key]) for key in keys) if keys and all(key in row for key in keys) else None

    of.__doc__ = f"id, or {', '.join(keys)}" if keys else "id"
    return of


def read_answers(
    path: Path,
    questions: Sequence[Question],
    id_of: Callable[[Mapping[str, Any]], str | None],
    *,
    policy: Policy | None = None,
    answer_key: str | None = None,
) -> Answers:
    """The model's answers to ``questions``.

    Args:
        answer_key: the key of the answer's text; without it the first of :data:`ANSWER_KEYS` that a row has.

    Raises:
        UserError: unreadable; a row without id or text; ids that do not fit and are not allowed not to.
    """
    policy = policy or Policy()
    known = {question.id for question in questions}
    said: dict[str, str] = {}
    doubled: list[str] = []
    unknown: list[str] = []
    for where, row in read_rows(path, "the file of answers"):
        name = id_of(row)
        if name is None:
            raise UserError(f"{where}: the question's id is missing; it is {id_of.__doc__}. Found {', '.join(map(repr, row))}")
        key = answer_key or next((one for one in ANSWER_KEYS if one in row), ANSWER_KEYS[0])
        text = field_of(row, key, where)
        if name not in known:
            unknown.append(name)
        elif name not in said:
            said[name] = text
        else:
            doubled.append(name)
            if policy.doubled == "last":
                said[name] = text
    missing = [question.id for question in questions if question.id not in said]
    if policy.missing == "empty":
        said.update(dict.fromkeys(missing, ""))
    record = {"missing": missing, "doubled": doubled, "unknown": unknown}
    for trouble, found in record.items():
        if found and getattr(policy, trouble) == "error":
            raise UserError(_refusal(path, trouble, found, len(known)))
    if not said:
        raise UserError(
            f"{path}: answers none of the benchmark's {len(known)} questions, whose ids are like {questions[0].id!r}"
        )
    counted = {
        trouble: {"count": len(found), "rule": getattr(policy, trouble), "such_as": found[:SHOWN]}
        for trouble, found in record.items()
    }
    empty = sum(not text.strip() for text in said.values())
    return Answers(said, {"questions": len(known), "answered": len(known) - len(missing), "empty": empty, **counted})


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The options ``--missing``, ``--doubled`` and ``--unknown`` of a command that reads answers."""
    for trouble, rules in POLICIES.items():
        parser.add_argument(
            f"--{trouble}", choices=rules, default="error", help=f"what becomes of {trouble} ids (default error)"
        )


def _refusal(path: Path, trouble: str, found: Sequence[str], questions: int) -> str:
    shown = ", ".join(map(repr, found[:SHOWN]))
    said = {
        "missing": f"{len(found)} of {questions} questions have no answer",
        "doubled": f"{len(found)} answers are to a question that has one already",
        "unknown": f"{len(found)} answers have an id that the benchmark does not know",
    }
    others = " or ".join(f"--{trouble} {rule}" for rule in POLICIES[trouble] if rule != "error")
    return f"{path}: {said[trouble]}, such as {shown}. Mend the file, or take {others}, which is counted in the record"
