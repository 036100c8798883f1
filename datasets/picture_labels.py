"""Single pictures with a label, liked or disliked: what Diffusion-KTO and BCO train on, and, the liked ones, fine-tuning.

A folder::

    my_pictures/
      liked/cat.png     liked/cat.txt         a picture and its caption (.txt or .caption)
      disliked/cat.png  disliked/cat.txt      names in the two folders need not agree

or lines, with paths below the folder of the file: ``{"prompt": "a cat", "image": "pictures/1.png", "label": true}``.

In a run they lie in ``pairs/labels-00000.parquet`` and so on: ``pair_id``, ``condition`` (JSON), ``image`` (the bytes of the
file), ``label``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.datasets import files
from polyalign.datasets.formats.checking import check_picture, read_file
from polyalign.datasets.formats.source import OnBadRow
from polyalign.datasets.formats.suffixes import CAPTIONS, ENDINGS, caption_of, files_in
from polyalign.datasets.formats.text_lines import as_object, named_files, objects
from polyalign.datasets.labels import LISTED, LabelStore
from polyalign.datasets.pairs import ROW_GROUP, table_bytes
from polyalign.datasets.pictures import decode
from polyalign.datasets.prompts import as_condition

SIDES = {"liked": True, "disliked": False}
SHARD = 64
"""Rows written together, whose pictures are in memory at once."""
_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_FEATURES = {
    "pair_id": {"dtype": "string", "_type": "Value"},
    "condition": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "label": {"dtype": "bool", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [("pair_id", pa.string()), ("condition", pa.string()), ("image", _IMAGE), ("label", pa.bool_())],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}}, sort_keys=True)},
)


class PictureLabelStore(LabelStore):
    """The labelled pictures of a run, in the place of pairs."""

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self._kept: list[tuple[Path, int, dict[str, Any], bool]] | None = None

    @property
    def file(self) -> Path:
        """The first shard."""
        return self.folder / "labels-00000.parquet"

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("labels-*.parquet"))

    def clear(self) -> None:
        """Remove the shards and what a killed run left."""
        files.remove_unfinished(self.folder)
        for path in self.shards():
            path.unlink()
        self._kept = None

    def write_shard(self, index: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with ``pair_id``, ``condition``, ``image`` (bytes) and ``label``, as shard ``index``."""
        stored = [
            {
                **row,
                "condition": json.dumps(row["condition"], ensure_ascii=False, sort_keys=True),
                "image": {"bytes": row["image"], "path": None},
            }
            for row in rows
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"labels-{index:05d}.parquet"
        atomic_write(path, table_bytes(pa.Table.from_pylist(stored, schema=_SCHEMA)))
        self._kept = None

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows, in the place of those before."""
        self.clear()
        for start in range(0, len(rows), SHARD):
            self.write_shard(start // SHARD, rows[start : start + SHARD])

    def __len__(self) -> int:
        return len(self._index())

    def rows(self, indices: Sequence[int], *, decode: bool = True) -> list[dict[str, Any]]:
        """Rows by position, in the order asked for; pictures decoded, or the bytes of their files."""
        return [self._row(*self._index()[index], decoded=decode) for index in indices]

    def conditions(self) -> list[dict[str, Any]]:
        return [condition for _, _, condition, _ in self._index()]

    def labels(self) -> list[bool]:
        return [label for _, _, _, label in self._index()]

    def content_hash(self) -> str:
        """SHA-256 over the shards' names and bytes, in order."""
        return sha256_of("\n".join(f"{path.name} {sha256_of(path)}" for path in self._shards_or_error()).encode())

    def validate(self) -> int:
        """The number of rows.

        Raises:
            UserError: no shards, or one that is missing or damaged.
        """
        names = [path.name for path in self._shards_or_error()]
        if names != [f"labels-{index:05d}.parquet" for index in range(len(names))]:
            raise UserError(f"{self.folder}: shards are missing; found {', '.join(names)}. Run 'generate' again")
        return len(self)

    def _row(self, path: Path, row: int, condition: dict[str, Any], label: bool, *, decoded: bool) -> dict[str, Any]:
        stored = pq.ParquetFile(path).read_row_group(row // ROW_GROUP).slice(row % ROW_GROUP, 1).to_pylist()[0]
        image = stored["image"]["bytes"]
        shown = decode(image) if decoded else image
        return {"pair_id": stored["pair_id"], "condition": condition, "image": shown, "label": label}

    def _index(self) -> list[tuple[Path, int, dict[str, Any], bool]]:
        """(shard, row, condition, label) of every row, without its picture."""
        if self._kept is None:
            self._kept = [found for path in self._shards_or_error() for found in _rows_of(path)]
        return self._kept

    def _shards_or_error(self) -> list[Path]:
        found = self.shards()
        if not found:
            raise UserError(
                f"{self.folder}: no labelled pictures here (no files labels-00000.parquet and so on). Run 'generate' first"
            )
        return found


def _rows_of(path: Path) -> list[tuple[Path, int, dict[str, Any], bool]]:
    try:
        table = pq.read_table(path, columns=["condition", "label"]).to_pylist()
        return [(path, number, json.loads(row["condition"]), row["label"]) for number, row in enumerate(table)]
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}). Remove the folder and run 'generate' again") from error


