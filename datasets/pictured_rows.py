"""The columns of a pair store whose conditions have pictures: conversations about images.

In memory they belong to a row as :mod:`polyalign.datasets.multi_image.rows` describes it: ``condition["images"]`` in the
order of their places in the messages, and, where pictures or the words of the prompt are what loses, ``rejected_images`` and
``rejected_messages``. In the file ``images`` and ``rejected_images`` are lists of pictures, each with the bytes of its file,
and ``rejected_messages`` is JSON text. A picture is stored once a pair however many candidates show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from polyalign.datasets.multi_image.rows import count_images
from polyalign.datasets.outputs import KINDS

PICTURE = KINDS["picture"]
IMAGES, LOSING_IMAGES, LOSING_MESSAGES = "images", "rejected_images", "rejected_messages"
_LIST = {"feature": PICTURE.feature, "_type": "List"}
_TEXT = {"dtype": "string", "_type": "Value"}

COLUMNS: Mapping[str, tuple[pa.DataType, Mapping[str, Any]]] = {
    IMAGES: (pa.list_(PICTURE.arrow), _LIST),
    LOSING_IMAGES: (pa.list_(PICTURE.arrow), _LIST),
    LOSING_MESSAGES: (pa.string(), _TEXT),
}
"""By name, a column's type and its note for Hugging Face ``datasets``."""


def is_pictured(schema: pa.Schema) -> bool:
    """Whether a store's conditions have pictures."""
    return IMAGES in schema.names


def to_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row.

    Raises:
        TypeError: messages that JSON cannot hold.
    """
    losing, messages = row.get(LOSING_IMAGES), row.get(LOSING_MESSAGES)
    return {
        IMAGES: [_cell(picture) for picture in row["condition"].get(IMAGES) or ()],
        LOSING_IMAGES: None if losing is None else [_cell(picture) for picture in losing],
        LOSING_MESSAGES: None if messages is None else json.dumps(messages, sort_keys=True, ensure_ascii=False),
    }


def _cell(picture: Any) -> Any:
    """A picture as it is stored; the struct of a store is so already."""
    return {"bytes": picture["bytes"], "path": None} if isinstance(picture, Mapping) else PICTURE.encode(picture)


def from_cells(stored: Mapping[str, Any]) -> dict[str, Any]:
    """``images`` for the condition; ``rejected_images`` and ``rejected_messages`` where the row has them. Pictures stay the
    bytes of their files, {"bytes", "path"}: whoever looks at them decodes them."""
    losing, messages = stored.get(LOSING_IMAGES), stored.get(LOSING_MESSAGES)
    found: dict[str, Any] = {IMAGES: list(stored.get(IMAGES) or ())}
    if losing is not None:
        found[LOSING_IMAGES] = list(losing)
    if messages is not None:
        found[LOSING_MESSAGES] = json.loads(messages)
    return found


def column_problems(schema: pa.Schema) -> list[str]:
    """Columns that are missing, or hold something else."""
    problems = []
    for name, (kind, _) in COLUMNS.items():
        if name not in schema.names:
            problems.append(f"column '{name}' is missing; columns: {', '.join(schema.names)}")
            continue
        found = schema.field(name).type
        fits = PICTURE.fits(found.value_type) if pa.types.is_list(kind) and pa.types.is_list(found) else found == kind
        if not fits:
            problems.append(f"column '{name}' must be {kind}, found {found}")
    return problems


def cell_problems(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(column, what is wrong) of the cells of one stored row; its other columns are in order."""
    problems = [
        (name, f"picture {place} {problem}")
        for name in (IMAGES, LOSING_IMAGES)
        for place, picture in enumerate(stored[name] or ())
        if (problem := PICTURE.problem(picture)) is not None
    ]
    try:
        losing = json.loads(stored[LOSING_MESSAGES] or "null")
    except json.JSONDecodeError as error:
        return [*problems, (LOSING_MESSAGES, f"is not JSON: {error.msg} at character {error.pos}")]
    images, messages = stored[IMAGES] or [], json.loads(stored["condition"].get("metadata") or "{}").get("messages")
    for column, turns, pictures in (
        (IMAGES, messages, images),
        (LOSING_IMAGES, messages, stored[LOSING_IMAGES]),
        (LOSING_MESSAGES, losing, images),
    ):
        if turns is None or pictures is None:
            continue
        places = count_images(turns)
        if places != len(pictures):
            problems.append((column, f"{places} place(s) for images in the messages, and {len(pictures)} image(s)"))
    return problems
