"""Tensors kept by content: what the frozen parts make of a picture or a prompt is made once."""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from polyalign.core.files import atomic_write

Entry = dict[str, Tensor]


class ContentCache:
    """Keeps small dictionaries of CPU tensors under a key of their content.

    In memory up to ``limit_bytes``, the least recently used leave first; in ``folder`` too, if there is one, without a limit. A
    file is written under another name and renamed, so processes may share a folder; one that cannot be read is made again.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = 2 * 2**30):
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, keys: tuple[str, ...], make: Callable[[], Entry]) -> Entry:
        """The entry of ``keys``, from memory, from disk, or from ``make``."""
        key = hashlib.sha256("\x1f".join(keys).encode()).hexdigest()
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = self._read(key)
        if entry is None:
            entry = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            self._write(key, entry)
        self._keep(key, entry)
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        if _bytes(entry) > self.limit_bytes:
            return  # it would put all others out, and itself at last
        self._entries[key] = entry
        self.bytes += _bytes(entry)
        while self.bytes > self.limit_bytes and self._entries:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= _bytes(oldest)

    def _read(self, key: str) -> Entry | None:
        path = None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError:
            return None  # cut short by a crash of the machine; the entry is made again and written over

    def _write(self, key: str, entry: Entry) -> None:
        if self.folder is None:
            return
        path = self.folder / key[:2] / f"{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save(entry))


def size_of(folder: Path) -> tuple[int, int]:
    """How many files a folder holds, and their bytes; those that another process removes meanwhile do not count."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def tell_size(folder: Path) -> None:
    """Say on the terminal what a cache has come to, if there is one."""
    count, total = size_of(folder)
    if count:
        print(
            f"cache: {total / 1e6:,.1f} MB in {count:,} files in {folder}; it may be deleted, and what is needed is made again",
            file=sys.stderr,
            flush=True,
        )


def _bytes(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
