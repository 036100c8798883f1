"""Pictures as bytes: one way to encode, one way to decode, one way to say two are the same."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
    *(TypeError, AttributeError),  # tags of another type than Pillow expects, in EXIF and TIFF
)
"""What Pillow raises for pictures it cannot read: cut off, damaged, of another kind, or absurdly large."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that Pillow decodes itself. Bytes of any other are refused: for EPS, for one, it would start another program."""

_ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}


def encode_png(image: Image.Image) -> bytes:
    """Lossless RGB bytes without metadata; the same pixels give the same bytes on one machine."""
    plain = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())  # a copy without the original's metadata
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode(content: bytes | Image.Image) -> Image.Image:
    """An RGB picture, decoded to the last row, turned upright (EXIF), transparency laid on white, 16-bit grey brought to 8. A
    picture that is open already is brought to the same form.

    Raises:
        ValueError: the bytes are not a whole picture.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS) if isinstance(content, bytes) else content
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):  # Pillow would cut 16-bit grey off at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return upright.convert("RGB")
    except UnidentifiedImageError as error:
        size = f" ({len(content)} bytes)" if isinstance(content, bytes) else ""
        raise ValueError(f"not a picture in a format that can be read{size}") from error
    except UNREADABLE as error:
        raise ValueError(f"a picture that does not decode: {error}") from error


def fingerprint(content: bytes | Image.Image) -> str:
    """SHA-256 of a picture's size and RGB pixels, equal exactly when the pictures are; or of a file's bytes, not decoded."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    rgb = content.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def content_digest(picture: Any) -> str:
    """SHA-256 of the bytes of a picture's file (:func:`content_of`). An open picture has the same before and after the store
    has written it.

    Raises:
        TypeError: something else.
    """
    return hashlib.sha256(content_of(picture)).hexdigest()


def content_of(picture: Any) -> bytes:
    """The bytes of a picture's file, whatever it is: ``{"bytes", "path"}``, bytes, or an open picture (PNG).

    Raises:
        TypeError: something else.
    """
    content = picture["bytes"] if isinstance(picture, Mapping) else picture
    if isinstance(content, Image.Image):
        return encode_png(content)
    if not isinstance(content, bytes):
        raise TypeError(f"expected a picture or the bytes of one, found {type(picture).__name__}")
    return content


def ending_of(content: bytes) -> str | None:
    """The ending of a picture file's bytes that every program reads as they are; None for other formats."""
    return _ENDINGS.get(Image.open(io.BytesIO(content)).format or "")
