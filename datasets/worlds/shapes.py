"""The world `shapes`: GenEval in miniature, with a judge that is exact.

A picture is 32 x 32 RGB: one to four objects (a shape in a colour) on a light ground, one in each cell of a 2 x 2 grid,
shifted by whole pixels. A prompt asks for one of GenEval's six tasks (Ghosh et al., arXiv 2310.11513): one object, two
objects, a count, a colour, a position, colours bound to objects. The judge finds the objects by matching sprites, draws what
it found, and compares with the picture: a picture that is not explained by its objects is *not clean*. Unlike GenEval, which
forgives extra objects in four of the six tasks, a picture is right only if it holds exactly what the prompt asks for: here
detection has no noise to forgive.

Training captions can be made wrong on purpose (`noisy_caption`): swapped sides, swapped colours, a wrong count, a forgotten
object, as in the captions of the web. A model trained on them errs in the way that real models do, which leaves something to
prefer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from polyalign.core.errors import UserError

SIZE = 32
CELL = 16
RADIUS = 4.5  # an object is 9 pixels wide
WINDOW = 11  # a sprite with its antialiased border
JITTER = 1  # pixels to either side of the cell's middle
GROUND = np.array([240, 240, 235], dtype=np.float32) / 255
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 66),
    "blue": (45, 85, 210),
    "yellow": (245, 190, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first object: dx, dy
OPENINGS = ("", "a picture of ", "a drawing of ")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# How often a training caption is wrong, by task. Nothing can be wrong about a lone object without a colour.
CAPTION_NOISE = {"two_object": 0.1, "counting": 0.25, "colors": 0.1, "position": 0.2, "color_attr": 0.2}


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for. ``colours[i]`` is None where any colour will do; ``relation`` is of the first object to the
    second."""

    task: str
    shapes: tuple[str, ...]
    colours: tuple[str | None, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Thing:
    """An object in a picture: ``x`` and ``y`` are its middle in pixels."""

    shape: str
    colour: str
    x: int
    y: int


# --- prompts ---------------------------------------------------------------------------------------------------------------


def caption(spec: Spec, opening: str = "") -> str:
    """The prompt of a specification: ``caption(parse(p)) == p`` up to the opening."""
    if spec.task == "counting":
        number = next(word for word, count in NUMBERS.items() if count == len(spec.shapes))
        return f"{opening}{number} {spec.shapes[0]}{'es' if spec.shapes[0] == 'cross' else 's'}"
    words = [f"a {colour} {shape}" if colour else f"a {shape}" for shape, colour in zip(spec.shapes, spec.colours, strict=True)]
    return opening + f" {spec.relation or 'and'} ".join(words)


def parse(prompt: str) -> Spec:
    """The specification of a prompt of this world.

    Raises:
        ValueError: the prompt is none that this world can speak of.
    """
    spec = _specifications().get(_without_opening(prompt))
    if spec is None:
        raise ValueError(
            f"the world 'shapes' does not know the prompt {prompt!r}; it speaks of {', '.join(SHAPES)} in "
            f"{', '.join(COLOURS)}: 'a circle', 'a red circle', 'three circles', 'a circle left of a square', "
            "'a red circle and a blue square'"
        )
    return spec


def _without_opening(prompt: str) -> str:
    for opening in OPENINGS[1:]:
        if prompt.startswith(opening):
            return prompt[len(opening) :]
    return prompt


def all_prompts() -> list[str]:
    """Every prompt of the world, without openings."""
    return list(_specifications())


@lru_cache(maxsize=1)
def _specifications() -> dict[str, Spec]:
    return {caption(spec): spec for task in TASKS for spec in _all_of(task)}


def _all_of(task: str) -> Iterator[Spec]:
    if task == "single_object":
        yield from (Spec(task, (shape,), (None,)) for shape in SHAPES)
    elif task == "colors":
        yield from (Spec(task, (shape,), (colour,)) for shape in SHAPES for colour in COLOURS)
    elif task == "counting":
        yield from (Spec(task, (shape,) * count, (None,) * count) for shape in SHAPES for count in NUMBERS.values())
    else:
        for first in SHAPES:
            for second in SHAPES:
                if first != second:
                    yield from _of_two(task, first, second)


def _of_two(task: str, first: str, second: str) -> Iterator[Spec]:
    if task == "two_object":
        yield Spec(task, (first, second), (None, None))
    elif task == "position":
        yield from (Spec(task, (first, second), (None, None), relation) for relation in RELATIONS)
    else:
        yield from (Spec(task, (first, second), (a, b)) for a in COLOURS for b in COLOURS if a != b)


@lru_cache(maxsize=1)
def _held_out() -> frozenset[Spec]:
    """A third of each task's compositions (at least one), in the order of their hash."""
    chosen: set[Spec] = set()
    for task in TASKS:
        ordered = sorted(_all_of(task), key=lambda spec: hashlib.sha256(f"{task}: {caption(spec)}".encode()).digest())
        chosen.update(ordered[: max(1, len(ordered) // 3)])
    return frozenset(chosen)


def held_out(prompt: str) -> bool:
    """Whether a prompt is one of those that never take part in alignment, and that evaluation asks for. What is held out is the
    composition, under every opening: another wording of a trained prompt would be no test."""
    return parse(prompt) in _held_out()


def prompts(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` conditions of a split (``train`` or ``heldout``), the six tasks in turn: {"prompt", "task"}.

    The same prompt comes more than once when a task has fewer prompts than are asked for.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"the world 'shapes' has the splits 'train' and 'heldout', not {split!r}")
    by_task: dict[str, list[str]] = {}
    for task in TASKS:
        texts = [caption(spec, opening) for opening in OPENINGS for spec in _all_of(task)]
        by_task[task] = [text for text in texts if held_out(text) == (split == "heldout")]
        random.Random(f"{seed}-{split}-{task}").shuffle(by_task[task])
    chosen = []
    for index in range(count):
        task = TASKS[index % len(TASKS)]
        texts = by_task[task]
        chosen.append({"prompt": texts[(index // len(TASKS)) % len(texts)], "task": task})
    return chosen


def random_spec(rng: random.Random, tasks: Sequence[str] = TASKS) -> Spec:
    """One specification: one of ``tasks`` evenly (a task named twice comes twice as often), then evenly within it."""
    return rng.choice(_specifications_by_task()[rng.choice(tasks)])


@lru_cache(maxsize=1)
def _specifications_by_task() -> dict[str, list[Spec]]:
    return {task: list(_all_of(task)) for task in TASKS}


def noisy_caption(spec: Spec, rng: random.Random) -> str:
    """The caption of ``spec``, wrong with the probability of its task (`CAPTION_NOISE`)."""
    opening = rng.choice(OPENINGS)
    if rng.random() >= CAPTION_NOISE.get(spec.task, 0.0):
        return caption(spec, opening)
    if spec.task == "counting":
        count = rng.choice([number for number in NUMBERS.values() if number != len(spec.shapes)])
        return caption(replace(spec, shapes=spec.shapes[:1] * count, colours=(None,) * count), opening)
    if spec.task == "colors":
        other = rng.choice([colour for colour in COLOURS if colour != spec.colours[0]])
        return caption(replace(spec, colours=(other,)), opening)
    if spec.task == "two_object":  # one of the two is not mentioned
        return caption(Spec("single_object", (rng.choice(spec.shapes),), (None,)), opening)
    if spec.task == "position":
        return caption(replace(spec, shapes=spec.shapes[::-1]), opening)
    return caption(replace(spec, colours=spec.colours[::-1]), opening)


# --- pictures --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sprites() -> dict[str, np.ndarray]:
    """Coverage of each shape in its window, (WINDOW, WINDOW) in [0, 1], from 8 x 8 samples a pixel."""
    fine = (np.arange(WINDOW * 8) + 0.5) / 8 - WINDOW / 2
    x, y = np.meshgrid(fine, fine)
    inside = {
        "circle": x**2 + y**2 <= RADIUS**2,
        "square": np.maximum(abs(x), abs(y)) <= RADIUS - 0.5,
        "triangle": (y <= RADIUS - 0.5) & (y >= -RADIUS + 2 * abs(x) * 0.95),
        "cross": (np.maximum(abs(x), abs(y)) <= RADIUS) & (np.minimum(abs(x), abs(y)) <= 1.5),
    }
    return {name: mask.reshape(WINDOW, 8, WINDOW, 8).mean((1, 3)).astype(np.float32) for name, mask in inside.items()}


def draw(things: Sequence[Thing]) -> np.ndarray:
    """The picture of some things: (SIZE, SIZE, 3) float32 in [0, 1]."""
    half = WINDOW // 2
    canvas = np.tile(GROUND, (SIZE + 2 * half, SIZE + 2 * half, 1))
    for thing in things:
        cover = sprites()[thing.shape][..., None]
        window = canvas[thing.y : thing.y + WINDOW, thing.x : thing.x + WINDOW]
        window[:] = window * (1 - cover) + cover * _colour(thing.colour)
    return canvas[half:-half, half:-half]


def _colour(name: str) -> np.ndarray:
    return np.array(COLOURS[name], dtype=np.float32) / 255


def arrange(spec: Spec, rng: random.Random) -> list[Thing]:
    """Things that satisfy ``spec``: cells by chance (or as the relation asks), unasked colours by chance, positions
    jittered."""
    cells = _cells(spec, rng)
    things = []
    for shape, colour, (column, row) in zip(spec.shapes, spec.colours, cells, strict=True):
        x, y = (CELL // 2 + CELL * place + rng.randint(-JITTER, JITTER) for place in (column, row))
        things.append(Thing(shape, colour or rng.choice(list(COLOURS)), x, y))
    return things


def _cells(spec: Spec, rng: random.Random) -> list[tuple[int, int]]:
    if spec.relation is None:
        return rng.sample([(column, row) for column in (0, 1) for row in (0, 1)], len(spec.shapes))
    dx, dy = RELATIONS[spec.relation]
    across = rng.randint(0, 1)
    first = (int(dx > 0), across) if dx else (across, int(dy > 0))
    second = (1 - first[0], first[1]) if dx else (first[0], 1 - first[1])
    return [first, second]


def render(spec: Spec, rng: random.Random) -> Image.Image:
    """A right picture of ``spec``."""
    return Image.fromarray((draw(arrange(spec, rng)) * 255).round().astype(np.uint8))


# --- the judge -------------------------------------------------------------------------------------------------------------

FOREGROUND = 0.15  # a pixel this far from the ground (largest channel) belongs to something
SMALLEST = 6  # pixels; a smaller blob is a stain, which the residual then counts
CLEAN_OBJECT = 0.12  # root mean square residual allowed in an object's window
CLEAN_PICTURE = 0.06  # and over the whole picture


@dataclass(frozen=True)
class Verdict:
    """What the judge saw. ``score``: 1 right, 0 clean but wrong, -1 not clean."""

    things: tuple[Thing, ...]
    clean: bool
    right: bool

    @property
    def score(self) -> float:
        return 1.0 if self.right else (0.0 if self.clean else -1.0)


def detect(picture: np.ndarray) -> tuple[list[Thing], bool]:
    """The things in a picture (SIZE, SIZE, 3) in [0, 1], and whether they explain it (is it clean?)."""
    matched = list(_matched(picture))
    things = [thing for thing, _ in matched]
    clean = all(residual <= CLEAN_OBJECT for _, residual in matched)
    clean &= float(np.sqrt(((picture - draw(things)) ** 2).mean())) <= CLEAN_PICTURE
    return things, clean and len(things) > 0


def _matched(picture: np.ndarray) -> Iterator[tuple[Thing, float]]:
    """What explains each blob best, with its residual."""
    foreground = abs(picture - GROUND).max(-1) > FOREGROUND
    labels = np.empty(foreground.shape, dtype=np.int32)
    ndimage.label(foreground, structure=np.ones((3, 3)), output=labels)
    for index, place in enumerate(ndimage.find_objects(labels), start=1):
        if (labels[place] == index).sum() >= SMALLEST:
            yield _best_match(picture, place)


def _best_match(picture: np.ndarray, place: tuple[slice, slice]) -> tuple[Thing, float]:
    """The sprite that explains a blob best, tried at the blob's middle and one pixel around it, with its residual."""
    half = WINDOW // 2
    rows, columns = place
    y, x = ((part.start + part.stop - 1) // 2 for part in (rows, columns))
    padded = np.pad(picture, ((half + 1, half + 1), (half + 1, half + 1), (0, 0)), mode="edge")
    names = list(sprites())
    cover = np.stack([sprites()[name] for name in names])[:, None, :, :, None]  # (S, 1, W, W, 1)
    palette = np.stack([_colour(name) for name in COLOURS])[None, :, None, None, :]  # (1, C, 1, 1, 3)
    drawn = GROUND * (1 - cover) + palette * cover  # (S, C, W, W, 3)
    best: tuple[float, Thing] | None = None
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            window = padded[y + dy + 1 : y + dy + 1 + WINDOW, x + dx + 1 : x + dx + 1 + WINDOW]
            error = np.sqrt(((drawn - window) ** 2).mean((2, 3, 4)))
            shape, colour = np.unravel_index(error.argmin(), error.shape)
            if best is None or error[shape, colour] < best[0]:
                thing = Thing(names[shape], list(COLOURS)[colour], min(max(x + dx, 0), SIZE - 1), min(max(y + dy, 0), SIZE - 1))
                best = (float(error[shape, colour]), thing)
    assert best is not None
    return best[1], best[0]


def satisfies(things: Sequence[Thing], spec: Spec) -> bool:
    """Exactly what was asked: the same shapes, the colours that were named, and the relation."""
    if sorted(thing.shape for thing in things) != sorted(spec.shapes):
        return False
    if spec.task == "counting":
        return True
    of_shape = {thing.shape: thing for thing in things}  # all shapes differ outside of counting
    ordered = [of_shape[shape] for shape in spec.shapes]
    if any(colour and thing.colour != colour for thing, colour in zip(ordered, spec.colours, strict=True)):
        return False
    return spec.relation is None or _related(ordered[0], ordered[1], spec.relation)


def _related(first: Thing, second: Thing, relation: str) -> bool:
    """GenEval's rule on centres: the offset along the asked direction, normalised by the distance, above one half, after the
    objects' extent has been discounted. Objects here have one size, so a third of it is the discount."""
    offset = np.array([first.x - second.x, first.y - second.y], dtype=float)
    distance = float(np.linalg.norm(offset))
    shrunk = np.sign(offset) * np.maximum(abs(offset) - RADIUS * 2 / 3, 0)
    return distance > 0 and float(shrunk @ np.array(RELATIONS[relation], dtype=float)) / distance > 0.5


class ShapesJudge:
    """The exact judge: 1 for a right picture, 0 for a clean picture of something else, -1 for a picture that is not clean."""

    name = "shapes"
    version = "1"
    broken_below = 0.0  # a lower score is a broken picture, not only a wrong one: the report counts these
    right_from = 1.0  # from this score on the picture is right

    def refuse(self, condition: Mapping[str, Any]) -> Spec:
        """What the prompt asks for.

        Raises:
            UserError: the prompt is not of this world.
        """
        try:
            return parse(condition["prompt"])
        except ValueError as error:
            raise UserError(f"the judge 'shapes': {error}") from error

    def verdict(self, condition: Mapping[str, Any], picture: Image.Image) -> Verdict:
        """Raises:
        UserError: the prompt is not of this world, or the picture has another size than 32 x 32.
        """
        spec = self.refuse(condition)
        things, clean = detect(_pixels(picture, "shapes"))
        return Verdict(tuple(things), clean, clean and satisfies(things, spec))

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Image.Image]) -> list[float]:
        return [self.verdict(condition, picture).score for condition, picture in zip(conditions, outputs, strict=True)]


def _pixels(picture: Image.Image, judge: str) -> np.ndarray:
    if picture.size != (SIZE, SIZE):
        raise UserError(
            f"the judge '{judge}' sees pictures of {SIZE} x {SIZE} pixels, found {picture.size[0]} x {picture.size[1]}"
        )
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


# --- as GenEval's detector ---------------------------------------------------------------------------------------------------


def geneval_metadata(prompt: str) -> dict[str, Any]:
    """GenEval's line of a prompt of this world: what must be there, in its form (targets of relations come first, and a count
    excludes more).

    Raises:
        ValueError: the prompt is none that this world can speak of.
    """
    spec = parse(prompt)
    if spec.task == "counting":
        name, count = spec.shapes[0], len(spec.shapes)
        wanted, unwanted = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
        return {"tag": spec.task, "prompt": prompt, "include": wanted, "exclude": unwanted}
    include: list[dict[str, Any]] = [
        {"class": shape, "count": 1} | ({"color": colour} if colour else {})
        for shape, colour in zip(spec.shapes, spec.colours, strict=True)
    ]
    if spec.relation is not None:
        first, second = include
        include = [second, first | {"position": [spec.relation, 0]}]
    return {"tag": spec.task, "prompt": prompt, "include": include}


def geneval_objects(picture: Image.Image) -> list[tuple[str, str, tuple[float, float, float, float]]]:
    """Shape, colour and box (x0, y0, x1, y1) of every object in a picture; what no sprite explains is no object.

    Raises:
        UserError: the picture has another size than 32 x 32.
    """
    return [
        (thing.shape, thing.colour, (thing.x - RADIUS, thing.y - RADIUS, thing.x + RADIUS, thing.y + RADIUS))
        for thing, residual in _matched(_pixels(picture, "geneval"))
        if residual <= CLEAN_OBJECT
    ]
