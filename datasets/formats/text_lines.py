"""Objects of a JSON or JSON-lines file, each with the place it stands at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.formats.checking import inside


def lines(path: Path, start: int) -> Iterator[tuple[int, str]]:
    """(number of the line, counted from 1; its text) of a text file from its ``start``-th line that is not blank on.

    Raises:
        UserError: no such file, or a line that is not UTF-8.
    """
    found = number = 0
    try:
        # Only line feeds end a line: Python's own rules would also cut at characters that may stand inside a JSON string.
        with open(path, "rb") as file:
            for number, content in enumerate(file, start=1):
                line = content.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    if found >= start:
                        yield number, line
                    found += 1
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {error.start + 1} of it"
        raise UserError(f"{path}: not UTF-8 text ({where}). Save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Expected a file of JSON lines") from error


def objects(path: Path, start: int) -> Iterator[tuple[str, int, Any]]:
    """(place, number, text or object) of a ``.jsonl`` file, or of a ``.json`` file that is one list.

    Raises:
        UserError: the file cannot be read, or a ``.json`` file is no list.
    """
    if path.suffix.lower() != ".json":
        for position, (number, line) in enumerate(lines(path, start), start):
            yield f"{path.name} line {number}", position, line
        return
    try:
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(whole, list):
        raise UserError(f"{path}: expected a list of objects, found {type(whole).__name__}")
    for position in range(start, len(whole)):
        yield f"{path.name} entry {position}", position, whole[position]


def count_objects(path: Path) -> int:
    """How many objects :func:`objects` gives; lines are counted without being opened."""
    return sum(1 for _ in (objects if path.suffix.lower() == ".json" else lines)(path, 0))


def as_object(given: Any) -> dict[str, Any]:
    """The mapping that a line, or an entry of a list, holds.

    Raises:
        ValueError: not JSON, or something else than an object.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(given, dict):
        raise ValueError(f"expected an object, found {type(given).__name__}")
    return given


def named_files(path: Path, keys: Sequence[str]) -> list[Path]:
    """The files that the objects of ``path`` name under ``keys`` (a name, or a list of names), each once, sorted. What is no
    object or no file below its folder is left out: the import refuses it, and says where it stands."""
    found = set()
    for _, _, given in objects(path, 0):
        with suppress(ValueError):
            line = as_object(given)
            for value in (line.get(key) for key in keys):
                for name in value if isinstance(value, list) else [value]:
                    if isinstance(name, str):
                        with suppress(ValueError):
                            found.add(inside(path.parent, name))
    return sorted(found)
