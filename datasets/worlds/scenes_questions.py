"""What is asked about pictures of the world `scenes`, and what is right: questions, their answers, and the exact judge.

| task | question | answer |
| --- | --- | --- |
| what | What is in the picture? | There is a red square and a blue circle. |
| colour | What colour is the square? | The square is red. |
| shape | Which shape is red? | The square is red. |
| exists | Is there a red square? | Yes, there is a red square. / No, there is no red square. |
| count | How many squares are there? (or objects) | There is one square. / There are two squares. / There are no squares. |
| alt | MCM-DPO's prompt and a post about one of the objects | A red square beside a blue circle. |

Several pictures are asked about as MIA-DPO does: ``In Image2, what colour is the square?``. Alt-text begins with the object
that the post is about. The judge looks at the picture itself, so it judges any row with such a question: of this world's own or
made by :mod:`polyalign.datasets.multi_image`, collages and pictures in pictures too. An answer is *hallucinated* if it tells of
something that is not in the picture; otherwise it is right or wrong.

Captions of the training data can be made wrong on purpose (:func:`noisy_answer`), as captions of the web are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import decode
from polyalign.datasets.worlds import scene_words
from polyalign.datasets.worlds.scene_words import caption, existence, listed
from polyalign.datasets.worlds.scenes import COLOURS, MOST, OBJECTS, Scene, see
from polyalign.datasets.worlds.shapes import SHAPES

TASKS = ("what", "colour", "shape", "exists", "count", "alt")
ABOUT_ONE_OF_SEVERAL = TASKS[:-1]
"""Tasks that may be asked about one of several pictures."""

NUMBERS = scene_words.NUMBERS[: MOST + 1]
ALT_PROMPT = "Given an image and context, generate alt-text for the image.Context:\n"
"""As MCM-DPO's data have it, the missing space included."""

POSTS = ("Look at my {}!", "I like this {}.", "A {} for you.")
ERRORS = {"invented": 0.12, "recoloured": 0.12, "forgotten": 0.06}
"""How often a caption (what, alt) of the training data has which mistake; one at most."""

FALSE_YES = 0.15
"""How often the training data say yes where the object has only its shape or colour in common with one that is there."""

_SHAPE, _COLOUR = "|".join(SHAPES), "|".join(COLOURS)
_PLURALS = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
_PATTERNS = {
    "what": re.compile(r"what is in the picture\?$"),
    "colour": re.compile(rf"what colour is the (?P<shape>{_SHAPE})\?$"),
    "shape": re.compile(rf"which shape is (?P<colour>{_COLOUR})\?$"),
    "exists": re.compile(rf"is there a (?P<object>(?:{_COLOUR}) (?:{_SHAPE}))\?$"),
    "count": re.compile(rf"how many (?P<things>objects|{'|'.join(_PLURALS)}) are there\?$"),
    "alt": re.compile(re.escape(ALT_PROMPT.lower()) + rf"[^\n]*?\b(?P<shape>{_SHAPE})\b[^\n]*$"),
}
_INDEX = re.compile(r"\bin image(\d+), ")


@dataclass(frozen=True)
class Question:
    """A task and the word it is about: a shape, a colour, an object, ``objects``; nothing for `what`."""

    task: str
    about: str = ""

    def text(self, draws: random.Random | None = None) -> str:
        """The question in words; a post's wording is drawn."""
        if self.task == "what":
            return "What is in the picture?"
        if self.task == "colour":
            return f"What colour is the {self.about}?"
        if self.task == "shape":
            return f"Which shape is {self.about}?"
        if self.task == "exists":
            return f"Is there a {self.about}?"
        if self.task == "count":
            return f"How many {self.about if self.about == 'objects' else _plural(self.about)} are there?"
        return ALT_PROMPT + (draws or random.Random(0)).choice(POSTS).format(self.about)

    def answer(self, scene: Scene) -> str | None:
        """The right answer; None where the question has none, since two objects or none are meant."""
        names = scene.names
        if self.task == "what":
            return caption(names)
        if self.task == "exists":
            return existence(self.about, self.about in names)
        if self.task == "count":
            return _counted(self.about, sum(self.about in ("objects", name.split()[1]) for name in names))
        meant = [name for name in names if self.about in name.split()]
        if len(meant) != 1:
            return None
        if self.task == "alt":
            return _alt(meant[0], names)
        colour, shape = meant[0].split()
        return f"The {shape} is {colour}."


