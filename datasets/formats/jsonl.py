"""JSON lines: ``{"prompt": "a cat", "chosen": "pictures/1.png", "rejected": "pictures/2.png"}``, or sounds in the place of the
pictures.

The paths are below the folder of the file; absolute ones, those that climb out (also through a link) and addresses are refused.
Other keys stay in the condition, since judges may need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.datasets.formats.carrying import KEY, carried, pair_of
from polyalign.datasets.formats.checking import read_file
from polyalign.datasets.formats.exporting import rows_of
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Source, entry, identity_of
from polyalign.datasets.formats.text_lines import as_object, count_objects, named_files, objects
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pairs import PairStore

FILE = "pairs.jsonl"


def import_jsonl(path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a ``.jsonl`` file, a ``.json`` file that is a list, or the folder of an export (with ``pairs.jsonl``).
    """
    return import_pairs(JsonLines(Path(path)), store, on_bad_row=on_bad_row)


def listed(path: Path) -> list[Path]:
    """The files that the file at ``path`` names."""
    return named_files(JsonLines(path).path, SIDES)


class JsonLines(Source):
    """The lines of one file."""

    name = "jsonl"
    judges = None

    def __init__(self, path: Path, outputs: str = "picture"):
        self.outputs = outputs
        self.path = path / FILE if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file. It holds an object with prompt, chosen and rejected a line")

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of({self.path.name: self.path})}

    def total(self) -> int:
        return count_objects(self.path)

    def entries(self, start: int) -> Iterator[Entry]:
        for place, number, given in objects(self.path, start):
            yield entry(place, self._read, f"{number:06d}", place, given)

    def _read(self, pair_id: str, place: str, given: Any) -> Outcome:
        line = as_object(given)
        missing = [f"'{side}'" for side in SIDES if line.get(side) is None]
        if missing:
            raise ValueError(f"no {' and no '.join(missing)}; found {', '.join(map(repr, line)) or 'nothing'}")
        chosen, rejected = (read_file(self.path.parent, line[side]) for side in SIDES)
        rest = {name: value for name, value in line.items() if name not in SIDES}
        origin = {"file": self.path.name, "place": place, **{side: line[side] for side in SIDES}}
        return Outcome([pair_of(pair_id, rest, chosen, rejected, origin)])


def export_jsonl(store: PairStore, folder: Path) -> None:
    """``pairs.jsonl`` and ``pictures/`` (or ``sounds/``) in ``folder``, in the store's order. Files byte for byte, those in
    rare formats as PNG (or FLAC)."""
    beside = store.kind.words
    (folder / beside).mkdir()
    written = []
    for index, row in rows_of(store):
        names, contents = {}, []
        for side in SIDES:
            ending, content = store.kind.as_file(row[side])
            names[side] = f"{beside}/{index:06d}-{side}{ending}"
            (folder / names[side]).write_bytes(content)
            contents.append(content)
        line = {"prompt": row["condition"]["prompt"], **names, KEY: carried(row, *contents)}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_write(folder / FILE, "".join(written))
