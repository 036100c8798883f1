"""The user's own pictures (or sounds): ``chosen/`` and ``rejected/`` with equal names, captions beside them.

::

    my_pairs/
      chosen/cat.png    rejected/cat.jpg      the names are equal up to the ending (.png, .jpg, .jpeg, .webp; of sounds .flac,
                                              .wav, .ogg, .mp3)
      chosen/cat.txt    or  cat.txt           the caption
      captions.jsonl    or so, for all: {"file_name": "cat.png", "prompt": "a cat"} a line; other keys stay in the condition

Everything is checked before anything is written, and all that is wrong is said at once; with ``on_bad_row: drop`` such pairs
are left out and listed instead. Files are kept byte for byte; the two of a pair may differ in size and format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.datasets.files import listed
from polyalign.datasets.formats.carrying import KEY, carried, pair_of
from polyalign.datasets.formats.checking import read_file
from polyalign.datasets.formats.exporting import rows_of
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Source, entry, identity_of
from polyalign.datasets.formats.suffixes import CLUTTER
from polyalign.datasets.outputs import KINDS, OutputKind
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import Condition, as_condition

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class FolderPair:
    """One pair on disk; ``name`` is what the two pictures share."""

    name: str
    chosen: Path
    rejected: Path
    condition: Condition


def import_folders(path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Read the folder ``path``, fill ``store`` and write its ``summary.json``; returns the summary.

    Raises:
        UserError: whatever is wrong with the folder (with ``on_bad_row="drop"`` only what concerns all of it; see
            :func:`read_folders`), no pair left, another import in the store, or no room on the disk.
    """
    return import_pairs(Folders(Path(path), on_bad_row), store, on_bad_row=on_bad_row)


