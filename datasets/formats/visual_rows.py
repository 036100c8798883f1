"""Preferences between answers about pictures, in the forms that published data have them.

What a row may be, in JSON lines, a ``.json`` list, parquet or Arrow::

    TRL         images (or image), prompt, chosen, rejected: texts, or turns whose contents are texts or lists of parts, in all
                the variants of text rows (implicit prompts, whole conversations)
    RLHF-V      image, question, chosen, rejected; also with these three in ``text``, a JSON string (so MCM-DPO's TAlt and PAlt)
    Re-Align    image, retrieved_image (the losing one), chosen, rejected: conversations
    our own     rejected_images, rejected_messages: the pictures or the prompt that lose

A picture is a path relative to the file, a struct with bytes or path, or a struct as Hugging Face ``datasets`` stores it. Where
it stands in the prompt a part ``{"type": "image"}`` says, or the marker ``<image>`` in a text; without either all stand
before the words of the first turn. Other columns that JSON can hold stay in the condition.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.formats import text_lines
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import OnBadRow, Outcome, Pair, identity_of
from polyalign.datasets.formats.text_rows import RowFiles, data_files, pair_of_row, rows_of
from polyalign.datasets.multi_image.rows import IMAGE, count_images, text
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictured_rows import LOSING_IMAGES, LOSING_MESSAGES
from polyalign.datasets.pictures import content_digest
from polyalign.datasets.visual_prompts import inside, picture_of, turns_of

MARKER = "<image>"
PEEKED = 64
"""Rows among which at least one has a picture."""

PICTURES = ("images", "image")
LOSERS = (LOSING_IMAGES, "rejected_image", "retrieved_image")
IN_TEXT = ("question", "chosen", "rejected")
"""What RLHF-V's and MCM-DPO's column ``text`` holds."""


def import_visual_rows(
    path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error", split: str | None = None, pictures: str | None = None
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file, or a folder of files of one of these kinds.
        split: which of the splits in the folder.
        pictures: the folder below which rows name their pictures; None is that of the data.
    """
    return import_pairs(VisualRows(Path(path), split, pictures), store, on_bad_row=on_bad_row)


def listed(path: Path, *, split: str | None = None, pictures: str | None = None) -> list[Path]:
    """The picture files that the data at ``path`` name; see :func:`import_visual_rows`."""
    source = VisualRows(Path(path), split, pictures)
    found = {}
    for _, _, given in rows_of(source.lines, source.files, 0) if source.lines else ():
        try:
            row = text_lines.as_object(given)
        except ValueError:
            continue  # told as a bad row when it is read
        for name in (*PICTURES, *LOSERS):
            for picture in _as_list(row.get(name)):
                try:
                    file = inside(picture, source.folder, name)
                except ValueError:
                    continue
                found[file] = None
    return list(found)


class VisualRows(RowFiles):
    """The rows of one or more files."""

    pictured = True

    def __init__(self, path: Path, split: str | None, pictures: str | None):
        self.path = path
        self.lines, self.files = data_files(path, split)
        self.folder = Path(pictures).expanduser() if pictures is not None else path if path.is_dir() else path.parent
        if not self.folder.is_dir():
            raise UserError(f"options.pictures: {self.folder} is no folder")

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of(self.files)}

    def _read(self, pair_id: str, origin: dict[str, Any], given: Any) -> Outcome:
        row = text_lines.as_object(given) if self.lines else given
        condition, chosen, rejected, losing = pair_of_visual_row(row, self.folder)
        counts = {} if condition["images"] else {"without_picture": 1}
        return Outcome([Pair(pair_id, condition, chosen, rejected, origin, losing=losing)], counts=counts)

    def problems(self) -> list[str]:
        """That the first rows have no pictures at all, as where their column is called something else."""
        first = [self._columns(given) for _, _, given in islice(rows_of(self.lines, self.files, 0), PEEKED)]
        if not first or any(_seen(row) for row in first):
            return []
        found = ", ".join(dict.fromkeys(name for row in first for name in row))
        return [
            f"none of the first {len(first)} row(s) has a picture: pictures stand in a column {' or '.join(PICTURES)}, and the "
            f"columns found are {found or 'none'}. Texts alone are for a recipe of the modality text"
        ]

    def remarks(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Rows of text alone, which are read, and counted."""
        if counts["without_picture"]:
            said = (
                f"{self.path}: {counts['without_picture']} of {counts['rows']} rows have no picture and are read as text alone"
            )
            print(said, file=sys.stderr, flush=True)
        return {"without_picture": counts["without_picture"]}

    def _columns(self, given: Any) -> dict[str, Any]:
        """A row's columns that say something; nothing for a bad row, which is told when it is read."""
        try:
            row = text_lines.as_object(given) if self.lines else given
        except ValueError:
            return {}
        return {name: value for name, value in row.items() if value is not None}


def _seen(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) not in (None, []) for name in PICTURES)


