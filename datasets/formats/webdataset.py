"""WebDataset: tar files in which the members of one sample follow one another and share a key.

The key is a member's path up to the first dot of its name; what follows is its field. A pair is::

    cats/0001.chosen.jpg  cats/0001.rejected.jpg      the two pictures, with any ending
    cats/0001.txt                                     the caption, or
    cats/0001.json                                    an object with prompt (or caption, or text); all of it is kept

Options name other fields (``chosen: win`` for ``0001.win.jpg``). Fields that are none of these are left alone. A member whose
path is absolute or climbs out, and one that is a link or a device, makes its sample a bad row; nothing is ever unpacked to the
disk. The tar files of a folder are read in the order of their names; they must not be compressed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.datasets.formats.carrying import KEY, carried, pair_of
from polyalign.datasets.formats.checking import MAX_BYTES, check_member
from polyalign.datasets.formats.exporting import parts_of
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Source, entry, identity_of
from polyalign.datasets.formats.text_lines import as_object
from polyalign.datasets.outputs import OutputKind
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pairs import PairStore

MAX_TEXT = 1 << 20  # bytes of a caption


def import_webdataset(
    path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error", chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a tar file, or a folder of them.
        chosen, rejected: names of the pictures' fields, without their endings.
    """
    return import_pairs(WebDataset(Path(path), chosen, rejected), store, on_bad_row=on_bad_row)


@dataclass
class _Sample:
    """Members of one key, by field; ``problem`` is what is wrong with one of them."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: str | None = None


class WebDataset(Source):
    """The samples of one or more tar files."""

    name = "webdataset"
    judges = None

    def __init__(self, path: Path, chosen: str = "chosen", rejected: str = "rejected"):
        self.path, self.fields = path, {"chosen": chosen, "rejected": rejected}
        found = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not found:
            raise UserError(f"{path}: no such tar file, nor a folder with files ending in .tar")
        if chosen == rejected or not chosen or not rejected:
            raise UserError(f"options: the fields {chosen!r} and {rejected!r} do not tell two pictures apart")
        self.files = {file.name: file for file in found}

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of(self.files), **self.fields}

    def entries(self, start: int) -> Iterator[Entry]:
        number = 0
        for name, path in self.files.items():
            try:
                with tarfile.open(path, "r:") as archive:
                    for sample in _samples(archive):
                        if number >= start:
                            yield entry(f"{name} sample {sample.key!r}", self._read, path, sample)
                        number += 1
            except (tarfile.TarError, OSError) as error:
                hint = "Unpack it first" if path.suffix in (".gz", ".xz", ".bz2", ".zst", ".tgz") else "Fetch or write it again"
                raise UserError(f"{path}: not a readable tar file after sample {number}: {error}. {hint}") from error

    def _read(self, file: Path, sample: _Sample) -> Outcome:
        if sample.problem:
            raise ValueError(sample.problem)
        chosen, rejected = (self._picture(file, sample, side) for side in SIDES)
        given: dict[str, Any] = {}
        if "json" in sample.members:
            given |= as_object(_text(file, sample.members["json"]))
        if "txt" in sample.members:
            caption = _text(file, sample.members["txt"]).strip()
            if str(given.get("prompt", caption)).strip() != caption:
                raise ValueError(f"the .txt says {caption!r}, the .json {given['prompt']!r}")
            given["prompt"] = caption
        if not given:
            raise ValueError(f"no caption; expected {sample.key}.txt or {sample.key}.json")
        return Outcome([pair_of(sample.key, given, chosen, rejected, {"file": file.name, "key": sample.key})])

    def _picture(self, file: Path, sample: _Sample, side: str) -> bytes:
        wanted = self.fields[side]
        found = [name for name in sample.members if name == wanted or name.startswith(f"{wanted}.")]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise ValueError(f"{what} {sample.key}.{wanted}.*; fields: {', '.join(sample.members)}")
        return _content(file, sample.members[found[0]], MAX_BYTES)


def _samples(archive: tarfile.TarFile) -> Iterator[_Sample]:
    """Runs of members with one key. Folders are nothing; a member that must not be read spoils its sample."""
    current: _Sample | None = None
    for member in archive:
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        stem, _, name = path.name.partition(".")
        key = str(path.parent / stem) if str(path.parent) != "." else stem
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = _Sample(key)
        try:
            check_member(member.name)
            if not member.isreg() or member.issparse():
                raise ValueError(f"{member.name!r} is no plain file but a link, a device or sparse")
            if name.lower() in current.members:
                raise ValueError(f"{member.name!r} is there twice")
        except ValueError as error:
            current.problem = current.problem or f"member {error}"
        current.members[name.lower()] = member
    if current is not None:
        yield current


def _content(file: Path, member: tarfile.TarInfo, limit: int) -> bytes:
    """A member's bytes, from where they lie in the file: its archive may be closed by now."""
    if member.size > limit:
        raise ValueError(f"{member.name!r} has {member.size:,} bytes; at most {limit:,} are read")
    with open(file, "rb") as opened:
        opened.seek(member.offset_data)
        content = opened.read(member.size)
    if len(content) != member.size:
        raise ValueError(f"{member.name!r} is cut off: {len(content)} of {member.size} bytes")
    return content


def _text(file: Path, member: tarfile.TarInfo) -> str:
    try:
        return _content(file, member, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name!r} is not UTF-8 text (byte {error.start})") from error


def export_webdataset(store: PairStore, folder: Path) -> None:
    """``pairs-000000.tar`` and so on in ``folder``, in the store's order, 256 pairs each; keys are numbers. PNG, JPEG and WebP
    byte for byte, others as PNG; equal stores give equal bytes."""
    for number, part in enumerate(parts_of(store)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index, row in zip(part, store.rows(part, decode=False), strict=True):
                _add_pair(archive, f"{index:08d}", row, store.kind)
        atomic_write(folder / f"pairs-{number:06d}.tar", buffer.getvalue())


def _add_pair(archive: tarfile.TarFile, key: str, row: dict[str, Any], kind: OutputKind) -> None:
    contents = []
    for side in SIDES:
        ending, content = kind.as_file(row[side])
        _add(archive, f"{key}.{side}{ending}", content)
        contents.append(content)
    prompt = row["condition"]["prompt"]
    line = json.dumps({"prompt": prompt, KEY: carried(row, *contents)}, sort_keys=True, ensure_ascii=False)
    _add(archive, f"{key}.txt", prompt.encode())
    _add(archive, f"{key}.json", line.encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and mode are fixed
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
