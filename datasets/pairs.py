"""The pair store: a folder of parquet shards that Hugging Face ``datasets`` opens, written so that nothing is lost.

A shard is there whole or not at all (:func:`polyalign.core.files.atomic_write`) and its bytes depend on its rows alone: no time
stamps, fixed writer options. So an interrupted generation goes on at the first missing shard and ends with the bytes it would
have had, and ``content_hash`` names the store. :mod:`polyalign.datasets.pair_rows` has the columns.

Opening ``datasets`` takes seconds and copies the store into its cache; the trainer therefore reads rows from the shards
themselves, a few at a time (row groups of 8).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.datasets import pictured_rows
from polyalign.datasets.files import listed, remove_unfinished
from polyalign.datasets.outputs import KINDS, OutputKind, kind_of
from polyalign.datasets.pair_rows import condition_of, from_stored, row_problems, schema_of, schema_problems, to_stored

if TYPE_CHECKING:
    from datasets import Dataset

ROW_GROUP = 8  # rows read together: small, since training reads rows in random order
OPEN_FILES = 128  # shards held open; many systems allow a process 1024 files, and a large import has thousands of shards
_SHARD = re.compile(r"pairs-(\d{5})\.parquet")


def table_bytes(table: pa.Table) -> bytes:
    """A parquet file in memory with every option fixed, so that equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
    ) as writer:
        if table.num_rows:  # a row group without rows is legal, and Hugging Face datasets fails on it
            writer.write_table(table, row_group_size=ROW_GROUP)
    return sink.getvalue().to_pybytes()


