"""One folder with both pictures of a pair, told apart by the end of their names, as users of kohya's trainers keep them::

    my_pairs/
      cat_w.png  cat_l.jpg      won and lost; what stands before is the pair's name
      cat.txt                   the caption; cat_w.txt, cat.caption and cat_w.caption are read as well

Captions keep their words; line feeds and runs of spaces become one space. The pairs come in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.formats.checking import read_file
from polyalign.datasets.formats.exporting import rows_of
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Pair, Source, entry, identity_of
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pairs import PairStore

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = (".txt", ".caption")
CLUTTER = ("thumbs.db", "desktop.ini")


def import_suffixes(
    path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error", chosen: str = "_w", rejected: str = "_l"
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: the folder.
        chosen, rejected: ends of the names of the two pictures.
    """
    return import_pairs(Suffixes(Path(path), chosen, rejected), store, on_bad_row=on_bad_row)


class Suffixes(Source):
    """The pictures of one folder."""

    name = "suffixes"

    def __init__(self, path: Path, chosen: str = "_w", rejected: str = "_l"):
        self.path, self.ends = path, {"chosen": chosen, "rejected": rejected}
        if not path.is_dir():
            raise UserError(f"{path}: no such folder. It holds pictures NAME{chosen}.png and NAME{rejected}.png and NAME.txt")
        if not chosen or not rejected or chosen.endswith(rejected) or rejected.endswith(chosen):
            raise UserError(f"options: the ends {chosen!r} and {rejected!r} do not tell two pictures apart")
        self._around: list[str] = []
        self.files = files_in(path)
        self.sides = self._sides()
        self.names = sorted(set(self.sides["chosen"]) & set(self.sides["rejected"]))

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of({name: file for name, file in self.files.items() if file.is_file()}), **self.ends}

    def total(self) -> int:
        return len(self.names)

    def problems(self) -> list[str]:
        return self._around

    def _sides(self) -> dict[str, dict[str, str]]:
        """The pictures of each side: the pair's name -> the file's name."""
        sides: dict[str, dict[str, str]] = {side: {} for side in SIDES}
        for name, file in self.files.items():
            if file.suffix.lower() in CAPTIONS:
                continue
            side = next((side for side, end in self.ends.items() if file.stem.endswith(end)), None)
            pair = file.stem.removesuffix(self.ends[side]) if side else file.stem
            if file.suffix.lower() not in ENDINGS:
                self._around.append(f"{name} is none of {', '.join(ENDINGS)} (nor a caption, {' or '.join(CAPTIONS)})")
            elif side is None or not pair:
                self._around.append(f"{name} ends in neither {self.ends['chosen']} nor {self.ends['rejected']}")
            elif pair in sides[side]:
                self._around.append(f"{name} has the name of {sides[side][pair]}")
            else:
                sides[side][pair] = name
        for side, other in (SIDES, SIDES[::-1]):
            alone = sorted(set(sides[side]) - set(sides[other]))
            self._around += [f"{sides[side][pair]} has no {pair}{self.ends[other]}.*" for pair in alone]
        return sides

    def entries(self, start: int) -> Iterator[Entry]:
        for name in self.names[start:]:
            yield entry(f"pair {name}", self._read, name)

    def _read(self, name: str) -> Outcome:
        files = {side: self.sides[side][name] for side in SIDES}
        chosen, rejected = (read_file(self.path, files[side]) for side in SIDES)
        caption = caption_of(self.path, self.files, (name, name + self.ends["chosen"]))
        return Outcome([Pair(name, {"prompt": caption}, chosen, rejected, files)])


def files_in(folder: Path) -> dict[str, Path]:
    """What lies in a folder, by name, without the files that desktops leave everywhere."""
    entries = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return {file.name: file for file in entries if file.name.lower() not in CLUTTER}


def caption_of(folder: Path, files: Mapping[str, Path], stems: Sequence[str]) -> str:
    """The caption in ``STEM.txt`` or ``STEM.caption``, in one line.

    Raises:
        ValueError: there is none, it is empty or not UTF-8, or two of them differ.
    """
    found = [stem + ending for stem in stems for ending in CAPTIONS if stem + ending in files]
    if not found:
        raise ValueError(f"no caption; expected {stems[0]}.txt")
    texts = {}
    for file in found:
        try:
            texts.setdefault(" ".join(read_file(folder, file).decode("utf-8-sig").split()), file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from error
    if len(texts) > 1:
        raise ValueError(f"{' and '.join(texts.values())} say different things: {', '.join(map(repr, texts))}")
    (text,) = texts
    if not text:
        raise ValueError(f"{found[0]}: the caption is empty")
    return text


def export_suffixes(store: PairStore, folder: Path) -> None:
    """``000000_w.png``, ``000000_l.png`` and ``000000.txt`` in ``folder``, numbered in the store's order. Only the pictures and
    the prompt go along: this format has no place for scores and provenance."""
    for index, row in rows_of(store):
        for side, end in zip(SIDES, ("_w", "_l"), strict=True):
            ending, content = store.kind.as_file(row[side])
            (folder / f"{index:06d}{end}{ending}").write_bytes(content)
        (folder / f"{index:06d}.txt").write_text(row["condition"]["prompt"] + "\n", encoding="utf-8")