# --- reading -----------------------------------------------------------------------------------------------------------------


def listed(path: Path) -> list[Path]:
    """The pictures that the lines at ``path`` name; none for a folder, whose files are all its own."""
    return [] if path.is_dir() else named_files(path, ("image",))


def import_picture_labels(
    path: Path,
    store: PictureLabelStore,
    *,
    on_bad_row: OnBadRow = "error",
    prompt: str = "prompt",
    image: str = "image",
    label: str = "label",
) -> dict[str, Any]:
    """Fill ``store``, write its ``summary.json`` and return the summary.

    Args:
        path: a folder that holds ``liked/`` and ``disliked/``, or a ``.jsonl`` file (or a ``.json`` that is a list).
        on_bad_row: a picture that cannot be used is an error (all are listed), or it is left out, counted and listed.
        prompt, image, label: names of the keys, for lines.

    Raises:
        UserError: bad rows, no row left, or data that cannot be read.
    """
    path = Path(path)
    found = _of_folders(path) if path.is_dir() else _of_lines(path, (prompt, image, label))
    dropped: list[dict[str, str]] = []
    counts, prompts, waiting, shard = {True: 0, False: 0}, set[str](), list[dict[str, Any]](), 0
    store.clear()
    for place, row in found:
        if isinstance(row, ValueError):
            dropped.append({"place": place, "problem": str(row)})
            continue
        counts[row["label"]] += 1
        prompts.add(row["condition"]["prompt"])
        waiting.append({"pair_id": f"{sum(counts.values()) - 1:08d}", **row})
        if len(waiting) == SHARD:
            store.write_shard(shard, waiting)
            waiting, shard = [], shard + 1
    if waiting:
        store.write_shard(shard, waiting)
    if (dropped and on_bad_row == "error") or not sum(counts.values()):
        store.clear()
        raise UserError(_problem(path, dropped))
    summary = {
        "source": "labels",
        "rows": sum(counts.values()) + len(dropped),
        "prompts": len(prompts),
        "labelled": sum(counts.values()),
        "desirable": counts[True],
        "undesirable": counts[False],
        "rows_dropped": len(dropped),
        "dropped": dropped[:LISTED],
    }
    atomic_write(store.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _problem(path: Path, dropped: Sequence[Mapping[str, str]]) -> str:
    if not dropped:
        return f"{path}: no labelled pictures are there. liked/ and disliked/ hold pictures NAME.png with captions NAME.txt"
    problems = files.listed([f"{one['place']}: {one['problem']}" for one in dropped])
    return (
        f"{path}: {len(dropped)} bad row(s), nothing was imported:\n{problems}\nMend this and run again, or leave such rows "
        "out with pairs.on_bad_row: drop; they are then counted and listed in summary.json"
    )


def _of_folders(folder: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Every picture of the two folders, by name."""
    sides = {name: label for name, label in SIDES.items() if (folder / name).is_dir()}
    if not sides:
        raise UserError(f"{folder}: has neither liked/ nor disliked/. They hold pictures NAME.png and captions NAME.txt")
    for side, label in sides.items():
        inside = files_in(folder / side)
        for name, file in inside.items():
            if file.suffix.lower() in CAPTIONS:
                continue
            try:
                if file.suffix.lower() not in ENDINGS:
                    raise ValueError("neither a picture nor a caption")
                caption = caption_of(folder / side, inside, (file.stem,))
                content = _picture(folder / side, name)
                yield f"{side}/{name}", {"condition": {"prompt": caption}, "image": content, "label": label}
            except ValueError as error:
                yield f"{side}/{name}", error


def _of_lines(path: Path, keys: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    prompt, image, label = keys
    for place, _, given in objects(path, 0):
        try:
            line = as_object(given)
            missing = [repr(key) for key in keys if line.get(key) is None]
            if missing:
                raise ValueError(f"no {' and no '.join(missing)}; found {', '.join(map(repr, line)) or 'nothing'}")
            if line[label] not in (True, False):
                raise ValueError(f"{label!r} must be true or false (1 or 0), found {line[label]!r}")
            rest = {key: value for key, value in line.items() if key not in (*keys, "prompt")}
            condition = as_condition({"prompt": line[prompt], **rest})
            content = _picture(path.parent, line[image])
            yield place, {"condition": condition, "image": content, "label": bool(line[label])}
        except ValueError as error:
            yield place, error


def _picture(folder: Path, name: str) -> bytes:
    content = read_file(folder, name)
    check_picture(content)
    return content
