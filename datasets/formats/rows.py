"""Rows with the columns ``prompt``, ``chosen`` and ``rejected``, as TRL's preference data sets have them, the two answers being
pictures: parquet files, or a data set that Hugging Face ``datasets`` saved to disk.

The pictures are ``Image`` columns or plain bytes; a path without bytes is not followed. Other columns that JSON can hold stay
in the condition. The export has ``Image`` columns, so ``datasets.load_dataset("parquet", ...)`` opens it with pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyalign.datasets.formats import parquet_files
from polyalign.datasets.formats.carrying import KEY, carried, pair_of
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Source, entry, identity_of
from polyalign.datasets.pairs import PairStore

_PICTURE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_FEATURES = {
    "prompt": {"dtype": "string", "_type": "Value"},
    "chosen": {"_type": "Image"},
    "rejected": {"_type": "Image"},
    KEY: {"dtype": "string", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [("prompt", pa.string()), ("chosen", _PICTURE), ("rejected", _PICTURE), (KEY, pa.string())],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}}, sort_keys=True)},
)


def import_rows(
    path: Path,
    store: PairStore,
    *,
    on_bad_row: OnBadRow = "error",
    split: str | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a parquet file, a folder of them, or a folder of ``Dataset.save_to_disk``.
        split: which of the splits in the folder.
        prompt, chosen, rejected: names of the columns.
    """
    return import_pairs(Rows(Path(path), split, (prompt, chosen, rejected)), store, on_bad_row=on_bad_row)


class Rows(Source):
    """The rows of one or more parquet or Arrow files."""

    name = "rows"

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        columns: tuple[str, str, str] = ("prompt", "chosen", "rejected"),
        outputs: str = "picture",
    ):
        self.path, self.columns, self.outputs = path, columns, outputs
        self.files = parquet_files.files_of(path, split)
        parquet_files.require_columns(self.files, columns)
        if any(KEY in parquet_files.schema_of(file).names for file in self.files.values()):
            self.judges = None

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of(self.files), "columns": list(self.columns)}

    def entries(self, start: int) -> Iterator[Entry]:
        for number, (name, row, stored) in enumerate(parquet_files.rows(self.files, start), start):
            yield entry(f"{name} row {row}", self._read, f"{number:08d}", {"file": name, "row": row}, stored)

    def _read(self, pair_id: str, origin: dict[str, Any], stored: dict[str, Any]) -> Outcome:
        chosen, rejected = (parquet_files.bytes_of(stored[column], column, self.outputs) for column in self.columns[1:])
        prompt = stored[self.columns[0]]
        if not isinstance(prompt, str):
            found = "nothing" if prompt is None else type(prompt).__name__
            raise ValueError(f"column '{self.columns[0]}' must be text, found {found}")
        # The named column is the prompt, whatever another column of that name says.
        given = {**parquet_files.plain_columns(stored, self.columns), "prompt": prompt}
        return Outcome([pair_of(pair_id, given, chosen, rejected, origin)])


def export_rows(store: PairStore, folder: Path) -> None:
    """``train-00000-of-0000N.parquet`` in ``folder``, in the store's order, pictures byte for byte."""
    parquet_files.write_files(store, folder, _exported, _SCHEMA)


def _exported(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    return {
        "prompt": row["condition"]["prompt"],
        "chosen": {"bytes": chosen, "path": None},
        "rejected": {"bytes": rejected, "path": None},
        KEY: json.dumps(carried(row, chosen, rejected), sort_keys=True, ensure_ascii=False),
    }