def parse(text: str) -> Question:
    """The question that a text ends with.

    Raises:
        ValueError: none of this world's.
    """
    said = text.strip().lower()
    for task, pattern in _PATTERNS.items():
        if found := pattern.search(said):
            about = next(iter(found.groupdict().values()), "")
            return Question(task, _PLURALS.get(about, about))
    raise ValueError(
        f"the world 'scenes' does not know the question {text[-200:]!r}; it asks {', '.join(TASKS)}, such as "
        "'What colour is the square?', 'Is there a red square?', 'What is in the picture?'"
    )


def ask(scene: Scene, task: str, draws: random.Random) -> Question | None:
    """A question of a task that has an answer for a scene, or None. Half of the objects asked for are there; of the others half
    have their shape or colour in common with one that is."""
    names = scene.names
    if task == "what":
        return Question(task)
    if task == "exists":
        absent = [name for name in OBJECTS if name not in names]
        return Question(task, draws.choice(draws.choice([names, names, absent, alike(names)])))
    if task == "count":
        return Question(task, draws.choice(["objects", draws.choice(SHAPES), *(name.split()[1] for name in names)]))
    part = 0 if task == "shape" else 1
    words = [name.split()[part] for name in names]
    alone = [word for word in words if words.count(word) == 1]
    return Question(task, draws.choice(alone)) if alone else None


def alike(names: Sequence[str]) -> list[str]:
    """Objects that are not there and share shape or colour with one that is."""
    there = {word for name in names for word in name.split()}
    return [name for name in OBJECTS if name not in names and there & set(name.split())]


def noisy_answer(question: Question, scene: Scene, draws: random.Random) -> str | None:
    """The answer as the training data have it: captions wrong by `ERRORS`, existence by `FALSE_YES`."""
    names = list(scene.names)
    if question.task == "exists" and question.about in alike(names) and draws.random() < FALSE_YES:
        return existence(question.about, True)
    if question.task not in ("what", "alt"):
        return question.answer(scene)
    mistake = draws.choices([*ERRORS, None], [*ERRORS.values(), 1 - sum(ERRORS.values())])[0]
    if question.task == "what":
        return caption(_mistaken(names, mistake, draws))
    names.sort(key=lambda name: question.about not in name.split())  # what the post is about stays
    changed = _mistaken(names, mistake, draws)
    return None if question.answer(scene) is None else _alt(changed[0], changed)


def _mistaken(names: Sequence[str], mistake: str | None, draws: random.Random) -> list[str]:
    """Objects with one too many (behind the others), one in another colour, or one too few."""
    if mistake == "invented":
        return [*names, draws.choice(alike(names))]
    if mistake == "recoloured":
        place = draws.randrange(len(names))
        shape = names[place].split()[1]
        free = [f"{colour} {shape}" for colour in COLOURS if f"{colour} {shape}" not in names]
        return [draws.choice(free) if index == place else name for index, name in enumerate(names)]
    if mistake == "forgotten" and len(names) > 1:
        return list(names[:-1])
    return list(names)


# --- words -------------------------------------------------------------------------------------------------------------------


def _plural(shape: str) -> str:
    return next(plural for plural, one in _PLURALS.items() if one == shape)


def _alt(first: str, names: Sequence[str]) -> str:
    others = [name for name in names if name != first]
    return f"A {first} beside {listed(others)}." if others else f"A {first}."


