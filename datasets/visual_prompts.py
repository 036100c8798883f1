"""Questions about pictures from a file: lines of ``prompt`` or ``messages`` with ``images``.

A ``.jsonl`` has an object a line, a ``.parquet`` a row: ``images`` (or ``image``, a single one) are paths relative to the file,
or, in parquet, pictures with their bytes. With ``prompt`` alone the pictures stand before it, in order; ``messages`` are the
turns of a conversation in transformers' form, with a part ``{"type": "image"}`` for every picture. What stands beside them
stays with the question, since judges may need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.files import listed
from polyalign.datasets.formats import parquet_files, text_lines
from polyalign.datasets.multi_image.rows import count_images
from polyalign.datasets.pictures import decode
from polyalign.datasets.prompts import as_condition

KEYS = ("images", "image")


def load_visual_prompts(path: str | Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Conditions with ``prompt``, ``messages`` and ``images``, in the file's order, the first ``limit`` of them if given.

    Raises:
        UserError: no such file, another kind of file, or broken entries; up to 20 are listed with their line or row.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"{file}: no such file of questions. It is a .jsonl or .parquet file with prompt (or messages) and images"
        )
    if file.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{file}: questions about pictures come from a .jsonl or .parquet file, found {file.suffix!r}")
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for place, given in _entries(file):
        if limit is not None and len(found) == limit:
            break
        try:
            found.append(visual_condition(text_lines.as_object(given) if isinstance(given, str) else given, file.parent))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        broken = f"{len(problems)} broken {'entry' if len(problems) == 1 else 'entries'}"
        raise UserError(f"{file}: {broken}:\n{listed(problems)}\nMend them, or take them out of the file")
    if not found:
        raise UserError(f"{file}: no questions in this file. It needs at least one")
    return found


def places(path: str | Path, *, limit: int | None = None) -> list[str]:
    """Where each of the questions of :func:`load_visual_prompts` stands: the file and its line or row."""
    return [place for place, _ in islice(_entries(Path(path)), limit)]


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        for _, row, stored in parquet_files.rows({file.name: file}, 0):
            yield f"{file.name} row {row}", stored
        return
    for place, _, given in text_lines.objects(file, 0):
        yield place, given


def named_pictures(path: str | Path) -> list[Path]:
    """The picture files that the lines of a ``.jsonl`` of questions name; none of a ``.parquet``."""
    file, found = Path(path), {}
    if file.suffix != ".jsonl":
        return []
    for _, given in _entries(file):
        try:
            row = text_lines.as_object(given)
        except ValueError:
            continue  # told as a broken entry when it is read
        pictures = row.get("images") or row.get("image")
        for picture in pictures if isinstance(pictures, list) else [pictures]:
            try:
                found[inside(picture, file.parent, "images")] = None
            except ValueError:
                continue
    return list(found)


def visual_condition(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One entry as a condition; paths are relative to ``folder``.

    Raises:
        ValueError: no question, a picture that is not there or does not decode, or another number of pictures than of their
            places.
    """
    key = next((name for name in KEYS if given.get(name) is not None), None)
    pictures = [] if key is None else given[key] if key == "images" else [given[key]]
    if not isinstance(pictures, list):
        raise ValueError(f"'images' must be a list, found {type(pictures).__name__}")
    images = [picture_of(picture, folder, f"images[{place}]") for place, picture in enumerate(pictures)]
    rest = {name: value for name, value in given.items() if name not in KEYS}
    messages = rest.pop("messages", None)
    if messages is None:
        condition = as_condition(rest)
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": condition["prompt"]}]
        messages = [{"role": "user", "content": parts}]
    else:
        messages = turns_of(messages)
        condition = as_condition({"prompt": last_words(messages), **rest})
    places = count_images(messages)
    if places != len(images):
        raise ValueError(f"{places} place(s) for images in the messages, and {len(images)} image(s)")
    return {**condition, "messages": messages, "images": images}


def turns_of(messages: Any) -> list[dict[str, Any]]:
    """Turns with contents as lists of parts; parquet writes every key into every part, so those that say nothing are left out.

    Raises:
        ValueError: no list of turns with role and content.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as error:
            raise ValueError(f"'messages' is text, and not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of turns, found {messages!r}"[:200])
    found = []
    for place, turn in enumerate(messages):
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not isinstance(content, str | list):
            raise ValueError(f"messages[{place}] needs role and content (text, or a list of parts), found {turn!r}"[:200])
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part, place) for part in content]
        found.append({"role": turn["role"], "content": parts})
    return found


def _part(part: Any, place: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"messages[{place}] has the part {part!r}; allowed: an image, or text"[:200])


def last_words(messages: list[dict[str, Any]]) -> str:
    """The text of the user's last turn: the question, for people."""
    users = [turn for turn in messages if turn["role"] == "user"] or messages
    return "".join(part.get("text", "") for part in users[-1]["content"]).strip()


def picture_of(picture: Any, folder: Path, name: str) -> dict[str, Any]:
    """A picture as the store keeps it, its file's bytes looked at once.

    Raises:
        ValueError: no such file below ``folder``, or it does not decode.
    """
    content = picture.get("bytes") if isinstance(picture, Mapping) else None
    if content is None:
        path = picture.get("path") if isinstance(picture, Mapping) else picture
        content = inside(path, folder, name).read_bytes()
    try:
        decode(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {"bytes": content, "path": None}


def inside(path: Any, folder: Path, name: str) -> Path:
    """The file of a picture that the data name. Nothing outside of their folder is read.

    Raises:
        ValueError: no path, one that leads out of the folder, or no such file.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"{name}: expected the path of a picture or its bytes, found {str(path)[:80]!r}")
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: {path!r} lies outside of the data's folder, and nothing there is read")
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {path!r} in the data's folder")
    return file
