"""From the pair store to folders that others read: how rows are cut into files, and the export as a whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import disk_full_explained
from polyalign.datasets.pairs import PairStore

ROWS_PER_FILE = 256
_TOGETHER = 16  # rows in memory at a time: two row groups of the store

Writer = Callable[[PairStore, Path], None]


def export_pairs(store: PairStore, writer: Writer, folder: Path) -> int:
    """Write the store into ``folder``, which must not be there yet or be empty, and return the number of pairs. The folder gets
    its name when all is in it.

    Raises:
        UserError: the store is damaged, there is something at ``folder``, or no room on the disk.
    """
    folder = Path(folder)
    count = store.validate()
    if not count:
        raise UserError(f"{store.folder}: there are no pairs in this store, so there is nothing to export")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; nothing was written. Give another folder, or move this one away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the export {folder}"):
            (partial / "export").mkdir()
            writer(store, partial / "export")
            if folder.exists():
                folder.rmdir()
            (partial / "export").rename(folder)
    finally:
        shutil.rmtree(partial)
    return count


def parts_of(store: PairStore) -> list[Sequence[int]]:
    """The store's rows in order, as many at a time as go into one file."""
    count = len(store)
    return [range(start, min(start + ROWS_PER_FILE, count)) for start in range(0, count, ROWS_PER_FILE)]


def rows_of(store: PairStore) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its number; pictures as the bytes of their files."""
    for start in range(0, len(store), _TOGETHER):
        yield from enumerate(store.rows(range(start, min(start + _TOGETHER, len(store))), decode=False), start)