def _counted(about: str, number: int) -> str:
    return scene_words.counted(number) if about == "objects" else scene_words.counted(number, about, _plural(about))


# --- the judge ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What an answer says: its words, whole objects in order, colours, shapes."""

    words: tuple[str, ...]
    objects: tuple[str, ...]
    colours: frozenset[str]
    shapes: frozenset[str]


def told(answer: str) -> Told:
    """An answer read word by word. A colour right before a shape makes an object."""
    found: list[str] = re.findall(r"[a-z0-9]+", answer.lower())
    words = tuple(_PLURALS.get(word, word) for word in found)
    pairs = [f"{one} {two}" for one, two in zip(words, words[1:], strict=False) if one in COLOURS and two in SHAPES]
    return Told(words, tuple(pairs), frozenset(COLOURS).intersection(words), frozenset(SHAPES).intersection(words))


def verdict(question: Question, scene: Scene, answer: str) -> str:
    """``right``, ``wrong``, or ``hallucinated``: it tells of what is not there.

    Any wording counts, as long as it says all and nothing else. Captions name each object once, in any order; alt-text begins
    with the object of the post; a count is a word or a figure; existence begins with yes or no.

    Raises:
        ValueError: the question has no answer for this scene.
    """
    if question.answer(scene) is None:
        raise ValueError(f"the question {question.text()!r} has no single answer for a picture of {', '.join(scene.names)}")
    said, names = told(answer), scene.names
    if question.task in ("what", "alt"):
        right = sorted(said.objects) == sorted(names) and _whole(said)
        if question.task == "alt":
            right = right and question.about in said.objects[0].split()
        false = bool(set(said.objects) - set(names)) or _strange(said, names)
    elif question.task == "exists":
        right, false = _of_existence(question.about, question.about in names, said, names)
    elif question.task == "count":
        right, false = _of_count(question, scene, said)
    else:
        right, false = _of_attribute(question, scene, said)
    return "right" if right else "hallucinated" if false else "wrong"


def _whole(said: Told) -> bool:
    """Whether every colour and shape that is named belongs to an object."""
    return sum(word in COLOURS or word in SHAPES for word in said.words) == 2 * len(said.objects)


def _strange(said: Told, names: Sequence[str]) -> bool:
    """Whether a colour or shape is named that nothing in the picture has."""
    return bool((said.colours | said.shapes) - {word for name in names for word in name.split()})


def _of_existence(about: str, there: bool, said: Told, names: Sequence[str]) -> tuple[bool, bool]:
    yes, no = said.words[:1] == ("yes",), said.words[:1] == ("no",)
    on_topic = set(said.objects) <= {about} and _whole(said)
    false = yes and (not there or bool(set(said.objects) - set(names)))
    return on_topic and (yes if there else no), false


def _of_count(question: Question, scene: Scene, said: Told) -> tuple[bool, bool]:
    number = sum(question.about in ("objects", name.split()[1]) for name in scene.names)
    figures = dict(zip(map(str, range(len(NUMBERS))), NUMBERS, strict=True)) | {"zero": "no", "none": "no"}
    counts = [NUMBERS.index(word) for word in (figures.get(word, word) for word in said.words) if word in NUMBERS]
    on_topic = not said.colours and said.shapes <= {question.about}
    return counts == [number] and on_topic, bool(counts) and (max(counts) > number or _strange(said, scene.names))


def _of_attribute(question: Question, scene: Scene, said: Told) -> tuple[bool, bool]:
    colour, shape = next(name for name in scene.names if question.about in name.split()).split()
    asked, given = (said.colours, said.shapes) if question.task == "colour" else (said.shapes, said.colours)
    value, known = (colour, shape) if question.task == "colour" else (shape, colour)
    return asked == {value} and given <= {known}, _strange(said, scene.names)


