"""Rows of parquet and Arrow files, in order, a few at a time.

A place is a ``.parquet`` or ``.arrow`` file, a folder of them (Hugging Face's ``data/train-00000-of-00002.parquet``), or what
``Dataset.save_to_disk`` wrote (``state.json`` beside ``data-00000-of-00001.arrow``; one folder a split under
``dataset_dict.json``). Files of several splits in one folder are not mixed: ``split`` says which is meant. A split is known by
a numbered name, or by a file or a folder that is called as one (``test.parquet``, ``default/test/0000.parquet``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.datasets.formats.checking import inside
from polyalign.datasets.formats.exporting import parts_of
from polyalign.datasets.pairs import PairStore, table_bytes

ENDINGS = (".parquet", ".arrow")
BATCH = 16  # rows in memory at a time, besides what the file's own row groups ask for
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "test", "eval"})


def files_of(path: Path, split: str | None) -> dict[str, Path]:
    """The data files at ``path`` by name, in order.

    Raises:
        UserError: none there, several splits and no ``split``, or no such split.
    """
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{path}: expected a file ending in {' or '.join(ENDINGS)}, or a folder of them")
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder. It is a {' or '.join(ENDINGS)} file, or a folder of them")
    if (path / "dataset_dict.json").is_file():
        return files_of(_split_folder(path, split), None)
    if (path / "state.json").is_file():
        return _saved(path)
    found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS}
    return of_split(path, found, split)


def _split_folder(path: Path, split: str | None) -> Path:
    splits = [file.parent.name for file in sorted(path.glob("*/state.json"))]
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        asked = "no split is named" if split is None else f"there is no split {split!r}"
        raise UserError(f"{path}: {asked}; splits here: {', '.join(splits)}. Set options: {{split: NAME}}")
    return path / str(split)


def _saved(path: Path) -> dict[str, Path]:
    """The files of a saved data set, which ``state.json`` names in their order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
        return {name: inside(path, name) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: does not say which files hold the data ({error})") from error


def of_split(path: Path, found: dict[str, Path], split: str | None) -> dict[str, Path]:
    """Those of the files at ``path`` that are of the split that is meant.

    Raises:
        UserError: none there, several splits and no ``split``, or no such split.
    """
    if not found:
        raise UserError(f"{path}: no files ending in {' or '.join(ENDINGS)} in this folder")
    by_split: dict[str, dict[str, Path]] = {}
    certain = False
    for name, file in found.items():
        said = _split_of(name)
        certain |= said is not None
        by_split.setdefault(said or file.stem, {})[name] = file
    if split is not None:
        if split not in by_split:
            raise UserError(f"{path}: there is no split {split!r}; splits here: {', '.join(sorted(by_split))}")
        return by_split[split]
    if len(by_split) > 1 and certain:
        raise UserError(
            f"{path}: holds several splits ({', '.join(sorted(by_split))}), and no split is named. Set options: {{split: NAME}}"
        )
    return found


def _split_of(name: str) -> str | None:
    """The split that a file's path says it is of, if it says so."""
    path = PurePosixPath(name)
    numbered = _SPLIT.fullmatch(path.stem)
    last_word = path.stem.rpartition("-")[2]  # Hugging Face's cache: pick_a_pic-train.arrow
    return numbered[1] if numbered else next((part for part in (last_word, *path.parts[-2::-1]) if part in _SPLITS), None)


def schema_of(path: Path) -> pa.Schema:
    """The file's columns.

    Raises:
        UserError: the file is damaged.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).schema
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def require_columns(files: dict[str, Path], columns: Sequence[str]) -> None:
    """Raises UserError if one of the files lacks one of the columns."""
    for path in files.values():
        names = schema_of(path).names
        missing = [name for name in columns if name not in names]
        if missing:
            what = ", ".join(f"'{name}'" for name in missing)
            raise UserError(f"{path}: no column {what}; columns: {', '.join(names)}")


def rows_in(path: Path) -> int:
    """How many rows a file has. Raises UserError if it is damaged."""
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_metadata(path).num_rows
        with pa.memory_map(str(path)) as mapped:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(mapped))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def rows(files: dict[str, Path], start: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file's name, row in this file, columns) from row ``start`` of all files on; row groups before it are not read.

    Raises:
        UserError: a file is damaged; rows before the damage have been given.
    """
    before = 0
    for name, path in files.items():
        row = 0
        try:
            for batch in _batches(path, start - before):
                if isinstance(batch, int):
                    row += batch
                    continue
                for stored in batch.to_pylist():
                    if before + row >= start:
                        yield name, row, stored
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error, row) from error
        before += row


def _batches(path: Path, wanted: int) -> Iterator[pa.RecordBatch | int]:
    """A file's rows in small batches; for a stretch that ends before row ``wanted`` only its length."""
    row = 0
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                row += length
                if row <= wanted:
                    yield length
                else:
                    yield from file.iter_batches(batch_size=BATCH, row_groups=[group])
        return
    with pa.memory_map(str(path)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            row += batch.num_rows
            if row <= wanted:
                yield batch.num_rows
            else:
                yield from (batch.slice(first, BATCH) for first in range(0, batch.num_rows, BATCH))


def _damaged(path: Path, error: Exception, row: int | None = None) -> UserError:
    where = "" if row is None else f" after row {row}"
    kind = "parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    return UserError(f"{path}: not a readable {kind} file{where}: {error}. Fetch or write it again")


def plain_columns(stored: dict[str, Any], besides: Sequence[str]) -> dict[str, Any]:
    """The row's other columns that JSON can hold; pictures beside the pair are no part of a condition."""
    return {name: value for name, value in stored.items() if name not in besides and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (str, int, float, bool))


def bytes_of(stored: Any, column: str, what: str = "picture") -> bytes:
    """The bytes of a file from a binary column or from Hugging Face's ``Image`` or ``Audio`` (a struct of ``bytes`` and
    ``path``); ``what`` it is a file of, for messages.

    Raises:
        ValueError: there are none; a path alone is not followed.
    """
    if isinstance(stored, dict):
        if not stored.get("bytes"):
            where = f"only the path {stored['path']!r}" if stored.get("path") else f"no {what}"
            raise ValueError(f"column '{column}' holds {where}; the {what}'s bytes are needed")
        stored = stored["bytes"]
    if not isinstance(stored, bytes) or not stored:
        found = "nothing" if not stored else f"{type(stored).__name__}"
        feature = "Audio" if what == "sound" else "Image"
        raise ValueError(f"column '{column}' must hold a {what} (bytes, or Hugging Face's {feature}), found {found}")
    return stored


def write_files(
    store: PairStore, folder: Path, exported: Callable[[dict[str, Any]], dict[str, Any]], schema: pa.Schema
) -> None:
    """``train-00000-of-0000N.parquet`` in ``folder``, in the store's order; ``exported`` makes a stored row one of ``schema``,
    pictures as the bytes of their files."""
    parts = parts_of(store)
    for number, part in enumerate(parts):
        rows = [exported(row) for row in store.rows(part, decode=False)]
        path = folder / f"train-{number:05d}-of-{len(parts):05d}.parquet"
        atomic_write(path, table_bytes(pa.Table.from_pylist(rows, schema=schema)))