def pair_of_visual_row(row: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], str, str, dict[str, Any]]:
    """Condition, chosen and rejected answer, and what else loses (``rejected_images``, ``rejected_messages``).

    Raises:
        ValueError: as :func:`polyalign.datasets.formats.text_rows.pair_of_row`; a picture that is not there or does not decode;
            another number of pictures than of their places.
    """
    plain = _flat(_unpacked(row))
    images = _pictures(row, PICTURES, folder)
    losing_images, losing_messages = _pictures(row, LOSERS, folder), row.get(LOSING_MESSAGES)
    taken = (*PICTURES, *LOSERS, LOSING_MESSAGES)
    given, chosen, rejected = pair_of_row({name: value for name, value in plain.items() if name not in taken})
    turns = given.pop("messages", None) or [{"role": "user", "content": given["prompt"]}]
    condition = {
        **given,
        "prompt": " ".join(given["prompt"].replace(MARKER, " ").split()),
        "messages": placed(turns, len(images or ())),
    }
    losing: dict[str, Any] = {}
    if losing_images is not None:
        if len(losing_images) != len(images or ()):
            raise ValueError(f"{len(losing_images)} losing image(s), and {len(images or ())} image(s): each loses to one")
        if all(content_digest(one) == content_digest(other) for one, other in zip(losing_images, images or [], strict=True)):
            raise ValueError("the losing image is the image itself, so nothing is preferred")
        losing[LOSING_IMAGES] = losing_images
    if losing_messages is not None:
        losing[LOSING_MESSAGES] = turns_of(losing_messages)
        if (places := count_images(losing[LOSING_MESSAGES])) != len(images or ()):
            raise ValueError(f"{places} place(s) for images in '{LOSING_MESSAGES}', and {len(images or ())} image(s)")
    return {**condition, "images": images or []}, chosen, rejected, losing


def _unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what its column ``text`` holds, and a ``question`` as prompt."""
    found = {name: value for name, value in row.items() if value is not None}
    if isinstance(found.get("text"), str) and "chosen" not in found:
        try:
            packed = json.loads(found.pop("text"))
        except json.JSONDecodeError as error:
            raise ValueError(f"no column 'chosen', and 'text' is no JSON: {error.msg} at character {error.pos}") from error
        if not isinstance(packed, dict) or not set(IN_TEXT) <= set(packed):
            raise ValueError(f"column 'text' must hold {', '.join(IN_TEXT)} as JSON, found {str(packed)[:80]!r}")
        found |= packed
    if "prompt" not in found and isinstance(found.get("question"), str):
        found["prompt"] = found.pop("question")
    return found


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Contents that are lists of parts as texts with markers, as the reader of text rows takes them."""
    return {
        name: [_turn(turn) for turn in value] if name in ("prompt", "chosen", "rejected") and isinstance(value, list) else value
        for name, value in row.items()
    }


def _turn(turn: Any) -> Any:
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(content, list):
        return turn
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "text"):
            raise ValueError(f"a turn has the part {part!r}; allowed: an image, or text"[:200])
        parts.append(MARKER if kind == "image" else str(part.get("text") or ""))
    return {"role": turn.get("role"), "content": "".join(parts)}


def placed(turns: Sequence[Mapping[str, str]], images: int) -> list[dict[str, Any]]:
    """Turns of text with markers as turns of parts; without any marker all images stand before the first turn's words.

    Raises:
        ValueError: another number of markers than of images.
    """
    pieces = [turn["content"].split(MARKER) for turn in turns]
    found = sum(len(one) - 1 for one in pieces)
    if found not in (0, images):
        raise ValueError(f"{found} place(s) for images ({MARKER}) in the prompt, and {images} image(s)")
    messages = []
    for turn, one in zip(turns, pieces, strict=True):
        parts: list[dict[str, Any]] = []
        for place, words in enumerate(one):
            parts += [dict(IMAGE)] * (place > 0) + ([text(words)] if words.strip() else [])
        messages.append({"role": turn["role"], "content": parts or [text(turn["content"])]})
    if not found and images:
        first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        first["content"] = [dict(IMAGE) for _ in range(images)] + first["content"]
    return messages


def _pictures(row: Mapping[str, Any], names: Sequence[str], folder: Path) -> list[dict[str, Any]] | None:
    """The pictures of the first of these columns that says something; None if none does."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    return [picture_of(picture, folder, f"{name}[{place}]") for place, picture in enumerate(_as_list(row[name]))]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
