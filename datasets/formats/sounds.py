"""Pairs of sounds in public formats: Audio-alpaca's parquet, JSON lines, folders.

``alpaca`` has Audio-alpaca's columns (arXiv 2404.09956): ``prompt``, ``chosen`` and ``rejected`` (Hugging Face's ``Audio``, a
struct of ``bytes`` and ``path``; paths are not followed) and ``strategy``, how the pair was made. A JSON line names files below
its own folder (``{"prompt": ..., "chosen": "a.wav", "rejected": "b.wav"}``); a folder has ``chosen/`` and ``rejected/``.

Files are kept as they are. What a model hears of them is mono at its own rate, so an import counts files of several channels
(``of_several_channels``) and of each rate (``at_44100_hz``) and says so. A silent, cut short or empty file is a bad row.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyalign.datasets.audio.waves import header
from polyalign.datasets.formats import parquet_files
from polyalign.datasets.formats.carrying import KEY, carried
from polyalign.datasets.formats.folders import Folders
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.jsonl import JsonLines
from polyalign.datasets.formats.rows import Rows
from polyalign.datasets.formats.source import OnBadRow, Outcome, Source
from polyalign.datasets.outputs import KINDS
from polyalign.datasets.pairs import PairStore

STRATEGY = "strategy"
"""Audio-alpaca's column, and the key of a pair's condition, that says how it was made."""
SEVERAL = "of_several_channels"

_SOUND = KINDS["sound"]
_COLUMNS = ("prompt", "chosen", "rejected")
_TEXT = {"dtype": "string", "_type": "Value"}
_FEATURES = {"prompt": _TEXT, "chosen": _SOUND.feature, "rejected": _SOUND.feature, STRATEGY: _TEXT, KEY: _TEXT}
_SCHEMA = pa.schema(
    [(name, _SOUND.arrow if name in _COLUMNS[1:] else pa.string()) for name in _FEATURES],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}}, sort_keys=True)},
)


def import_alpaca(
    path: Path,
    store: PairStore,
    *,
    on_bad_row: OnBadRow = "error",
    split: str | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`. The column ``strategy``, like others that
    JSON can hold, goes into the condition.

    Args:
        path: a parquet file, a folder of them, or a folder of ``Dataset.save_to_disk``.
        split: which of the splits in the folder.
        prompt, chosen, rejected: names of the columns.
    """
    return _said(import_pairs(_Alpaca(Path(path), split, (prompt, chosen, rejected), "sound"), store, on_bad_row=on_bad_row))


def import_sound_jsonl(path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a ``.jsonl`` file, a ``.json`` file that is a list, or the folder of an export (with ``pairs.jsonl``).
    """
    return _said(import_pairs(_Lines(Path(path), "sound"), store, on_bad_row=on_bad_row))


def import_sound_folders(path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.folders.import_folders`."""
    return _said(import_pairs(_Sides(Path(path), on_bad_row, "sound"), store, on_bad_row=on_bad_row))


class _Counted(Source):
    """A source whose files are counted by what a model does not hear of them."""

    def _read(self, *arguments: Any) -> Outcome:
        outcome: Outcome = super()._read(*arguments)  # pyright: ignore[reportAttributeAccessIssue]  (the format's own)
        counts = Counter(outcome.counts)
        for content in (side for pair in outcome.pairs for side in (pair.chosen, pair.rejected)):
            found = header(content)  # pyright: ignore[reportArgumentType]  (of a sound, so bytes)
            counts[f"at_{found.rate}_hz"] += 1
            counts[SEVERAL] += found.channels > 1
        return replace(outcome, counts=+counts)


class _Alpaca(_Counted, Rows):
    name = "alpaca"


class _Lines(_Counted, JsonLines):
    pass


class _Sides(_Counted, Folders):
    pass


def _said(summary: dict[str, Any]) -> dict[str, Any]:
    """Tell the user what models will not hear of these files."""
    rates = [name.split("_")[1] for name in summary if name.startswith("at_") and name.endswith("_hz")]
    several = summary.get(SEVERAL, 0)
    if several:
        print(f"{several} of {summary['samples']} sounds have several channels; models hear their mean", file=sys.stderr)
    print(f"sounds at {', '.join(rates)} Hz; a model of another rate hears them resampled", file=sys.stderr, flush=True)
    return summary


def export_alpaca(store: PairStore, folder: Path) -> None:
    """``train-00000-of-0000N.parquet`` in ``folder``, in the store's order, sounds byte for byte, with Audio-alpaca's columns;
    ``strategy`` is that of the pair's condition, empty where it has none."""
    parquet_files.write_files(store, folder, _exported, _SCHEMA)


def _exported(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected, condition = row["chosen"], row["rejected"], row["condition"]
    return {
        "prompt": condition["prompt"],
        **{side: _SOUND.encode(row[side]) for side in _COLUMNS[1:]},
        STRATEGY: str(condition.get(STRATEGY, "")),
        KEY: json.dumps(carried(row, chosen, rejected), sort_keys=True, ensure_ascii=False),
    }
