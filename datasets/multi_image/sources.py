"""Questions about single pictures, as the builders of multi-image data take them.

Two forms are read, entry by entry:

- LLaVA's: a ``.json`` list of ``{"image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat
  ..."}, {"from": "gpt", "value": "..."}, ...]}``. Entries without a picture are counted and left out.
- plain: ``{"image": "1.jpg", "question": "What ...", "answer": "..."}`` a line of a ``.jsonl`` file, or of ``questions.jsonl``
  in a folder.

Pictures are named by a path below the data's folder. Distractors are later drawn from the same ``source``: an entry's own
``source`` if it has one, otherwise the first folder of its picture's path ("coco"), as the published data were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.files import listed
from polyalign.datasets.formats.checking import check_text, inside, read_file, usable_picture
from polyalign.datasets.formats.text_lines import as_object, objects

FILE = "questions.jsonl"
PLACEHOLDER = "<image>"
KEPT_PIXELS = 1 << 24
"""4096 x 4096: larger pictures are scaled down to as many when they are opened, since many are open at a time. The largest that
a family here looks at are Qwen's 16,384 patches of 28 x 28 pixels, 12.8 million."""


def plain(words: str) -> str:
    """Text by which questions and answers are the same: case, spaces, marks at the end and articles in front left out."""
    kept = " ".join(words.casefold().split()).rstrip(" .?!")
    return next((kept.removeprefix(article) for article in ("the ", "a ", "an ") if kept.startswith(article)), kept)


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One entry: a picture and what is asked about it. ``number`` is its place in the file, ``place`` that in words."""

    number: int
    source: str
    picture: str
    turns: tuple[Turn, ...]
    place: str


@dataclass(frozen=True)
class Questions:
    """All usable entries of a file, with the folder that their pictures lie in."""

    folder: Path
    items: tuple[Item, ...]
    text_only: int = 0
    dropped: tuple[dict[str, str], ...] = ()

    @cached_property
    def pictures(self) -> Mapping[str, tuple[str, ...]]:
        """The pictures of each source, each once, in the order of the file."""
        found: dict[str, dict[str, None]] = {}
        for item in self.items:
            found.setdefault(item.source, {})[item.picture] = None
        return {source: tuple(names) for source, names in found.items()}

    @cached_property
    def places(self) -> Mapping[str, Mapping[str, int]]:
        """Where each picture of a source stands in ``pictures``."""
        return {source: {name: place for place, name in enumerate(names)} for source, names in self.pictures.items()}

    @cached_property
    def every_picture(self) -> tuple[str, ...]:
        """The pictures of all sources, each once."""
        return tuple(dict.fromkeys(name for names in self.pictures.values() for name in names))

    @cached_property
    def answers(self) -> Mapping[tuple[str, str], str | None]:
        """Answers by picture and question (:func:`plain`); None where a picture has several that differ."""
        found: dict[tuple[str, str], str | None] = {}
        for item in self.items:
            for turn in item.turns:
                key = (item.picture, plain(turn.question))
                before = found.setdefault(key, turn.answer)
                if before is not None and plain(before) != plain(turn.answer):
                    found[key] = None
        return found

    @cached_property
    def digest(self) -> str:
        """Of the entries, and of name and size of every picture's file."""
        digest = hashlib.sha256()
        for item in self.items:
            turns = [(turn.question, turn.answer) for turn in item.turns]
            digest.update(json.dumps([item.number, item.source, item.picture, turns], ensure_ascii=False).encode())
        for name in self.every_picture:
            digest.update(f"{name} {(self.folder / name).stat().st_size}\n".encode())
        return digest.hexdigest()

    def open(self, name: str) -> Image.Image:
        """A picture in RGB, decoded to the last row and turned upright, scaled down to ``KEPT_PIXELS`` where it has more.

        Raises:
            UserError: it is damaged, has more pixels than are read, or is of a kind that is not read.
        """
        try:
            return usable_picture(read_file(self.folder, name), kept_pixels=KEPT_PIXELS)
        except ValueError as error:
            raise UserError(f"{self.folder / name}: {error}") from error


