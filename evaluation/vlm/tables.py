"""VLMEvalKit's tables: a benchmark as tab-separated values, and a model's predictions laid out for ``run.py --mode eval``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write

FIELD_BYTES = 1 << 28
"""A field holds a picture as base64."""
FORMATS = ("tsv", "json")
PICTURES = ("image",)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a benchmark's table, without its pictures.

    Raises:
        UserError: unreadable, without rows, or without the column ``index``.
    """
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_BYTES))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [
                {name: value or "" for name, value in row.items() if name is not None and name not in PICTURES}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: this table cannot be read ({error})") from error
    if not rows or "index" not in rows[0]:
        raise UserError(f"{path}: a table of VLMEvalKit is expected: tab-separated, with rows and a column 'index'")
    return rows


def write_predictions(
    folder: Path, model: str, benchmark: str, rows: Sequence[Mapping[str, str]], said: Mapping[str, str], *, form: str = "tsv"
) -> Path:
    """``FOLDER/MODEL/MODEL_BENCHMARK.tsv`` (or ``.json``): the benchmark's rows, without pictures, with ``prediction``.

    VLMEvalKit reads it with ``PRED_FORMAT=tsv`` (or ``json``) in the environment, put into the folder of a run
    (``MODEL/TyyyymmddT-hhmmss``) for ``--mode eval --reuse``. Its default, xlsx, is not written.

    Args:
        rows: of :func:`read_table`.
        said: answers by ``index``; a row without one gets what VLMEvalKit writes for it.

    Raises:
        UserError: another form, or names that are no file names.
    """
    if form not in FORMATS:
        raise UserError(f"form is {form!r}; allowed: {', '.join(FORMATS)} (VLMEvalKit's PRED_FORMAT)")
    for name in (model, benchmark):
        if not name or name.startswith(".") or Path(name).name != name:
            raise UserError(f"{name!r} is no name for a file: without slashes, and not beginning with a dot")
    filled = [{**row, "prediction": said.get(row["index"], "Failed to obtain answer")} for row in rows]
    path = folder / model / f"{model}_{benchmark}.{form}"
    if form == "json":
        atomic_write(path, json.dumps(filled, indent=1, ensure_ascii=False) + "\n")
        return path
    text = io.StringIO()
    writer = csv.DictWriter(text, list(filled[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(filled)
    atomic_write(path, text.getvalue())
    return path