@dataclass(frozen=True)
class Asked:
    """A condition as the judge sees it: the question, the scene it is about, and those beside, in order."""

    question: Question
    scene: Scene
    others: tuple[Scene, ...]

    def verdict(self, answer: str) -> str:
        return verdict(self.question, self.scene, answer)

    def confused(self, answer: str) -> bool:
        """Whether an answer is not right, and would be of one of the other pictures."""
        return self.verdict(answer) != "right" and any(
            self.question.answer(other) is not None and verdict(self.question, other, answer) == "right"
            for other in self.others
        )


def asked(condition: Mapping[str, Any]) -> Asked:
    """The last question of a condition (``messages`` and ``images``, or ``prompt`` and ``images``), and what it is about: the
    picture that it names, the target of the condition's ``layout``, or the only picture.

    Raises:
        UserError: no question of this world, none of its pictures, or no telling which picture is meant.
    """
    text = _last_text(condition)
    try:
        question = parse(text)
    except ValueError as error:
        raise UserError(f"the judge 'scenes': {error}") from error
    scenes = [see(picture) for picture in _pictures(condition)]
    named = _INDEX.findall(text.lower())
    targets = [int(named[-1]) - 1] if named else list((condition.get("layout") or {}).get("targets", range(len(scenes))))
    if len(targets) != 1 or not 0 <= targets[0] < len(scenes):
        raise UserError(
            f"the judge 'scenes': {len(scenes)} picture(s), and the question {text[-100:]!r} names none of them; ask with "
            "'In Image2, ...' or give one picture"
        )
    others = tuple(scene for place, scene in enumerate(scenes) if place != targets[0])
    if question.answer(scenes[targets[0]]) is None:
        raise UserError(
            f"the judge 'scenes': {text[-100:]!r} has no single answer for a picture of {', '.join(scenes[targets[0]].names)}"
        )
    return Asked(question, scenes[targets[0]], others)


def _last_text(condition: Mapping[str, Any]) -> str:
    messages = condition.get("messages")
    if messages is None:
        return str(condition.get("prompt", ""))
    users = [message for message in messages if message["role"] == "user"]
    content = users[-1]["content"] if users else ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _pictures(condition: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures one by one, cut out of a collage where the layout says that they are in one. What is behind a picture in a
    picture is not seen, since it is covered."""
    images = [_opened(picture, place) for place, picture in enumerate(condition.get("images") or (), start=1)]
    layout = condition.get("layout") or {}
    places = layout.get("places")
    if not places:
        return images
    if layout.get("format") == "picture_in_picture":
        places = places[:1]
    return [images[place["image"]].crop(tuple(place["box"])) for place in places]


def _opened(picture: Any, place: int) -> Image.Image:
    """A picture as a row may hold it: open already, the bytes of a file, or a store's struct of bytes and path."""
    content = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if not content or not isinstance(content, bytes | Image.Image):
        path = picture.get("path") if isinstance(picture, Mapping) else None
        found = f"only the path {path!r}" if path else f"{type(content).__name__}"
        raise UserError(f"the judge 'scenes': image {place}: expected a picture or the bytes of one, found {found}")
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f"the judge 'scenes': image {place}: {error}") from error


class ScenesJudge:
    """The exact judge: 1 for a right answer, 0 for a wrong one, -1 for one that tells of what is not in the picture."""

    name = "scenes"
    version = "1"
    broken_below = 0.0  # a lower score is a hallucination: the report counts these
    broken_word = "hallucinated"
    right_from = 1.0

    scores: Mapping[str, float] = {"right": 1.0, "wrong": 0.0, "hallucinated": -1.0}

    def refuse(self, condition: Mapping[str, Any]) -> Asked:
        """What the condition asks, and about which scene.

        Raises:
            UserError: a question or a picture that is not of this world.
        """
        return asked(condition)

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        """Raises:
        UserError: a question or a picture that is not of this world.
        """
        pairs = zip(conditions, outputs, strict=True)
        return [self.scores[self.refuse(condition).verdict(output)] for condition, output in pairs]