class Folders(Source):
    """The pairs of one folder, in the order of their names. Looked over as a whole before the first one is read."""

    name = "folders"
    judges = None

    def __init__(self, path: Path, on_bad_row: OnBadRow = "error", outputs: str = "picture"):
        self.path, self.outputs = path, outputs
        self._around: list[str] = []
        dropped = self._around if on_bad_row == "drop" else None
        self.pairs, self.duplicates = read_folders(path, dropped=dropped, kind=KINDS[outputs])
        self.names = sorted([*(pair.name for pair in self.pairs), *self.duplicates])

    def identity(self) -> dict[str, Any]:
        files = {self._shown(getattr(pair, side)): getattr(pair, side) for pair in self.pairs for side in SIDES}
        conditions = json.dumps([pair.condition for pair in self.pairs], sort_keys=True, ensure_ascii=False)
        return {"files": identity_of(files), "captions": sha256_of(conditions.encode()), "duplicates": self.duplicates}

    def total(self) -> int:
        return len(self.names)

    def problems(self) -> list[str]:
        return self._around

    def entries(self, start: int) -> Iterator[Entry]:
        pairs = {pair.name: pair for pair in self.pairs}
        for name in self.names[start:]:
            yield entry(f"pair {name}", self._read, name, pairs.get(name))

    def _read(self, name: str, pair: FolderPair | None) -> Outcome:
        if pair is None:
            return Outcome(duplicates=[name])
        origin = {side: self._shown(getattr(pair, side)) for side in SIDES}
        chosen, rejected = (read_file(self.path, origin[side]) for side in SIDES)
        return Outcome([replace(pair_of(name, pair.condition, chosen, rejected, origin), checked=True)])

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def read_folders(
    folder: Path, *, dropped: list[str] | None = None, kind: OutputKind = KINDS["picture"]
) -> tuple[list[FolderPair], list[str]]:
    """Pairs by name, and the names of those whose two outputs are identical. Every file is decoded once, to be sure of it.

    Raises:
        UserError: everything that is wrong, with the file it is about (the first 20 are shown). Given a list ``dropped``, what
            is wrong with single pairs goes there instead, and these pairs are left out.
    """
    folder = Path(folder)
    absent = [f"{side}/" for side in SIDES if not (folder / side).is_dir()]
    if absent:
        raise UserError(
            f"{folder}: no {' and no '.join(absent)} in this folder. It needs chosen/ and rejected/ with {kind.words} of equal "
            "names, and captions as .txt files beside them or in captions.jsonl"
        )
    problems: list[str] = []
    sides = {side: _files(folder, side, kind, problems) for side in SIDES}
    names = sorted(set(sides["chosen"]) & set(sides["rejected"]))
    for side, other in (SIDES, SIDES[::-1]):
        alone = sorted(set(sides[side]) - set(sides[other]))
        problems += [f"{side}/{sides[side][name].name} has no {other}/{name}.*" for name in alone]
    if not any(sides.values()):
        problems.append(f"there are no {kind.words} in chosen/ and rejected/")
    captions = _Captions(folder, kind, problems)
    pairs, duplicates = [], []
    for name in names:
        condition = captions.of(name)
        hashes = [_hash_of(sides[side][name], folder, kind, problems) for side in SIDES]
        if condition is None or None in hashes:
            continue
        if hashes[0] == hashes[1]:
            duplicates.append(name)
        else:
            pairs.append(FolderPair(name, sides["chosen"][name], sides["rejected"][name], condition))
    problems += captions.unused(set(sides["chosen"]) | set(sides["rejected"]))
    if dropped is not None:
        dropped += problems
    elif problems:
        raise UserError(f"{folder}: {len(problems)} problem(s), nothing was imported:\n{listed(problems)}")
    return pairs, duplicates


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path, all links followed, stays in the folder."""
    return path.resolve().is_relative_to(folder.resolve())


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a folder, by name, without the files that desktops leave everywhere."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name.lower() not in CLUTTER:
            yield path


def _files(folder: Path, side: str, kind: OutputKind, problems: list[str]) -> dict[str, Path]:
    """Outputs of one side by name without ending."""
    found: dict[str, Path] = {}
    if not _inside(folder / side, folder):
        problems.append(f"{side}/ is a link that leads out of the folder")
        return found
    for path in _entries(folder / side):
        shown = f"{side}/{path.name}"
        if not _inside(path, folder):
            problems.append(f"{shown} is a link that leads out of the folder")
        elif not path.is_file():
            problems.append(f"{shown} is not a file; {kind.words} lie directly in {side}/")
        elif path.suffix.lower() == ".txt":
            continue
        elif path.suffix.lower() not in kind.endings:
            problems.append(f"{shown} is none of {', '.join(kind.endings)} (nor a .txt caption)")
        elif path.stem in found:
            problems.append(f"{shown} has the name of {side}/{found[path.stem].name}")
        else:
            found[path.stem] = path
    return found


def _hash_of(path: Path, folder: Path, kind: OutputKind, problems: list[str]) -> str | None:
    try:
        return kind.check(path.read_bytes())
    except (ValueError, OSError) as error:
        problems.append(f"{path.relative_to(folder).as_posix()}: {error}")
        return None


class _Captions:
    """Captions from ``NAME.txt`` in ``chosen/`` or beside it, and from ``captions.jsonl``. Two that differ are a problem."""

    def __init__(self, folder: Path, kind: OutputKind, problems: list[str]):
        self.folder, self.kind, self.problems = folder, kind, problems
        self.lines = self._json_lines()
        places = [place for place in (folder, folder / "chosen") if _inside(place, folder)]  # the last one counts
        self.files = {path.stem: path for place in places for path in _entries(place) if path.suffix.lower() == ".txt"}

    def of(self, name: str) -> Condition | None:
        """The condition of a pair; None, and a problem, if it has no caption."""
        line, path = self.lines.get(name), self.files.get(name)
        text = None if path is None else self._text(path)
        if path is not None and text is None:
            return None
        if line is None and text is None:
            self.problems.append(
                f'{name}: no caption; expected chosen/{name}.txt, {name}.txt or a line with "file_name": "{name}" in {CAPTIONS}'
            )
            return None
        if line is not None and text is not None and line["prompt"] != text:
            self.problems.append(f"{name}: {CAPTIONS} says {line['prompt']!r}, the .txt file {text!r}")
            return None
        return line if line is not None else {"prompt": text}

    def unused(self, names: set[str]) -> list[str]:
        """Lines of ``captions.jsonl`` that belong to no file."""
        return [
            f"{CAPTIONS} names {name!r}, which is in neither chosen/ nor rejected/" for name in sorted(set(self.lines) - names)
        ]

    def _text(self, path: Path) -> str | None:
        shown = path.relative_to(self.folder).as_posix()
        if not _inside(path, self.folder):
            self.problems.append(f"{shown} is a link that leads out of the folder")
            return None
        try:
            text = " ".join(path.read_bytes().decode("utf-8-sig").split())
        except UnicodeDecodeError:
            self.problems.append(f"{shown} is not UTF-8 text")
            return None
        if not text:
            self.problems.append(f"{shown}: the caption is empty")
        return text or None

    def _json_lines(self) -> dict[str, Condition]:
        path = self.folder / CAPTIONS
        if not path.exists():
            return {}
        if not _inside(path, self.folder):
            self.problems.append(f"{CAPTIONS} is a link that leads out of the folder")
            return {}
        try:
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            self.problems.append(f"{CAPTIONS} is not UTF-8 text")
            return {}
        found: dict[str, Condition] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                name, condition = _caption_line(line, self.kind)
            except ValueError as error:  # also json.JSONDecodeError
                self.problems.append(f"{CAPTIONS} line {number}: {error}")
                continue
            if name in found:
                self.problems.append(f"{CAPTIONS} line {number}: {name!r} was named before")
            found.setdefault(name, condition)
        return found


def _caption_line(line: str, kind: OutputKind) -> tuple[str, Condition]:
    """Name without ending, and condition, of one line of ``captions.jsonl``.

    Raises:
        ValueError: not JSON, no name, a name that is a path, or no prompt.
    """
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError('expected an object with "file_name" and "prompt"')
    name = entry.pop("file_name")
    if name in ("", ".", "..") or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise ValueError(f"file_name {name!r} is a path; give the name alone, the {kind.name} lies in chosen/ and rejected/")
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in kind.endings else name
    condition = as_condition(entry)
    condition["prompt"] = " ".join(condition["prompt"].split())
    return stem, condition


def export_folders(store: PairStore, folder: Path) -> None:
    """``chosen/``, ``rejected/`` with ``000000.png``, ``chosen/000000.txt`` and ``captions.jsonl`` in ``folder``, numbered in
    the store's order. Files byte for byte, those in rare formats as PNG (sounds: FLAC); line feeds and runs of spaces in a
    prompt become one space."""
    for side in SIDES:
        (folder / side).mkdir()
    written = []
    for index, row in rows_of(store):
        contents = []
        for side in SIDES:
            ending, content = store.kind.as_file(row[side])
            (folder / side / f"{index:06d}{ending}").write_bytes(content)
            contents.append(content)
        prompt = " ".join(row["condition"]["prompt"].split())
        (folder / "chosen" / f"{index:06d}.txt").write_text(prompt + "\n", encoding="utf-8")
        line = {"file_name": f"{index:06d}", "prompt": prompt, KEY: carried(row, *contents)}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_write(folder / CAPTIONS, "".join(written))
