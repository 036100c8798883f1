"""A prompts file to conditions: plain text, JSON lines, parquet, and the published benchmarks' own files.

``.txt``: a prompt a line. ``.jsonl``: an object a line with a ``prompt`` (or a bare string). ``.parquet``: a column ``prompt``.
``.tsv``: a table with a head, such as PartiPrompts (Prompt, Category, Challenge, Note). ``.json``: a list, such as one style of
HPSv2's benchmark (``anime.json``), or lists by style in one object; a folder of such files is all styles of it.
Where ``prompt`` is missing, ``caption``, ``text`` or ``captions`` (Tango's lines of captions and location) is taken. Everything
else that stands beside a prompt (task, objects, tags) stays in its condition, since judges may need it.

What a file is, its content decides where the ending does not: a table of PartiPrompts that is called ``.txt`` is read as one. A
prompt that stands in a list of a style has that style as its ``category``. Styles come in turn, so the first prompts of a limit
are of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.files import listed

Condition = dict[str, Any]
PROMPT_KEYS = ("prompt", "caption", "text", "captions")


def load_prompts(path: str | Path, *, limit: int | None = None) -> list[Condition]:
    """Conditions ``{"prompt": str, ...}`` in the file's order, the first ``limit`` of them if given.

    Raises:
        UserError: no such file, another kind of file, or broken entries; up to 20 are listed with their line or row.
    """
    return [condition for _, condition in _placed(Path(path), limit)]


def places(path: str | Path, *, limit: int | None = None) -> list[str]:
    """Where each of the prompts of :func:`load_prompts` stands: the file and its line, row or entry."""
    return [place for place, _ in _placed(Path(path), limit)]


def _placed(path: Path, limit: int | None) -> list[tuple[str, Condition]]:
    if path.is_dir():
        return _folder(path, limit)
    if not path.is_file():
        raise UserError(f"{path}: no such prompts file. It is a .txt (a prompt a line), .jsonl, .parquet, .tsv or .json file")
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet, ".tsv": _table, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a prompts file ends in {', '.join(readers)}, found {path.suffix or 'no ending'!r}")
    conditions: list[tuple[str, Condition]] = []
    problems: list[str] = []
    for place, entry in reader(path):
        if limit is not None and len(conditions) == limit:
            break
        try:
            conditions.append((f"{path.name} {place}", as_condition(entry)))
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
    return _table(path) if _head(path) is not None else _lines(path)


def _head(path: Path) -> list[str] | None:
    """The column names of a table, in small letters; None if the first line names no column of prompts beside others."""
    first = next(_lines(path), ("", ""))[1]
    names = [name.strip().casefold() for name in first.split("\t")]
    return names if len(names) > 1 and set(names) & set(PROMPT_KEYS) else None


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table as PartiPrompts has them: cells between tabs, taken as they are, without quoting. Short rows lack their
    last cells."""
    names = _head(path)
    if names is None:
        raise UserError(f"{path}: a .tsv begins with the names of its columns, one of them Prompt, with tabs between them")
    for place, line in list(_lines(path))[1:]:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) > len(names):
            yield place, ValueError(f"{len(cells)} cells in a table of {len(names)} columns")
        else:
            yield place, {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of prompts, of the style that the file is named after if they are bare texts; or lists by style."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). One object a line is a .jsonl") from error
    styles = {path.stem: content} if isinstance(content, list) else content
    if not isinstance(styles, dict) or not all(isinstance(entries, list) for entries in styles.values()):
        raise UserError(f"{path}: a list of prompts, or an object with such a list for each style, is expected")
    yield from _in_turn(
        [
            (f"{style}, entry {number}", {"prompt": entry, "category": style} if isinstance(entry, str) else entry)
            for number, entry in enumerate(entries)
        ]
        for style, entries in styles.items()
    )


def _in_turn(lists: Iterable[list[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """The first of each list, then the second of each."""
    for row in zip_longest(*lists):
        yield from (one for one in row if one is not None)


def _folder(path: Path, limit: int | None) -> list[tuple[str, Condition]]:
    """All styles of a benchmark, a .json for each."""
    files = sorted(path.glob("*.json"))
    if not files:
        raise UserError(f"{path}: a folder of prompts has a .json file for each style, and there is none in it")
    return list(_in_turn(_placed(file, None) for file in files))[:limit]


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
