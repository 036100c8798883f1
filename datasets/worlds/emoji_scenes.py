"""The world `emoji_scenes`: pictures of one to four OpenMoji drawings whose objects are known exactly, for real vision-language
models, which know what a cat looks like; the shapes of the world `scenes` are for the tiny base.

A scene is a white square (224 pixels a side by default), a drawing in each of some cells of a 2 x 2 grid, its size and place in
the cell drawn by lot; no object twice. Some things come more often than others, and half of the scenes hold things of one group
(animals, food, ...), so that POPE's popular and adversarial objects differ from random ones. What is held out are compositions:
a third of all sets of objects, wherever these lie. Everything that is drawn by lot is keyed by the seed.

    python -m polyalign.datasets.worlds.emoji_scenes FOLDER --count 200 --split heldout

writes into FOLDER, of so many pictures each:

- ``questions.jsonl``: single-image questions, for ``pairs: {source: multi_image, multi_image: {questions: FOLDER}}``
- ``prompts.jsonl``: the same as ``prompt``, ``images``, ``chosen`` (the right answer), ``objects``, ``task``, ``about``, for
  ``pairs: {source: generate | re_align, prompts: {file: FOLDER/prompts.jsonl}}`` and for evaluation; ``synonyms.txt`` is what
  the judge ``objects`` reads answers with
- ``pope/`` and ``chair/``: benchmarks, for :mod:`polyalign.evaluation.vlm.score`
- ``SOURCES.md``: the credit that the drawings' licence asks for

The drawings come from the ``emoji`` extra (see :mod:`polyalign.datasets.worlds.emoji`), or from a folder of yours.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.randomness import permutation, seed_of
from polyalign.datasets.multi_image.sources import FILE
from polyalign.datasets.worlds import scene_files
from polyalign.datasets.worlds.emoji import Concept, fitted, sources, style
from polyalign.datasets.worlds.emoji_things import GROUPS, THINGS, Thing
from polyalign.datasets.worlds.scene_words import caption, counted, existence, with_article
from polyalign.datasets.worlds.scenes import HELD_OUT, SPLITS

NAME = "emoji_scenes"
TASKS = ("what", "exists", "count")
POPE_SPLITS = ("random", "popular", "adversarial")
PROMPTS, SYNONYMS = "prompts.jsonl", "synonyms.txt"
PICTURES = "emoji"
"""The folder of the pictures that are asked about, and the name of their source."""

SIZE, SMALLEST = 224, 32
CELLS = 4
SIZES = (1, 2, 2, 3, 3, 4)
"""How many objects a scene has, drawn evenly from these."""

ALIKE = 0.5
"""How many scenes hold things of one group only."""

SIDES = (0.6, 0.92)
"""The side of a drawing, as a share of its cell's."""

COUNTED = 2000
"""Scenes in which POPE counts how often objects occur, and together; its pictures are the first of them."""


