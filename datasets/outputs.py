"""Kinds of outputs that a pair store holds: one row each, and nothing else to edit for the next one.

A row says how an output lies in a parquet file and how Hugging Face ``datasets`` is told of it, the way there and back, what
can be wrong with a stored cell, what an importer asks of an output before it lets it in, and when two outputs are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from polyalign.core.files import sha256_of
from polyalign.datasets.formats.checking import check_picture, check_text
from polyalign.datasets.pictures import decode, encode_png, fingerprint


@dataclass(frozen=True)
class OutputKind:
    """One kind.

    ``arrow`` and ``feature`` are the column's type and its note for ``datasets``; ``encode`` makes the stored cell of an output
    (or of the bytes of its file, where it has one), ``kept`` is what a cell holds of it without decoding (the bytes of a file),
    ``opened`` the output of that. ``problem`` says what is wrong with a cell, ``check`` gives the fingerprint of an output that
    is sure to be usable and raises ValueError for another, ``fingerprint`` that of an output without asking, ``empty`` whether
    a sample is nothing that could be trained on. ``words`` is for messages.
    """

    name: str
    words: str
    arrow: pa.DataType
    feature: Mapping[str, Any]
    encode: Callable[[Any], Any]
    kept: Callable[[Any], Any]
    opened: Callable[[Any], Any]
    problem: Callable[[Any], str | None]
    check: Callable[[Any], str]
    fingerprint: Callable[[Any], str]
    empty: Callable[[Any], bool] = lambda output: False

    def decode(self, stored: Any) -> Any:
        """The output of a stored cell."""
        return self.opened(self.kept(stored))

    def fits(self, found: pa.DataType) -> bool:
        """Whether a column of this type can hold such outputs: the same type, or a struct that has the bytes of a file."""
        if not pa.types.is_struct(self.arrow):
            return found == self.arrow
        return pa.types.is_struct(found) and any(part.name == "bytes" and part.type == pa.binary() for part in found)


def _encode_picture(picture: Image.Image | bytes) -> dict[str, Any]:
    return {"bytes": picture if isinstance(picture, bytes) else encode_png(picture), "path": None}


def _picture_problem(stored: Mapping[str, Any] | None) -> str | None:
    picture = stored or {}
    if not picture.get("bytes"):
        where = f"only the path {picture['path']!r}" if picture.get("path") else "no picture"
        return f"holds {where}; the store keeps the picture's bytes"
    try:
        decode(picture["bytes"])
    except ValueError as error:
        return str(error)
    return None


def _text(given: str) -> str:
    """Raises TypeError for what is no text: arrow would turn bytes into some."""
    if not isinstance(given, str):
        raise TypeError(f"expected text, found {type(given).__name__}")
    return given


def _text_problem(stored: str | None) -> str | None:
    if stored is None:
        return "holds nothing; expected text"
    try:
        check_text(stored)
    except ValueError as error:
        return str(error)
    return None


KINDS: Mapping[str, OutputKind] = {
    kind.name: kind
    for kind in (
        OutputKind(
            "picture",
            "pictures",
            pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]),
            {"_type": "Image"},
            encode=_encode_picture,
            kept=lambda stored: stored["bytes"],
            opened=decode,
            problem=_picture_problem,
            check=check_picture,
            fingerprint=fingerprint,
        ),
        OutputKind(
            "text",
            "texts",
            pa.string(),
            {"dtype": "string", "_type": "Value"},
            encode=_text,
            kept=_text,
            opened=_text,
            problem=_text_problem,
            check=check_text,
            fingerprint=lambda text: sha256_of(text.encode()),
            empty=lambda text: not text.strip(),
        ),
    )
}


def kind_of(schema: pa.Schema) -> OutputKind | None:
    """The kind of a store's outputs, from its columns' type and, where several kinds share it, from the note for ``datasets``;
    None if they are of no kind that is known here."""
    if "chosen" not in schema.names:
        return None
    fitting = [kind for kind in KINDS.values() if kind.fits(schema.field("chosen").type)]
    said = _note(schema)
    return next((kind for kind in fitting if kind.feature["_type"] == said), fitting[0] if fitting else None)


def _note(schema: pa.Schema) -> str | None:
    """What the note for ``datasets`` says the column ``chosen`` is; None without one."""
    try:
        note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return note["info"]["features"]["chosen"]["_type"]
    except (ValueError, KeyError, TypeError):
        return None
