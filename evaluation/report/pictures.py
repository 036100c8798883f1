"""Pictures for the page: read safely, made small enough for the page's budget, written as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image

from polyalign.evaluation.report.markup import text

SIDES = (256, 192, 128, 96, 64)
"""Longest sides tried, largest first, until all pictures fit the budget."""

BUDGET = 6_000_000
"""Characters of base64 for all pictures of the grid and of the regressions; the page stays below 8 MB."""

CRISP_UP_TO = 96
"""Pictures of at most this side are enlarged pixel by pixel instead of blurred."""

TALL_FROM = 2.0
"""Pictures more than so many times as high as wide are as high as the style sheet says, however wide their place is."""


@dataclass(frozen=True)
class Picture:
    """A picture ready for the page."""

    uri: str
    width: int
    height: int

    def tag(self, alt: str) -> str:
        """The ``img`` element; ``alt`` is escaped here."""
        kinds = ["crisp"] if max(self.width, self.height) <= CRISP_UP_TO else []
        kinds += ["tall"] if self.height > TALL_FROM * self.width else []
        classes = f' class="{" ".join(kinds)}"' if kinds else ""
        return (
            f'<img{classes} src="{self.uri}" width="{self.width}" height="{self.height}" alt="{text(alt, 500)}" '
            'loading="lazy" decoding="async"/>'
        )


class Shown(Protocol):
    """What stands for an output on the page."""

    def tag(self, alt: str) -> str:
        """Its HTML; ``alt`` says in words what it is."""
        ...


S = TypeVar("S", bound=Shown, covariant=True)


@dataclass(frozen=True)
class Album(Generic[S]):
    """Pictures, or players of sounds, by path in the run ``folder``. ``left_out`` were readable but over the budget;
    ``unreadable`` were not."""

    folder: Path
    pictures: Mapping[str, S]
    side: int
    left_out: int
    unreadable: int


def album(folder: Path, names: Sequence[str], *, budget: int = BUDGET) -> Album[Picture]:
    """Read pictures of a run; a name that stands twice is counted twice, since the page will hold it twice.

    The largest of ``SIDES`` at which all fit is taken; if none is small enough, the last names are left out.
    """
    images = {name: image for name in dict.fromkeys(names) if (image := read(folder, name)) is not None}
    unreadable = len(set(names)) - len(images)
    pictures: dict[str, Picture] = {}
    side = SIDES[0]
    for side in SIDES:
        pictures = {name: picture(image, side) for name, image in images.items()}
        if sum(len(pictures[name].uri) for name in names if name in pictures) <= budget:
            return Album(folder, pictures, side, 0, unreadable)
    kept: dict[str, Picture] = {}
    used = 0
    for name in names:
        if name in pictures and used + len(pictures[name].uri) <= budget:
            used += len(pictures[name].uri)
            kept[name] = pictures[name]
    return Album(folder, kept, side, len(pictures) - len(kept), unreadable)


def read(folder: Path, name: str) -> Image.Image | None:
    """The picture as RGB at a side of at most ``SIDES[0]``; None if it is absent, unreadable or outside the folder."""
    path = inside(folder, name)
    return None if path is None else decode(path.read_bytes())


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder; None if there is none, or if it lies outside."""
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) and path.is_file() else None


def decode(data: bytes) -> Image.Image | None:
    """The picture in encoded bytes as RGB, made small; None if Pillow cannot or will not read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDES[0], SIDES[0]), Image.Resampling.LANCZOS)
    return small


def picture(image: Image.Image, side: int) -> Picture:
    """As PNG without metadata, the longest side at most ``side``."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), *small.size)


def names_of(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """The paths of pictures or sounds that evaluation items name, in order."""
    sides = [f"{side}_{kind}" for side in ("base", "aligned") for kind in ("image", "sound")]
    return [item[side] for item in items for side in sides if isinstance(item.get(side), str)]


def are_sounds(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the items of an evaluation are sounds."""
    return bool(items) and "base_sound" in items[0]