def held_out(names: Iterable[str]) -> bool:
    """Whether a set of objects is one of those that no training sees: a third of all, by their hash."""
    digest = hashlib.sha256(f"{NAME}: {sorted(names)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


@dataclass(frozen=True)
class Placed:
    """A thing in a picture: the upper left corner and the side of its square, in pixels."""

    name: str
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class EmojiScene:
    """Things in reading order: left to right, then down."""

    things: tuple[Placed, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)


@dataclass(frozen=True)
class Question:
    """A task, and for `exists` the thing it is about."""

    task: str
    about: str = ""

    def text(self) -> str:
        if self.task == "exists":
            return f"Is there {with_article(self.about)}?"
        return {"what": "What is in the picture?", "count": "How many objects are there?"}[self.task]

    def answer(self, names: Sequence[str]) -> str:
        """The right one for a picture of these."""
        if self.task == "exists":
            return existence(self.about, self.about in names)
        return caption(names) if self.task == "what" else counted(len(names))


class EmojiWorld:
    """The things that there are drawings of, and scenes of them.

    Args:
        drawn_in: ``openmoji``, another style of :mod:`polyalign.datasets.worlds.emoji`, or a folder of pictures named like
            ``red-apple.png`` or ``1f34e.png``.
        size: pixels of a picture's side.
        groups: of which of OpenMoji's groups the things are.

    Raises:
        UserError: the ``emoji`` extra, or the folder, is missing; another group; or fewer than eight things are drawn.
    """

    def __init__(self, drawn_in: str = "openmoji", *, size: int = SIZE, groups: Sequence[str] = tuple(GROUPS)):
        if wrong := [group for group in groups if group not in GROUPS]:
            raise UserError(f"groups: there is no group {wrong[0]!r}. Groups: {', '.join(GROUPS)}")
        if size < SMALLEST:
            raise UserError(f"size must be at least {SMALLEST} pixels, found {size}")
        draw = style(drawn_in)
        self.drawn_in, self.size = drawn_in, size
        self._drawings: dict[str, Image.Image] = {}
        for thing in (thing for thing in THINGS if thing.group in groups):
            drawing = draw(Concept(thing.name, thing.characters))
            if drawing is not None and fitted(drawing, SMALLEST) is not None:
                self._drawings[thing.name] = drawing
        self.things = tuple(thing for thing in THINGS if thing.name in self._drawings)
        if len(self.things) < 2 * CELLS:
            raise UserError(
                f"{drawn_in} has drawings of {len(self.things)} of the world's things in {', '.join(groups)}; a world needs "
                f"{2 * CELLS}. Things are such as {', '.join(thing.name for thing in THINGS[::30])}"
            )
        order = sorted(self.things, key=lambda thing: hashlib.sha256(f"{NAME}: {thing.name}".encode()).digest())
        self._weights = {thing.name: (place + 1) ** -0.5 for place, thing in enumerate(order)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)

    def absent(self, names: Iterable[str]) -> list[str]:
        """All things but these."""
        there = set(names)
        return [name for name in self.names if name not in there]

    def akin(self, names: Iterable[str]) -> list[str]:
        """All things of the groups that these are of, but these."""
        there = set(names)
        groups = {thing.group for thing in self.things if thing.name in there}
        return [thing.name for thing in self.things if thing.group in groups and thing.name not in there]

    def composition(self, split: str, draws: random.Random) -> tuple[str, ...]:
        """A set of objects of a split, in the order they were drawn.

        Raises:
            ValueError: another split.
        """
        if split not in SPLITS:
            raise ValueError(f"the world '{NAME}' has the splits {' and '.join(map(repr, SPLITS))}, not {split!r}")
        while True:
            number = draws.choice(SIZES)
            group = draws.choice(self.things).group if draws.random() < ALIKE else None
            among = [thing for thing in self.things if group in (None, thing.group)]
            names = self._taken(among if len(among) >= number else self.things, number, draws)
            if held_out(names) == (split == "heldout"):
                return names

    def _taken(self, among: Sequence[Thing], number: int, draws: random.Random) -> tuple[str, ...]:
        """So many, none twice, each with a chance in proportion to its weight (Efraimidis and Spirakis, 2006, algorithm A)."""
        keys = {thing.name: draws.random() ** (1 / self._weights[thing.name]) for thing in among}
        return tuple(sorted(keys, key=lambda name: -keys[name])[:number])

    def placed(self, names: Sequence[str], draws: random.Random) -> EmojiScene:
        """A scene of these objects: cells, sizes and places in the cells by chance."""
        cell, things = self.size // 2, []
        for name, place in zip(
            draws.sample(list(names), len(names)), sorted(draws.sample(range(CELLS), len(names))), strict=True
        ):
            side = round(cell * draws.uniform(*SIDES))
            left, top = (start * cell + draws.randint(0, cell - side) for start in (place % 2, place // 2))
            things.append(Placed(name, left, top, side))
        return EmojiScene(tuple(things))

    def scene(self, split: str, draws: random.Random) -> EmojiScene:
        """One scene of a split.

        Raises:
            ValueError: another split.
        """
        return self.placed(self.composition(split, draws), draws)

    def draw(self, scene: EmojiScene) -> Image.Image:
        """The picture, RGB."""
        canvas = Image.new("RGB", (self.size, self.size), "white")
        for thing in scene.things:
            drawing = fitted(self._drawings[thing.name], thing.side)
            assert drawing is not None  # the blank ones are no things of this world
            canvas.paste(drawing, (thing.left, thing.top))
        return canvas

    def synonyms(self) -> list[tuple[str, ...]]:
        """All names of every thing, its own first."""
        return [(thing.name, *thing.others) for thing in self.things]


# --- questions ---------------------------------------------------------------------------------------------------------------


def ask(world: EmojiWorld, scene: EmojiScene, draws: random.Random) -> list[Question]:
    """One question of each task. Half of the things asked for are there; half of the others are of a group that is."""
    names = scene.names
    absent = world.absent(names)
    about = draws.choice(draws.choice([names, names, absent, world.akin(names) or absent]))
    return [Question(task, about if task == "exists" else "") for task in TASKS]


def _asked(
    world: EmojiWorld, folder: Path, split: str, pictures: int, seed: int
) -> Iterator[tuple[str, EmojiScene, list[Question]]]:
    """The name of each picture, which is written, its scene, and what is asked about it."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        draws = random.Random(seed_of(seed, NAME, "questions", split, index))
        scene = world.scene(split, draws)
        name = f"{PICTURES}/{index:05d}.png"
        world.draw(scene).save(folder / name)
        yield name, scene, ask(world, scene, draws)
    (folder / "SOURCES.md").write_bytes(sources({"pictures": world.drawn_in}))


def write_questions(folder: str | Path, split: str, pictures: int, seed: int = 0, *, world: EmojiWorld | None = None) -> Path:
    """Write ``pictures`` pictures of a split with a question of each task, as
    :func:`polyalign.datasets.multi_image.sources.read_questions` reads them. Returns the folder.

    Raises:
        UserError: see :class:`EmojiWorld`.
        ValueError: another split.
    """
    folder = Path(folder)
    lines = [
        {"image": name, "question": question.text(), "answer": question.answer(scene.names)}
        for name, scene, questions in _asked(world or EmojiWorld(), folder, split, pictures, seed)
        for question in questions
    ]
    scene_files.write_lines(folder / FILE, lines)
    return folder


def write_prompts(folder: str | Path, split: str, pictures: int, seed: int = 0, *, world: EmojiWorld | None = None) -> Path:
    """Write the same pictures and questions as :func:`write_questions` does as rows of ``prompt``, ``images``, ``chosen`` (the
    right answer), ``objects`` (what is in the picture), ``task`` and ``about``, as
    :func:`polyalign.datasets.visual_prompts.load_visual_prompts` reads them, with ``synonyms.txt``. Returns the file.

    Raises:
        UserError: see :class:`EmojiWorld`.
        ValueError: another split.
    """
    folder, world = Path(folder), world or EmojiWorld()
    lines: list[dict[str, Any]] = []
    for name, scene, questions in _asked(world, folder, split, pictures, seed):
        for question in questions:
            row = {"prompt": question.text(), "images": [name], "chosen": question.answer(scene.names)}
            lines.append({**row, "objects": list(scene.names), "task": question.task, "about": question.about})
    scene_files.write_lines(folder / PROMPTS, lines)
    scene_files.write_synonyms(folder / SYNONYMS, world.synonyms())
    return folder / PROMPTS


# --- benchmarks --------------------------------------------------------------------------------------------------------------


def pope(world: EmojiWorld, split: str, pictures: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """POPE's rows (arXiv 2305.10355, section 4.2) by its split, each with its ``picture``: for every object that is there, one
    that is not and has not been asked for of this picture:

    - random: any;
    - popular: the one that is in most of the split's scenes;
    - adversarial: the one that most often stands together with the object that is there; any, if none ever did.

    Counted are COUNTED scenes of the split. Of things that are as frequent the one is taken that comes first in a lot.
    """
    draws = [random.Random(seed_of(seed, NAME, "pope", split, index)) for index in range(max(pictures, COUNTED))]
    scenes = [world.scene(split, one) for one in draws]
    lot = [world.names[place] for place in permutation(seed, len(world.names), NAME, "lot")]
    often = Counter(name for scene in scenes for name in scene.names)
    together = Counter((one, other) for scene in scenes for one in scene.names for other in scene.names if one != other)
    popular = sorted(lot, key=lambda name: -often[name])
    beside = {
        one: sorted((other for other in lot if together[one, other]), key=lambda other: -together[one, other]) for one in lot
    }
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in POPE_SPLITS}
    for index, (scene, one) in enumerate(zip(scenes[:pictures], draws, strict=False)):
        image, picture = f"{index:05d}.png", world.draw(scene)
        for kind, lines in found.items():
            left = world.absent(scene.names)
            for name in scene.names:
                ranked = {"random": (), "popular": popular, "adversarial": beside[name]}[kind]
                absent = next((other for other in ranked if other in left), None) or one.choice(left)
                left.remove(absent)
                lines += scene_files.pope_pair(len(lines) + 1, image, picture, _in_the_image(name), _in_the_image(absent))
    return found


def _in_the_image(name: str) -> str:
    return f"Is there {with_article(name)} in the image?"


def captions(world: EmojiWorld, split: str, pictures: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pictures to be captioned, for CHAIR: {"image", "picture", "text" (what is asked), "objects", "reference"}."""
    found = []
    for index in range(pictures):
        scene = world.scene(split, random.Random(seed_of(seed, NAME, "captions", split, index)))
        given: dict[str, Any] = {"image": f"{index:05d}.png", "picture": world.draw(scene), "text": Question("what").text()}
        found.append({**given, "objects": list(scene.names), "reference": caption(scene.names)})
    return found


def write_benchmarks(folder: str | Path, split: str, pictures: int, seed: int = 0, *, world: EmojiWorld | None = None) -> Path:
    """Write POPE's three splits and CHAIR's files with their pictures; see
    :func:`polyalign.datasets.worlds.scene_files.write_benchmarks`. Returns the folder.

    Raises:
        UserError: see :class:`EmojiWorld`.
        ValueError: another split.
    """
    world = world or EmojiWorld()
    made = pope(world, split, pictures, seed), captions(world, split, pictures, seed)
    folder = scene_files.write_benchmarks(folder, NAME, *made, world.synonyms())
    (folder / "SOURCES.md").write_bytes(sources({"pictures": world.drawn_in}))
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog=f"python -m polyalign.datasets.worlds.{NAME}",
        description="Write pictures of OpenMoji drawings with questions, prompts, POPE and CHAIR.",
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--count", type=int, default=200, help="pictures of each part (default 200)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which sets of objects (default train)")
    parser.add_argument("--seed", type=int, default=0, help="keys all that is drawn by lot (default 0)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels of a side (default {SIZE})")
    parser.add_argument(
        "--groups", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), help="of which things (default all)"
    )
    parser.add_argument("--style", default="openmoji", help="openmoji, openmoji-black, twemoji, or a folder (default openmoji)")
    asked = parser.parse_args(arguments)
    try:
        if asked.count < 1:
            raise UserError(f"count must be at least 1, found {asked.count}")
        world = EmojiWorld(asked.style, size=asked.size, groups=asked.groups)
        for write in (write_questions, write_prompts, write_benchmarks):
            write(asked.folder, asked.split, asked.count, asked.seed, world=world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{asked.folder}: {asked.count} pictures ({asked.split}) of {len(world.things)} things, with questions and benchmarks"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
