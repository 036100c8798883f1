"""What an importer asks of every picture, text and path before it lets them into a store.

Data come from strangers. A picture's header is read before its pixels, so that a decompression bomb is never opened; only
formats that Pillow decodes itself are tried (EPS would start another program); a path out of the data's own folder, and every
address of a network, is refused without being followed.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from polyalign.core.files import sha256_of
from polyalign.datasets.pictures import FORMATS, UNREADABLE, decode, fingerprint

MAX_PIXELS = 1 << 27  # 134 million: below 179 million, where Pillow sees a decompression bomb
MAX_BYTES = 1 << 28  # of one picture file
MIN_SIDE = 2  # a single pixel is what trackers and broken downloads leave


def check_picture(content: bytes) -> str:
    """The fingerprint of a picture's pixels (:func:`polyalign.datasets.pictures.fingerprint`), once it is sure to be usable.

    Raises:
        ValueError: see :func:`usable_picture`.
    """
    return fingerprint(usable_picture(content))


def usable_picture(content: bytes, *, max_pixels: int = MAX_PIXELS, kept_pixels: int | None = None) -> Image.Image:
    """A decoded picture (:func:`polyalign.datasets.pictures.decode`) that has passed every check.

    Args:
        kept_pixels: a picture of more is scaled down to about so many, a JPEG already while it is decoded.

    Raises:
        ValueError: not a whole picture; CMYK, 16 bits a channel, several frames (each would have to be changed without being
            asked); a side below ``MIN_SIDE``; more than ``max_pixels`` pixels or ``MAX_BYTES`` bytes.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"a picture file of {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, from the header alone
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photograph with its preview
        except Image.DecompressionBombError as error:
            raise ValueError(f"{str(error).rstrip('.')}; at most {max_pixels:,} are read. Scale it down first") from error
        except UNREADABLE as error:
            raise ValueError(f"not a picture in a format that can be read ({len(content)} bytes)") from error
        _refuse(image, frames, max_pixels)
        if kept_pixels is None or image.width * image.height <= kept_pixels:
            return decode(content)
        return _scaled_down(content, kept_pixels)


def _scaled_down(content: bytes, pixels: int) -> Image.Image:
    """The picture with about so many pixels, its proportions kept. A JPEG is decoded at a half, a quarter or an eighth of its
    size where that is enough, and so is never there in whole; others are, once.

    Raises:
        ValueError: it does not decode.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    scale = math.sqrt(pixels / (image.width * image.height))
    longest = int(max(image.size) * scale)
    box = (longest, longest)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    if image.mode in ("RGB", "L") and not image.has_transparency_data:  # before decode copies it
        try:
            image.thumbnail(box, Image.Resampling.LANCZOS)
        except UNREADABLE as error:
            raise ValueError(f"a picture that does not decode: {error}") from error
    found = decode(image)
    found.thumbnail(box, Image.Resampling.LANCZOS)
    return found


def check_text(text: str) -> str:
    """The SHA-256 of an answer's text, once it is sure to be usable.

    Raises:
        ValueError: it is no text, it is empty or blank, or holds half of a Unicode pair, which no file can.
    """
    if not isinstance(text, str):
        raise ValueError(f"must be text, found {'nothing' if text is None else type(text).__name__}")
    if not text.strip():
        raise ValueError("is empty; an answer needs at least one visible character")
    try:
        return sha256_of(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"is not Unicode: {error.object[max(0, error.start - 20) : error.end]!r}") from error


def _refuse(image: Image.Image, frames: int, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"a picture of {width} x {height} pixels ({width * height / 1e6:.1f} megapixels); at most {max_pixels / 1e6:.1f} "
            "megapixels are read. Scale it down first"
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"a picture of {width} x {height} pixels; each side needs at least {MIN_SIDE}")
    if frames > 1:
        raise ValueError(f"an animated picture ({frames} frames). Save the frame that is meant as a picture of its own")
    if image.mode == "CMYK":
        raise ValueError("a CMYK picture: its colours depend on a printer's profile. Convert it to sRGB first")
    if _wide(image):
        raise ValueError(f"a picture with 16 or more bits a channel (mode {image.mode}). Convert it to 8 bits first")


def _wide(image: Image.Image) -> bool:
    """More than 8 bits a channel. Pillow opens 16-bit colour as 8-bit RGB; how the file stores it stands in its tiles."""
    stored = [str(argument) for tile in getattr(image, "tile", ()) for argument in _flat(tile[3])]
    return image.mode[0] in "IF" or any(";16" in argument for argument in stored)


def _flat(arguments: object) -> tuple[object, ...]:
    return arguments if isinstance(arguments, tuple) else (arguments,)


def check_member(name: str) -> None:
    """A path that data give, such as a line of a JSONL file or a member of an archive, taken as text.

    Raises:
        ValueError: it is empty, absolute, an address of a network, or climbs out of its folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"expected a path below the data's folder, found {name!r}")
    if "://" in name or name.lower().startswith(("data:", "file:", "mailto:")):
        raise ValueError(f"{name!r} is an address; nothing is downloaded. Put the file beside the data and give its path")
    if "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or PureWindowsPath(name).root:
        raise ValueError(f"{name!r} is an absolute path; give one below the data's folder")
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{name!r} climbs out of its folder; give a path below the data's folder")


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` below ``folder``.

    Raises:
        ValueError: see :func:`check_member`; links lead out of the folder; there is no such file.
    """
    check_member(name)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is a link that leads out of the folder")
    if not path.is_file():
        raise ValueError(f"{name!r}: no such file in the data's folder")
    return path


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of the file ``name`` below ``folder``.

    Raises:
        ValueError: see :func:`inside`; the file is too large to be a picture, or cannot be read.
    """
    path = inside(folder, name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{name!r}: a file of {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name!r}: cannot be read ({error.strerror})") from error