class PairStore:
    """A pair store in ``folder``, which need not exist yet. Also what the trainer takes as data (``__len__`` and ``rows``).

    Args:
        outputs: the kind of outputs that it is for, a name of :data:`polyalign.datasets.outputs.KINDS`; a store with others is
            refused when it is read. None takes what is there; a new one is then for pictures.
        pictured: a new one is for conditions with pictures (:mod:`polyalign.datasets.pictured_rows`).
    """

    def __init__(self, folder: str | Path, outputs: str | None = None, *, pictured: bool = False):
        self.folder, self.outputs, self.pictured = Path(folder), outputs, pictured
        self._kind: OutputKind | None = None
        self._layout: tuple[list[Path], list[tuple[int, int]]] | None = None
        self._files: dict[int, pq.ParquetFile] = {}

    def shard_path(self, index: int) -> Path:
        return self.folder / f"pairs-{index:05d}.parquet"

    def shards(self) -> list[Path]:
        """Finished shards in order; temporary files of a killed run are none."""
        return sorted(path for path in self.folder.glob("pairs-*.parquet") if _SHARD.fullmatch(path.name))

    def missing(self, total: int) -> list[int]:
        """Indices below ``total`` whose shard is not there yet."""
        return [index for index in range(total) if not self.shard_path(index).is_file()]

    def write_shard(self, index: int, rows: Sequence[Mapping[str, Any]], *, judges: Iterable[str] | None = None) -> Path:
        """Write shard ``index`` (zero rows are allowed, then name the ``judges``) and return its path.

        Raises:
            UserError: the disk is full; shards finished before are kept.
            ValueError: rows with different judges, or no rows and no judges.
        """
        names = sorted(judges if judges is not None else rows[0]["chosen_scores"] if rows else ())
        if not names:
            raise ValueError("a shard needs at least one judge: parquet has no empty structs. Name them in 'judges'")
        kind = KINDS[self.outputs or "picture"]
        stored = [to_stored(row, names, kind, pictured=self.pictured) for row in rows]
        table = pa.Table.from_pylist(stored, schema=schema_of(names, kind, pictured=self.pictured))
        path = self.shard_path(index)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, table_bytes(table))
        self._forget()
        return path

    def clear(self) -> None:
        """Remove the shards and what a killed run left; other files in the folder stay."""
        remove_unfinished(self.folder)
        for path in self.shards():
            path.unlink()
        self._forget()

    def _forget(self) -> None:
        """Read anew what the folder holds, next time."""
        self._layout, self._files, self._kind = None, {}, None

    @property
    def kind(self) -> OutputKind:
        """The kind of the outputs that the shards hold.

        Raises:
            UserError: there are no shards, the first is damaged, or its outputs are not those that this store is for.
        """
        if self._kind is None:
            first = self._shards_or_error()[0]
            found = kind_of(_open(first).schema_arrow) or KINDS["picture"]  # validate() says what is wrong with the column
            if self.outputs not in (None, found.name):
                raise UserError(
                    f"{self.folder}: a store of pairs of {found.words}, and pairs of {KINDS[self.outputs].words} are needed "
                    "here"
                )
            self._kind = found
        return self._kind

    def __len__(self) -> int:
        return len(self._shards_and_places()[1])

    def rows(self, indices: Sequence[int], *, decode: bool = True) -> list[dict[str, Any]]:
        """Rows by their position in the store, in the order asked for; only these rows' outputs are decoded, and with
        ``decode=False`` not even these: pictures are then the bytes of their files.

        Raises:
            IndexError: no such row. UserError: an output of these rows does not decode, or a row is damaged otherwise.
        """
        paths, places = self._shards_and_places()
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        rows = []
        for index in indices:
            if not 0 <= index < len(places):
                raise IndexError(f"row {index} of a store with {len(places)} rows")
            shard, row = places[index]
            group = (shard, row // ROW_GROUP)
            if group not in groups:
                groups[group] = self._file(shard, paths[shard]).read_row_group(group[1]).to_pylist()
            rows.append(self._read(groups[group][row % ROW_GROUP], paths[shard].name, row, decode))
        return rows

    def conditions(self) -> list[dict[str, Any]]:
        """The condition of every row, with its pictures, without touching the outputs."""
        found: list[dict[str, Any]] = []
        for path in self._shards_or_error():
            pictures = [pictured_rows.IMAGES] if pictured_rows.is_pictured(_open(path).schema_arrow) else []
            rows = pq.read_table(path, columns=["condition", *pictures]).to_pylist()
            found += [condition_of(row["condition"]) | {name: row[name] or [] for name in pictures} for row in rows]
        return found

    def _read(self, stored: dict[str, Any], shard: str, row: int, decode: bool) -> dict[str, Any]:
        try:
            return from_stored(stored, self.kind, decoded=decode)
        except (ValueError, TypeError, KeyError) as error:
            problems = row_problems(stored, self.kind) or [("row", str(error))]
            raise UserError(_place(shard, row, stored, problems[0])) from error

    def _shards_and_places(self) -> tuple[list[Path], list[tuple[int, int]]]:
        """The shards and, for every row of the store, (shard, row in the shard)."""
        if self._layout is None:
            paths = self._shards_or_error()
            counts = [_open(path).metadata.num_rows for path in paths]
            self._layout = paths, [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
        return self._layout

    def _file(self, shard: int, path: Path) -> pq.ParquetFile:
        """An open shard; of many the one opened first is closed for it."""
        if shard not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = _open(path)
        return self._files[shard]

    def _shards_or_error(self) -> list[Path]:
        shards = self.shards()
        if not shards:
            raise UserError(f"{self.folder}: no pair store here (no files pairs-00000.parquet and so on). Run 'generate' first")
        return shards

    def open(self) -> Dataset:
        """The store as a Hugging Face data set, outputs as columns of their kind (pictures as ``Image``)."""
        from datasets import load_dataset

        return load_dataset("parquet", data_files=[str(path) for path in self._shards_or_error()], split="train")

    def content_hash(self) -> str:
        """SHA-256 over the shards' numbers and bytes, in order."""
        digest = hashlib.sha256()
        for path in self._shards_or_error():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def validate(self) -> int:
        """Check every row of every shard and return the number of rows.

        Raises:
            UserError: all that is wrong, at once (the first 20 are shown), each with shard, row, pair_id, column; or outputs of
                another kind than this store is for.
        """
        shards, kind, problems, seen = self._shards_or_error(), self._kind_or_none(), [], {}
        numbers = [int(_SHARD.fullmatch(path.name)[1]) for path in shards]  # pyright: ignore[reportOptionalSubscript]
        gaps = sorted(set(range(numbers[-1])) - set(numbers))
        problems += [
            f"shard pairs-{index:05d}.parquet is missing: the generation was interrupted, run it again" for index in gaps
        ]
        for path in shards:
            problems += _shard_problems(path, seen, kind)
        if problems:
            raise UserError(f"{self.folder}: {len(problems)} problem(s) in this pair store:\n{listed(problems)}")
        return len(seen)

    def _kind_or_none(self) -> OutputKind | None:
        """As ``kind``; None if the first shard is damaged, which has its own line in the list of problems."""
        first = self._shards_or_error()[0]
        try:
            _open(first)
        except UserError:
            return None
        return self.kind


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}. Delete it and run 'generate' again") from error


def _shard_problems(path: Path, seen: dict[str, str], expected: OutputKind | None) -> list[str]:
    """What is wrong with one shard; ``seen`` collects where each pair_id was."""
    try:
        file = _open(path)
        kind = kind_of(file.schema_arrow) or expected or KINDS["picture"]
        problems = [f"{path.name}: {problem}" for problem in schema_problems(file.schema_arrow)]
        if expected is not None and kind is not expected:
            problems.append(f"{path.name}: holds {kind.words}, and the first shard {expected.words}")
        if problems:
            return problems
        row = 0
        for batch in file.iter_batches(batch_size=ROW_GROUP):
            for stored in batch.to_pylist():
                problems += [_place(path.name, row, stored, problem) for problem in row_problems(stored, kind)]
                place = f"{path.name} row {row}"
                first = seen.setdefault(stored["pair_id"] or place, place)
                if first != place:
                    problems.append(_place(path.name, row, stored, ("pair_id", f"was used before, at {first}")))
                row += 1
        return problems
    except (UserError, pa.ArrowInvalid, OSError) as error:
        return [str(error)]


def _place(shard: str, row: int, stored: Mapping[str, Any], problem: tuple[str, str]) -> str:
    return f"{shard} row {row} (pair_id {stored.get('pair_id')!r}), column '{problem[0]}': {problem[1]}"