def read_questions(
    path: str | Path,
    pictures: str | Path | None = None,
    *,
    on_bad_row: Literal["error", "drop"] = "error",
) -> Questions:
    """The questions of a ``.json`` or ``.jsonl`` file, or of a folder with ``questions.jsonl``.

    Args:
        pictures: the folder that the names of pictures are below; None is the file's own.
        on_bad_row: an entry that cannot be used is an error (all are listed), or it is left out and listed in ``dropped``.

    Raises:
        UserError: no such file, bad entries, or no entry left. Pictures are looked for here and opened only when they are used.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file. Expected a .json list as LLaVA's, or lines with image, question and answer")
    folder = file.parent if pictures is None else Path(pictures)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    items: list[Item] = []
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    text_only = 0
    for place, number, given in objects(file, 0):
        try:
            item = _item(as_object(given), number, place)
            if item is None:
                text_only += 1
                continue
            if item.picture not in seen:
                inside(folder, item.picture)
                seen.add(item.picture)
            items.append(item)
        except ValueError as error:
            dropped.append({"place": place, "problem": str(error)})
    if dropped and on_bad_row == "error":
        problems = listed([f"{one['place']}: {one['problem']}" for one in dropped])
        raise UserError(
            f"{file}: {len(dropped)} bad entr{'y' if len(dropped) == 1 else 'ies'}, nothing was made of them:\n{problems}\n"
            "Mend this and run again, or leave such entries out with on_bad_row: drop (recipe: pairs.multi_image.on_bad_row)"
        )
    if not items:
        raise UserError(f"{file}: no question about a picture ({text_only} entries without one, {len(dropped)} bad)")
    return Questions(folder, tuple(items), text_only, tuple(dropped))


def _item(given: dict[str, Any], number: int, place: str) -> Item | None:
    """None for a conversation without a picture.

    Raises:
        ValueError: what is wrong with the entry.
    """
    if "conversations" in given:
        turns, placeholders = _llava_turns(given["conversations"])
        allowed = (1,)
    else:
        turns, placeholders = _plain_turn(given)
        allowed = (0, 1)
    picture = given.get("image")
    if picture is None and placeholders == 0 and "conversations" in given:
        return None
    if isinstance(picture, list) and len(picture) == 1:
        picture = picture[0]
    found = len(picture) if isinstance(picture, list) else int(picture is not None)
    if found != 1 or placeholders not in allowed:
        raise ValueError(f"{placeholders} placeholder(s) {PLACEHOLDER} and {found} picture(s); expected one of each")
    if not isinstance(picture, str):
        raise ValueError(f"'image' must be the path of a picture, found {type(picture).__name__}")
    source = given.get("source")
    if source is None:
        parts = PurePosixPath(picture).parts
        source = parts[0] if len(parts) > 1 else ""
    if not isinstance(source, str):
        raise ValueError(f"'source' must be text, found {type(source).__name__}")
    return Item(number, source, picture, turns, place)


def _plain_turn(given: Mapping[str, Any]) -> tuple[tuple[Turn, ...], int]:
    missing = [f"'{key}'" for key in ("image", "question", "answer") if given.get(key) is None]
    if missing:
        found = ", ".join(repr(name) for name in given) or "nothing"
        raise ValueError(f"no {', '.join(missing)} here, found {found}")
    question, placeholders = _question(given["question"])
    return (Turn(question, _answer(given["answer"])),), placeholders


def _llava_turns(given: Any) -> tuple[tuple[Turn, ...], int]:
    """The turns, and how many places for a picture the questions have."""
    if not isinstance(given, list) or not given or len(given) % 2:
        raise ValueError("'conversations' must be a list of questions and answers in turn")
    turns, placeholders = [], 0
    for asked, answered in zip(given[::2], given[1::2], strict=True):
        for said, speaker in ((asked, "human"), (answered, "gpt")):
            if not isinstance(said, dict) or said.get("from") != speaker:
                raise ValueError(f"'conversations' must alternate between human and gpt, found {said!r}"[:200])
        question, places = _question(asked.get("value"))
        placeholders += places
        turns.append(Turn(question, _answer(answered.get("value"))))
    return tuple(turns), placeholders


def _question(given: Any) -> tuple[str, int]:
    """The question without placeholders, and how many it had."""
    try:
        check_text(given)
        places = given.count(PLACEHOLDER)
        text = given.replace(PLACEHOLDER, " ").strip() if places else given.strip()
        check_text(text)
    except ValueError as error:
        raise ValueError(f"a question {error}") from error
    return text, places


def _answer(given: Any) -> str:
    try:
        check_text(given)
    except ValueError as error:
        raise ValueError(f"an answer {error}") from error
    if PLACEHOLDER in given:
        raise ValueError(f"an answer has a placeholder {PLACEHOLDER}; answers are text")
    return given.strip()
