"""Tables of the data card that whatever made the pairs has written: ``tables`` of pairs/summary.json.

A table is ``{"title": str, "note": str, "columns": [str, ...], "rows": [[cell, ...], ...]}``; a cell is a text, a number or
null, and a row's first cell says what it is about. Nothing here knows who wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from polyalign.evaluation.report.markup import foreign, note, number, table, text

Cell = int | float | str | None
NOTHING = "\u2013"


class _Table(BaseModel):
    title: str
    note: str = ""
    columns: list[str]
    rows: list[list[Cell]]

    @model_validator(mode="after")
    def _rectangular(self) -> _Table:
        if not self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("each row has a cell for each column")
        return self


def tables(blocks: Any) -> str:
    """The tables one under another; one that cannot be read is said to be so. Empty without any."""
    return "".join(_shown(block) for block in blocks) if isinstance(blocks, list) else ""


def _shown(block: Any) -> str:
    try:
        found = _Table.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        return note(f"A table in pairs/summary.json cannot be read: {text(first['msg'], 120)}.")
    if not found.rows:
        return ""
    numeric = [place for place in range(1, len(found.columns)) if not _any_text([row[place] for row in found.rows])]
    head = [foreign(name, 60) for name in found.columns]
    rows = [[_cell(cell) for cell in row] for row in found.rows]
    words = f'<p class="quiet">{foreign(found.note, 800)}</p>' if found.note else ""
    return f"<h3>{foreign(found.title, 120)}</h3>{table(head, rows, numeric=numeric)}{words}"


def _any_text(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, str) for cell in cells)


def _cell(cell: Cell) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, str):
        return foreign(cell, 160)
    return f"{cell:,}" if isinstance(cell, int) else number(cell)
