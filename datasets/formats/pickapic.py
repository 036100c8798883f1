"""Pick-a-Pic v2: parquet rows with two pictures and a person's choice between them.

Columns read: ``jpg_0`` and ``jpg_1`` (the pictures' bytes), ``label_0`` (1: the first is preferred, 0: the second, 0.5:
neither), ``caption``, and where they are there ``has_label`` (false: nobody chose) and ``model_0``, ``model_1`` (kept as
provenance). A row with 0.5 is a tie: dropped and counted, as the Diffusion-DPO code does for this data set (its diffusers port
takes a tie as a win of ``jpg_0``). A row without a label is counted apart. The 851,293 pairs of the paper (arXiv 2311.12908)
are what is left without ties.

Exported, the chosen picture is always ``jpg_0`` with ``label_0 = 1``.
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

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
LABELS = (0.0, 0.5, 1.0)
_SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("has_label", pa.bool_()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        (KEY, pa.string()),
    ]
)


def import_pickapic(
    path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error", split: str | None = None
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a parquet file, a folder of them, or a folder of ``Dataset.save_to_disk``.
        split: which of the splits in the folder (``train``, ``validation_unique`` ...).
    """
    return import_pairs(PickAPic(Path(path), split), store, on_bad_row=on_bad_row)


class PickAPic(Source):
    """The rows of one or more parquet files."""

    name = "pickapic"
    rows_per_shard = 256  # JPEG files of 512 and 768 pixels; there are 850 thousand rows

    def __init__(self, path: Path, split: str | None = None):
        self.path = path
        self.files = parquet_files.files_of(path, split)
        parquet_files.require_columns(self.files, COLUMNS)
        if any(KEY in parquet_files.schema_of(file).names for file in self.files.values()):
            self.judges = None

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of(self.files)}

    def total(self) -> int:
        return sum(parquet_files.rows_in(file) for file in self.files.values())

    def entries(self, start: int) -> Iterator[Entry]:
        for number, (name, row, stored) in enumerate(parquet_files.rows(self.files, start), start):
            yield entry(f"{name} row {row}", _read, f"{number:08d}", {"file": name, "row": row}, stored)


def _read(pair_id: str, origin: dict[str, Any], stored: dict[str, Any]) -> Outcome:
    if stored.get("has_label") is False:
        return Outcome(counts={"unlabelled_dropped": 1})
    label = stored["label_0"]
    if label not in LABELS:
        raise ValueError(f"label_0 must be 0, 0.5 or 1, found {label}")
    if label == 0.5:
        return Outcome(counts={"ties_dropped": 1})
    won, lost = ("0", "1") if label == 1 else ("1", "0")
    models = {
        f"{side}_model": stored[f"model_{number}"]
        for side, number in (("chosen", won), ("rejected", lost))
        if stored.get(f"model_{number}") is not None
    }
    chosen, rejected = (parquet_files.bytes_of(stored[f"jpg_{number}"], f"jpg_{number}") for number in (won, lost))
    given = {"prompt": stored["caption"], KEY: stored.get(KEY)}
    return Outcome([pair_of(pair_id, given, chosen, rejected, {**origin, **models})])


def export_pickapic(store: PairStore, folder: Path) -> None:
    """``train-00000-of-0000N.parquet`` in ``folder``, in the store's order, pictures byte for byte."""
    parquet_files.write_files(store, folder, _exported, _SCHEMA)


def _exported(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    model = row["provenance"]["model"]
    return {
        "jpg_0": chosen,
        "jpg_1": rejected,
        "label_0": 1.0,
        "label_1": 0.0,
        "caption": row["condition"]["prompt"],
        "has_label": True,
        "model_0": model,
        "model_1": model,
        KEY: json.dumps(carried(row, chosen, rejected), sort_keys=True, ensure_ascii=False),
    }
