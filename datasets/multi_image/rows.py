"""Rows of conversations with pictures, and how several pictures are laid out in one.

A row: ``condition`` with ``messages`` (the chat form of transformers: parts of type image and text), ``images`` (pictures in
the order of their parts) and ``layout``; ``chosen``, the answer; ``confusions``, answers that are known to be wrong here, since
they are right of another picture; ``origin``. A row of pairs has ``rejected`` too, and ``rejected_images`` or
``rejected_messages`` where pictures or the text of the prompt are what loses.

``layout``: ``format`` (sequence, grid, picture_in_picture), ``level`` (1: the question names an image; 2: it names two; 3: it
names none), ``places``, one for each named image, in order: ``image``, which of ``images`` it lies in, ``box`` in pixels of
that (left, top, right, bottom; what is right of and below a box is outside), and in a collage ``cell``, the slot around it;
``targets``, the places that the answer depends on, counted from 0; their boxes again as ``target_boxes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.checking import check_text

Box = tuple[int, int, int, int]
Part = dict[str, Any]
IMAGE: Part = {"type": "image"}


@dataclass(frozen=True)
class Place:
    """Where one named image is to be seen."""

    image: int
    box: Box
    cell: Box | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"image": self.image, "box": list(self.box)} | ({} if self.cell is None else {"cell": list(self.cell)})


@dataclass(frozen=True)
class Arrangement:
    """Pictures as they are shown, what stands before the question, and where each named image is."""

    format: str
    images: tuple[Image.Image, ...]
    opening: tuple[Part, ...]
    places: tuple[Place, ...]

    def layout(self, targets: Sequence[int], level: int) -> dict[str, Any]:
        return {
            "format": self.format,
            "level": level,
            "places": [place.plain() for place in self.places],
            "targets": list(targets),
            "target_boxes": [list(self.places[target].box) for target in targets],
        }


def text(words: str) -> Part:
    """A part that is text."""
    return {"type": "text", "text": words}


def asked(arrangement: Arrangement, question: str) -> dict[str, Any]:
    """The user's message: the opening, and the question in the same text as what the opening ends with."""
    *before, last = arrangement.opening
    ending = [text(last["text"] + question)] if last["type"] == "text" else [last, text(question)]
    return {"role": "user", "content": [dict(part) for part in (*before, *ending)]}


def said(role: str, words: str) -> dict[str, Any]:
    """A message that is text alone."""
    return {"role": role, "content": [text(words)]}


def check_row(row: Mapping[str, Any], where: str = "a row") -> None:
    """That a row can be trained on: every image has its place in the messages, and every answer says something.

    Raises:
        UserError: what is wrong with it.
    """
    condition = row.get("condition")
    if not isinstance(condition, Mapping) or not isinstance(condition.get("messages"), Sequence):
        raise UserError(f"{where}: the condition needs 'messages', a list of the conversation's turns")
    images = condition.get("images") or ()
    sides = [("messages", condition["messages"], images)]
    if "rejected_images" in row:
        sides.append(("messages with rejected_images", condition["messages"], row["rejected_images"]))
    if "rejected_messages" in row:
        sides.append(("rejected_messages", row["rejected_messages"], images))
    for name, messages, shown in sides:
        places = count_images(messages)
        if places != len(shown):
            raise UserError(
                f"{where}: {places} image placeholder(s) in the {name}, and {len(shown)} image(s); each image needs one part "
                '{"type": "image"}, in order'
            )
    for side in ("chosen", "rejected"):
        if side in row or side == "chosen":
            try:
                check_text(row.get(side))  # pyright: ignore[reportArgumentType]
            except ValueError as error:
                raise UserError(f"{where}: {side} {error}") from error


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many parts of a conversation are images."""
    contents = (message["content"] for message in messages)
    return sum(part["type"] == "image" for content in contents if not isinstance(content, str) for part in content)
