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

from polyalign.core.files import sha256_of
from polyalign.datasets.audio import waves
from polyalign.datasets.formats.checking import check_picture, check_text
from polyalign.datasets.lidar import points
from polyalign.datasets.pictures import decode, encode_png, ending_of, fingerprint


@dataclass(frozen=True)
class OutputKind:
    """One kind.

    ``arrow`` and ``feature`` are the column's type and its note for ``datasets``; ``encode`` makes the stored cell of an output
    (or of the bytes of its file, where it has one), ``kept`` is what a cell holds of it without decoding (the bytes of a file),
    ``opened`` the output of that. ``problem`` says what is wrong with a cell, ``check`` gives the fingerprint of an output that
    is sure to be usable and raises ValueError for another, ``fingerprint`` that of an output without asking, ``empty`` whether
    a sample is nothing that could be trained on. ``words`` is for messages. Where outputs are files, ``endings`` are those that
    are read, and ``ending`` the one of a file's bytes, None if an export writes another format (``endings[0]``).
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
    endings: tuple[str, ...] = ()
    ending: Callable[[bytes], str | None] = lambda content: None

    def decode(self, stored: Any) -> Any:
        """The output of a stored cell."""
        return self.opened(self.kept(stored))

    def as_file(self, content: bytes) -> tuple[str, bytes]:
        """The ending and bytes under which an export writes an output's file: its own, or those of it encoded anew."""
        own = self.ending(content)
        return (own, content) if own is not None else (self.endings[0], self.kept(self.encode(self.opened(content))))

    def fits(self, found: pa.DataType) -> bool:
        """Whether a column of this type can hold such outputs: the same type, or a struct that has the bytes of a file."""
        if not pa.types.is_struct(self.arrow):
            return found == self.arrow
        return pa.types.is_struct(found) and any(part.name == "bytes" and part.type == pa.binary() for part in found)


def _cell(encode: Callable[[Any], bytes]) -> Callable[[Any], dict[str, Any]]:
    """The cell of an output that is a file: the file's bytes as they are, or those that ``encode`` makes."""
    return lambda output: {"bytes": output if isinstance(output, bytes) else encode(output), "path": None}


def _file_problem(what: str, decoded: Callable[[bytes], Any]) -> Callable[[Mapping[str, Any] | None], str | None]:
    """What is wrong with a cell that should hold the bytes of a file; ``what`` is the output in words."""

    def problem(stored: Mapping[str, Any] | None) -> str | None:
        cell = stored or {}
        if not cell.get("bytes"):
            where = f"only the path {cell['path']!r}" if cell.get("path") else f"no {what}"
            return f"holds {where}; the store keeps the {what}'s bytes"
        try:
            decoded(cell["bytes"])
        except ValueError as error:
            return str(error)
        return None

    return problem


_FILE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


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
            _FILE,
            {"_type": "Image"},
            encode=_cell(encode_png),
            kept=lambda stored: stored["bytes"],
            opened=decode,
            problem=_file_problem("picture", decode),
            check=check_picture,
            fingerprint=fingerprint,
            endings=(".png", ".jpg", ".jpeg", ".webp"),
            ending=ending_of,
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
        OutputKind(
            "sound",
            "sounds",
            _FILE,
            {"_type": "Audio", "decode": False},  # decoded by datasets it would need torchcodec
            encode=_cell(waves.encode_flac),
            kept=lambda stored: stored["bytes"],
            opened=waves.decode,
            problem=_file_problem("sound", waves.decode),
            check=waves.check,
            fingerprint=waves.fingerprint,
            empty=waves.silent,
            endings=(".flac", ".wav", ".ogg", ".mp3"),
            ending=waves.ending_of,
        ),
        OutputKind(
            "cloud",
            "point clouds",
            pa.binary(),
            {"dtype": "binary", "_type": "Value"},
            encode=points.encode,
            kept=points.decode,
            opened=points.decoded,
            problem=points.problem,
            check=points.check,
            fingerprint=lambda cloud: sha256_of(points.encode(cloud)),
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
