"""Tables of a hospital database as CSV files, plain or gzipped, read row by row: a table of 27 million rows takes no memory.

A file is read as bytes and decoded line by line, so that an error can say where it is. Column names may be in upper or lower
case.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from polyalign.core.errors import UserError

OnBadRow = Literal["error", "drop"]
FIELD_BYTES = 1 << 24
"""Longest field that is read: a quotation mark that never closes would swallow the rest of the file."""
ENDINGS = (".csv", ".csv.gz")


class Tally:
    """What was read, and what was left out and why; in the mode ``error`` a bad row ends the reading.

    Raises:
        UserError: another mode.
    """

    def __init__(self, on_bad_row: OnBadRow = "error"):
        if on_bad_row not in ("error", "drop"):
            raise UserError(f"on_bad_row is {on_bad_row!r}; allowed: error (stop at the first), drop (leave out and count)")
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def bad(self, where: str, kind: str, message: str) -> None:
        """Count a bad row under ``kind``.

        Raises:
            UserError: rows must not be bad.
        """
        if self.on_bad_row == "error":
            raise UserError(f"{where}: {message}. Mend it, or leave such rows out, counted, with on_bad_row: drop")
        self.dropped[kind] += 1


class Table:
    """One table of a folder.

    Args:
        folder: where the file is.
        name: of the table, such as ``ADMISSIONS``; the file is ``ADMISSIONS.csv`` or ``admissions.csv.gz``.
        columns: that it must have.
        optional: columns that are read where it has them, and are empty where not.

    Raises:
        UserError: there is no such file, or two; it has no header, or lacks a column.
    """

    def __init__(self, folder: Path, name: str, columns: Sequence[str], optional: Sequence[str] = ()):
        self.name, self.columns = name, (*columns, *optional)
        self.path = _find(folder, name)
        self.header = self._header()
        absent = [column for column in columns if column not in self.header]
        if absent:
            raise UserError(
                f"{self.path}: no column {', '.join(absent)}; it has {', '.join(self.header)}. The tables have MIMIC-III's "
                "layout, in any order and case of the columns"
            )
        twice = sorted({column for column in self.columns if self.header.count(column) > 1})
        if twice:
            raise UserError(f"{self.path}: the column {', '.join(twice)} stands in the header more than once")
        self.places = [self.header.index(column) if column in self.header else None for column in self.columns]

    def has(self, column: str) -> bool:
        return column in self.header

    def rows(self, tally: Tally, *, where: tuple[str, Container[str]] | None = None) -> Iterator[tuple[int, list[str]]]:
        """(line the row begins at, its values in the order of ``columns``), blanks around values taken off.

        Args:
            tally: gets the rows with another number of fields than the header.
            where: a column and the values wanted in it; other rows are passed over, and rows that are alike in everything but
                ROW_ID are bad. A whole number may be written with ``.0``, as an export of a column with gaps has it.

        Raises:
            UserError: the file is damaged or not UTF-8, or a row is bad and must not be.
        """
        key = self.header.index(where[0]) if where else None
        seen: set[bytes] = set()
        for line, fields in self._records():
            if len(fields) != len(self.header):
                kind = f"{self.name}: other number of fields"
                tally.bad(f"{self.path} line {line}", kind, f"{len(fields)} fields, and the header has {len(self.header)}")
                continue
            if where is not None and key is not None:
                fields[key] = whole(fields[key])
                if fields[key] not in where[1]:
                    continue
                digest = self._digest(fields)
                if digest in seen:
                    tally.bad(f"{self.path} line {line}", f"{self.name}: duplicates", "the same row for the second time")
                    continue
                seen.add(digest)
            yield line, ["" if place is None else fields[place].strip() for place in self.places]

    def _digest(self, fields: Sequence[str]) -> bytes:
        told = [value for column, value in zip(self.header, fields, strict=True) if column != "ROW_ID"]
        return blake2b("\x1f".join(told).encode(), digest_size=16).digest()

    def _header(self) -> list[str]:
        for _, fields in self._csv():
            return [field.strip().upper() for field in fields]
        raise UserError(f"{self.path}: an empty file; the first line has the names of the columns")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        rows = self._csv()
        next(rows)
        return (row for row in rows if row[1])  # blank lines have no fields

    def _csv(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_BYTES))
        reader = csv.reader(_lines(self.path), strict=True)
        line = 1
        try:
            for fields in reader:
                yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self.path} line {line}: not CSV: {error}. Is a quotation mark open, or the file cut short?"
            ) from error


def whole(text: str) -> str:
    """An identifier without the ``.0`` that a column of floats gives it."""
    text = text.strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. It is to hold the tables, as {name}.csv or {name}.csv.gz and so on")
    wanted = {f"{name.lower()}{ending}" for ending in ENDINGS}
    found = sorted(path for path in folder.iterdir() if path.name.lower() in wanted and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder} has {' and '.join(path.name for path in found)}; one of them is the table. Take the other away"
        )
    there = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(ENDINGS))
    raise UserError(f"{folder} has no {name}.csv and no {name}.csv.gz; its tables: {', '.join(there) or 'none'}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, decoded.

    Raises:
        UserError: not UTF-8, not gzip, or cut short; with the place.
    """
    number, offset = 0, 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            for raw in file:
                number += 1
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} line {number}: not UTF-8 text (byte {offset + error.start} of the "
                        f"{'unpacked ' if path.suffix.lower() == '.gz' else ''}file). Save it as UTF-8, for instance with "
                        "iconv -f latin1 -t utf-8"
                    ) from error
                offset += len(raw)
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: a damaged gzip file, or one cut short, readable up to line {number} ({error}). Fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
