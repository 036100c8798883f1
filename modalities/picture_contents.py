"""From what a row holds (a picture, its bytes, a path) to a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import decode as decode_picture


def content_of(picture: Any, *, where: str) -> bytes | Image.Image:
    """The picture's own content from any form a row may have: the bytes of a file, not yet decoded, if it is bytes, a path or
    the store's {bytes, path} struct; an upright RGB picture if it is a picture.

    Raises:
        UserError: there is no picture at ``where``.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str | Path):
        if not Path(picture).is_file():
            raise UserError(f"{where}: there is no file {picture}")
        picture = Path(picture).read_bytes()
    if not isinstance(picture, bytes | Image.Image) or picture == b"":
        raise UserError(
            f"{where}: expected a picture (bytes, a path or a PIL image), found {type(picture).__name__}. "
            "Drop the row or give the picture."
        )
    return picture if isinstance(picture, bytes) else decode(picture, where=where)


def decode(content: bytes | Image.Image, *, where: str) -> Image.Image:
    """The picture as :func:`polyalign.datasets.pictures.decode` gives it.

    Raises:
        UserError: the file is truncated, damaged, or no picture; ``where`` names the pair and the column.
    """
    try:
        return decode_picture(content)
    except ValueError as error:
        raise UserError(
            f"{where}: the picture cannot be decoded ({error}). It is truncated or damaged; replace it or drop the row."
        ) from error
