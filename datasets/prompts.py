"""A prompts file to conditions: plain text, JSON lines or parquet.

``.txt``: a prompt a line. ``.jsonl``: an object a line with a ``prompt`` (or a bare string). ``.parquet``: a column ``prompt``.
Where ``prompt`` is missing, ``caption`` or ``text`` is taken. Everything else that stands beside a prompt (task, objects, tags)
stays in its condition, since judges may need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.files import listed

Condition = dict[str, Any]
PROMPT_KEYS = ("prompt", "caption", "text")


def load_prompts(path: str | Path, *, limit: int | None = None) -> list[Condition]:
    """Conditions ``{"prompt": str, ...}`` in the file's order, the first ``limit`` of them if given.

    Raises:
        UserError: no such file, another kind of file, or broken entries; up to 20 are listed with their line or row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such prompts file. It is a .txt (a prompt a line), .jsonl or .parquet file")
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a prompts file ends in {', '.join(readers)}, found {path.suffix or 'no ending'!r}")
    conditions: list[Condition] = []
    problems: list[str] = []
    for place, entry in reader(path):
        if limit is not None and len(conditions) == limit:
            break
        try:
            conditions.append(as_condition(entry))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError(f"{path}: {len(problems)} broken {'entry' if len(problems) == 1 else 'entries'}:\n{listed(problems)}")
    if not conditions:
        raise UserError(f"{path}: no prompts in this file. It needs at least one")
    return conditions


def as_condition(entry: Any) -> Condition:
    """One entry, a string or a mapping, as a condition; ``prompt`` comes first and is stripped.

    Raises:
        ValueError: no prompt, an empty one, or one that is not text.
    """
    if isinstance(entry, ValueError):
        raise entry
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with a 'prompt' or a string, found {type(entry).__name__}")
    key = next((name for name in PROMPT_KEYS if entry.get(name) is not None), None)
    if key is None:
        found = ", ".join(repr(str(name)) for name in entry) or "nothing"
        raise ValueError(f"no 'prompt' (nor 'caption' or 'text'); found {found}")
    prompt = entry[key]
    if not isinstance(prompt, str):
        raise ValueError(f"'{key}' must be text, found {type(prompt).__name__} ({prompt!r})")
    if not prompt.strip():
        raise ValueError(f"'{key}' is empty")
    return {"prompt": prompt.strip(), **{name: value for name, value in entry.items() if name != key and value is not None}}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with their numbers."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from error
    # Only line feeds end a line: str.splitlines would also cut at characters that may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.strip()


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    return _lines(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            yield place, ValueError(f"not JSON: {error.msg} at column {error.colno}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows without their binary columns: pictures beside the prompts are no part of a condition."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error
    columns = [field.name for field in file.schema_arrow if _is_plain(field.type)]
    if not set(columns) & set(PROMPT_KEYS):
        raise UserError(f"{path}: no text column 'prompt', 'caption' or 'text'; columns: {', '.join(file.schema_arrow.names)}")
    row = 0
    for batch in file.iter_batches(columns=columns):
        for entry in batch.to_pylist():
            yield f"row {row}", entry
            row += 1


def _is_plain(kind: Any) -> bool:
    """Text, numbers, truth values, and lists and structs of them: what JSON can hold."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind)
    return text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
