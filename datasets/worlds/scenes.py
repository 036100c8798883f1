"""The world `scenes`: small pictures of coloured shapes whose objects are known exactly, and can be seen again exactly.

A scene is 32 x 32 RGB: one to three objects (one of four shapes in one of six colours, none twice) on a light ground, one in
each cell of a 2 x 2 grid, shifted by whole pixels. They are drawn with the sprites of the world `shapes`. What is asked about
scenes, and what is right, stands in :mod:`polyalign.datasets.worlds.scenes_questions`.

What is held out are compositions: a third of the sets of one, two and three objects, wherever the objects lie.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations, product

import numpy as np
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.worlds.shapes import CELL, GROUND, JITTER, SHAPES, SIZE, WINDOW, Thing, sprites

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 66),
    "blue": (45, 85, 210),
    "yellow": (245, 190, 30),
    "purple": (150, 60, 190),
    "black": (35, 35, 40),
}
OBJECTS = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
MOST = 3
"""Objects in a scene."""

SIZES = (1, 1, 2, 2, 3)
"""How many objects a scene has, drawn evenly from these."""

SPLITS = ("train", "heldout")
HELD_OUT = 3  # one composition in so many is held out
STRANGE = 0.15
"""Root mean square residual of a cell that no object explains: what is there is not of this world."""


@dataclass(frozen=True)
class Scene:
    """Objects in reading order: left to right, then down."""

    things: tuple[Thing, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The objects as they are called, ``red square``."""
        return tuple(f"{thing.colour} {thing.shape}" for thing in self.things)

    def draw(self) -> Image.Image:
        """The picture."""
        half = WINDOW // 2
        canvas = np.tile(GROUND, (SIZE + 2 * half, SIZE + 2 * half, 1))
        for thing in self.things:
            cover = sprites()[thing.shape][..., None]
            window = canvas[thing.y : thing.y + WINDOW, thing.x : thing.x + WINDOW]
            window[:] = window * (1 - cover) + cover * np.array(COLOURS[thing.colour], dtype=np.float32) / 255
        return Image.fromarray((canvas[half:-half, half:-half] * 255).round().astype(np.uint8))


# --- compositions ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _held_out() -> frozenset[frozenset[str]]:
    """A third of the sets of each size, in the order of their hash."""
    chosen: set[frozenset[str]] = set()
    for size in range(1, MOST + 1):
        every = sorted(combinations(OBJECTS, size), key=lambda names: hashlib.sha256(f"scenes: {names}".encode()).digest())
        chosen.update(frozenset(names) for names in every[: len(every) // HELD_OUT])
    return frozenset(chosen)


def held_out(names: Iterable[str]) -> bool:
    """Whether a set of objects is one of those that no training sees, and that evaluation asks about."""
    return frozenset(names) in _held_out()


def compositions(split: str | None) -> list[tuple[str, ...]]:
    """Every set of objects of a split (None: of both).

    Raises:
        ValueError: another split.
    """
    _check_split(split)
    return [names for size in range(1, MOST + 1) for names in _of_size(split, size)]


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"the world 'scenes' has the splits 'train' and 'heldout', not {split!r}")


@cache
def _of_size(split: str | None, size: int) -> tuple[tuple[str, ...], ...]:
    every = combinations(OBJECTS, size)
    return tuple(names for names in every if split is None or held_out(names) == (split == "heldout"))


def placed(names: Collection[str], draws: random.Random) -> Scene:
    """A scene of these objects: cells and places in them by chance."""
    cells = sorted(draws.sample(range(4), len(names)))
    things = []
    for name, cell in zip(draws.sample(list(names), len(names)), cells, strict=True):
        colour, shape = name.split()
        x, y = (CELL // 2 + CELL * place + draws.randint(-JITTER, JITTER) for place in (cell % 2, cell // 2))
        things.append(Thing(shape, colour, x, y))
    return Scene(tuple(things))


def scene(split: str | None, draws: random.Random) -> Scene:
    """One scene of a split (None: of both).

    Raises:
        ValueError: another split.
    """
    _check_split(split)
    return placed(draws.choice(_of_size(split, draws.choice(SIZES))), draws)


# --- seeing ------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _cells() -> tuple[list[Thing | None], np.ndarray]:
    """What the first cell may hold (nothing, or an object somewhere), and its pixels then (K, CELL * CELL * 3)."""
    places = range(CELL // 2 - JITTER, CELL // 2 + JITTER + 1)
    found = [None, *(Thing(shape, colour, x, y) for colour, shape, x, y in product(COLOURS, SHAPES, places, places))]
    drawn = [Scene(() if thing is None else (thing,)).draw() for thing in found]
    pixels = np.stack([np.asarray(picture, dtype=np.float32)[:CELL, :CELL] for picture in drawn])
    return found, pixels.reshape(len(found), -1) / 255


def see(picture: Image.Image) -> Scene:
    """The scene that a picture of this world shows, also after it was enlarged, shrunk or compressed a little: each cell's
    object, shift and colour that leave the least unexplained.

    Raises:
        UserError: a cell holds nothing that this world draws.
    """
    small = picture.convert("RGB")
    if small.size != (SIZE, SIZE):
        how = Image.Resampling.BOX if min(small.size) > SIZE else Image.Resampling.BICUBIC
        small = small.resize((SIZE, SIZE), how)
    return _seen(small.tobytes())


@lru_cache(maxsize=8192)
def _seen(pixels: bytes) -> Scene:
    canvas = np.frombuffer(pixels, dtype=np.uint8).reshape(SIZE, SIZE, 3).astype(np.float32) / 255
    kinds, drawn = _cells()
    things = []
    for row, column in product(range(2), range(2)):
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].reshape(-1)
        error = ((drawn - cell) ** 2).mean(1)
        best = int(error.argmin())
        if error[best] > STRANGE**2:
            raise UserError(
                f"the world 'scenes' does not know what is in the picture's row {row + 1}, column {column + 1}: it draws one "
                f"object a cell, of {', '.join(SHAPES)}, in {', '.join(COLOURS)}"
            )
        thing = kinds[best]
        if thing is not None:
            things.append(Thing(thing.shape, thing.colour, thing.x + column * CELL, thing.y + row * CELL))
    return Scene(tuple(things))
