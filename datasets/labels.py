"""Single answers with a label, good or bad: what KTO and BCO train on, and, where all are good, fine-tuning.

A row of the data has ``prompt``, ``completion`` and ``label`` (true or false, 1 or 0), as TRL's unpaired preference data have
them; prompt and completion are texts, or turns of a conversation. Without a label a row is good. It may lie in JSON lines, a
``.json`` file that is a list, parquet or Arrow.

In a run they lie in ``pairs/labels.jsonl``, a row a line: ``pair_id``, ``condition``, ``completion``, ``label``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.datasets.files import listed
from polyalign.datasets.formats import parquet_files, text_lines, text_rows
from polyalign.datasets.formats.checking import check_text
from polyalign.datasets.prompts import as_condition

FILE = "labels.jsonl"
LISTED = 1000
"""Dropped rows named in the summary."""


class LabelStore:
    """The rows of a run, in the place of pairs: ``len``, rows by position, conditions, a hash."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._rows: list[dict[str, Any]] | None = None

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows, in the place of those before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
        self._rows = None

    def __len__(self) -> int:
        return len(self._all())

    def rows(self, indices: Sequence[int], *, decode: bool = True) -> list[dict[str, Any]]:
        """Rows by position, in the order asked for; texts need no decoding."""
        every = self._all()
        return [every[index] for index in indices]

    def conditions(self) -> list[dict[str, Any]]:
        return [row["condition"] for row in self._all()]

    def labels(self) -> list[bool]:
        return [row["label"] for row in self._all()]

    def content_hash(self) -> str:
        """SHA-256 of the file."""
        return sha256_of(self.file)

    def validate(self) -> int:
        """The number of rows.

        Raises:
            UserError: the file is missing or damaged.
        """
        return len(self._all())

    def _all(self) -> list[dict[str, Any]]:
        if self._rows is None:
            if not self.file.is_file():
                raise UserError(f"{self.folder}: no labelled answers here (no file {FILE}). Run 'generate' first")
            try:
                # Only line feeds end a line: JSON may hold other characters that Python would cut at.
                self._rows = [json.loads(line) for line in self.file.read_bytes().split(b"\n") if line]
            except ValueError as error:
                raise UserError(f"{self.file}: is damaged ({error}). Remove the folder and run 'generate' again") from error
        return self._rows


def import_labels(
    path: Path,
    store: LabelStore,
    *,
    on_bad_row: Literal["error", "drop"] = "error",
    split: str | None = None,
    prompt: str = "prompt",
    completion: str = "completion",
    label: str = "label",
) -> dict[str, Any]:
    """Fill ``store``, write its ``summary.json`` and return the summary.

    Args:
        path: a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file, or a folder of files of one of these kinds.
        on_bad_row: a row that cannot be used is an error (all are listed), or it is left out, counted and listed.
        split: which of the splits in the folder.
        prompt, completion, label: names of the columns; the label's may be missing: all rows are then good.

    Raises:
        UserError: bad rows, no row left, or data that cannot be read.
    """
    columns = (prompt, completion, label)
    lines, files = text_rows.data_files(Path(path), split)
    rows: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    for number, (name, place, given) in enumerate(text_rows.rows_of(lines, files, 0)):
        try:
            row = text_lines.as_object(given) if lines else given
            condition, answer, good = labelled(row, columns)
            rows.append({"pair_id": f"{number:08d}", "condition": condition, "completion": answer, "label": good})
        except ValueError as error:
            dropped.append({"place": place if lines else f"{name} {place}", "problem": str(error)})
    if dropped and on_bad_row == "error":
        problems = listed([f"{one['place']}: {one['problem']}" for one in dropped])
        raise UserError(
            f"{path}: {len(dropped)} bad row(s), nothing was imported:\n{problems}\nMend this and run again, or leave such "
            "rows out with pairs.on_bad_row: drop; they are then counted and listed in summary.json"
        )
    if not rows:
        raise UserError(f"{path}: no row is left of {len(dropped)}. A row has '{prompt}', '{completion}' and '{label}'")
    store.write(rows)
    summary = {
        "source": "labels",
        "rows": len(rows) + len(dropped),
        "prompts": len({row["condition"]["prompt"] for row in rows}),
        "labelled": len(rows),
        "desirable": sum(row["label"] for row in rows),
        "undesirable": sum(not row["label"] for row in rows),
        "rows_dropped": len(dropped),
        "dropped": dropped[:LISTED],
    }
    atomic_write(store.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def labelled(
    row: Mapping[str, Any], columns: tuple[str, str, str] = ("prompt", "completion", "label")
) -> tuple[dict[str, Any], str, bool]:
    """Condition, answer and whether it is good.

    Raises:
        ValueError: a column that is missing, empty or of another kind.
    """
    prompt_column, answer_column, label_column = columns
    missing = [f"'{column}'" for column in columns[:2] if row.get(column) is None]
    if missing:
        found = ", ".join(repr(str(name)) for name in row) or "nothing"
        raise ValueError(f"no column {' and no '.join(missing)}; found {found}")
    prompt, answer = row[prompt_column], row[answer_column]
    if isinstance(prompt, list) != isinstance(answer, list):
        raise ValueError(
            f"column '{prompt_column}' is a {text_rows.kind_words(prompt)} and column '{answer_column}' a "
            f"{text_rows.kind_words(answer)}"
        )
    if isinstance(prompt, list):
        turns = text_rows.turns_of(prompt, prompt_column)
        answer = text_rows.answer_after(text_rows.turns_of(answer, answer_column), turns, answer_column)
        own: dict[str, Any] = {"prompt": text_rows.last_of_user(turns, prompt_column), "messages": turns}
    else:
        own = {"prompt": _text(prompt, prompt_column)}
    answer = _text(answer, answer_column)
    check_text(answer)
    rest = parquet_files.plain_columns(dict(row), (*columns, "prompt", "messages"))
    # as_condition strips, which a prompt that ends before a line break cannot stand
    condition = {**as_condition({"prompt": own["prompt"], **rest}), **own}
    json.dumps(condition, ensure_ascii=False).encode()  # half of a Unicode pair, which no file can hold, is a ValueError
    return condition, answer, _label(row.get(label_column), label_column)


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' must be text or turns, found {text_rows.kind_words(value)}")
    if not value.strip():
        raise ValueError(f"column '{column}' is empty")
    return value


def _label(value: Any, column: str) -> bool:
    if value is None:
        return True
    if value in (True, False):  # also 1 and 0, which equal them
        return bool(value)
    raise ValueError(f"column '{column}' must be true or false (1 or 0), found {value!r}")
