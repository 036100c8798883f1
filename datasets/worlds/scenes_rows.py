"""Rows, folders of questions and benchmarks of the world `scenes`.

With several pictures a question names one of them, and none of the others has the same answer: whoever looks at another picture
is wrong, and one picked by chance of n is right in 1 of n.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from polyalign.core.randomness import seed_of
from polyalign.datasets.multi_image import sequence
from polyalign.datasets.multi_image.hard import ARRANGED, Format
from polyalign.datasets.multi_image.named import finished, lowered
from polyalign.datasets.multi_image.rows import Arrangement
from polyalign.datasets.multi_image.rows import asked as asking
from polyalign.datasets.multi_image.sources import FILE
from polyalign.datasets.worlds import scene_files, scenes
from polyalign.datasets.worlds.scenes import Scene
from polyalign.datasets.worlds.scenes_questions import ABOUT_ONE_OF_SEVERAL, TASKS, Question, alike, ask

MOST_PICTURES = 4
POPE_SPLITS = ("random", "adversarial")


@dataclass(frozen=True)
class Exercise:
    """A question about one of some scenes; ``words`` is its text without the name of the picture."""

    scenes: tuple[Scene, ...]
    target: int
    question: Question
    words: str

    @property
    def scene(self) -> Scene:
        return self.scenes[self.target]

    @property
    def answer(self) -> str:
        answer = self.question.answer(self.scene)
        assert answer is not None
        return answer

    def opening(self) -> str:
        """The question as it is asked: of several pictures one is named, as MIA-DPO names it."""
        return self.words if len(self.scenes) == 1 else f"In Image{self.target + 1}, {lowered(self.words)}"


def exercise(split: str | None, pictures: int, draws: random.Random, tasks: Sequence[str] = TASKS) -> Exercise:
    """One exercise: one of ``tasks`` evenly (a task named twice comes twice as often), scenes of one split.

    Raises:
        ValueError: another split, a task that is not known, or not 1 to 4 pictures.
    """
    allowed = TASKS if pictures == 1 else ABOUT_ONE_OF_SEVERAL
    usable = [task for task in tasks if task in allowed]
    if not usable or not set(tasks) <= set(TASKS) or not 1 <= pictures <= MOST_PICTURES:
        raise ValueError(
            f"the world 'scenes' asks {', '.join(allowed)} about {pictures} picture(s), and has 1 to {MOST_PICTURES} pictures; "
            f"found the tasks {', '.join(tasks)}"
        )
    task = draws.choice(usable)
    while True:
        own = scenes.scene(split, draws)
        question = ask(own, task, draws)
        if question is not None:
            break
    answer, others = question.answer(own), []
    for _ in range(pictures - 1):
        other = own
        while question.answer(other) in (None, answer):
            other = scenes.scene(split, draws)
        others.append(other)
    target = draws.randrange(pictures)
    return Exercise((*others[:target], own, *others[target:]), target, question, question.text(draws))


def row_of(one: Exercise, key: str, format: Format = "sequence") -> dict[str, Any]:
    """A row as :mod:`polyalign.datasets.multi_image.rows` describes it: the pictures one after another, or in a collage.
    ``condition["task"]`` is the task, ``confusions`` are the answers of the other pictures."""
    arrangement = _arranged([scene.draw() for scene in one.scenes], format)
    others = (one.question.answer(scene) for place, scene in enumerate(one.scenes) if place != one.target)
    wrong = [answer for answer in others if answer is not None]
    row = finished([asking(arrangement, one.opening())], arrangement, (one.target,), 1, one.answer, wrong)
    row["condition"]["task"] = one.question.task
    return {"pair_id": key, **row, "origin": {"source": "scenes"}}


def _arranged(pictures: Sequence[Image.Image], format: Format) -> Arrangement:
    """One picture stands alone; several have names."""
    if len(pictures) > 1:
        return ARRANGED[format](pictures)
    found = sequence.arranged(pictures)
    return Arrangement("single", found.images, found.opening[1:], found.places)


def rows(
    split: str, count: int, seed: int = 0, *, pictures: int = 1, tasks: Sequence[str] = TASKS, format: Format = "sequence"
) -> list[dict[str, Any]]:
    """``count`` rows of a split (``train`` or ``heldout``) with so many pictures each, the tasks in turn. The questions are the
    same in either format.

    Raises:
        ValueError: another split, a task that is not known, or not 1 to 4 pictures.
    """
    usable = [task for task in tasks if pictures == 1 or task in ABOUT_ONE_OF_SEVERAL] or list(tasks)
    found = []
    for index in range(count):
        draws = random.Random(seed_of(seed, "scenes", split, pictures, index))
        one = exercise(split, pictures, draws, (usable[index % len(usable)],))
        found.append(row_of(one, f"scenes-{split}-{pictures}-{index:06d}", format))
    return found


def write_questions(
    folder: str | Path, split: str, pictures: int, seed: int = 0, *, tasks: Sequence[str] = ABOUT_ONE_OF_SEVERAL
) -> Path:
    """Write ``pictures`` pictures of a split, each with one question of each task that it allows, as
    :func:`polyalign.datasets.multi_image.sources.read_questions` reads them. Returns the folder."""
    folder = Path(folder)
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str]] = []
    for index in range(pictures):
        draws = random.Random(seed_of(seed, "scenes questions", split, index))
        scene = scenes.scene(split, draws)
        name = f"scenes/{index:05d}.png"
        scene.draw().save(folder / name)
        for question in (ask(scene, task, draws) for task in tasks):
            if question is not None:
                answer = question.answer(scene)
                assert answer is not None
                lines.append({"image": name, "question": question.text(draws), "answer": answer})
    scene_files.write_lines(folder / FILE, lines)
    return folder


# --- benchmarks --------------------------------------------------------------------------------------------------------------


def pope(split: str, pictures: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """POPE's rows (arXiv 2305.10355) by its split, each with its ``picture``: for every picture and POPE split an object that
    is there and one that is not, drawn from all of the world (random), or from those that share shape or colour with one that
    is there (adversarial, in the place of objects that often occur together)."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in POPE_SPLITS}
    for index in range(pictures):
        draws = random.Random(seed_of(seed, "scenes pope", split, index))
        scene = scenes.scene(split, draws)
        image, picture = f"{index:05d}.png", scene.draw()
        for kind, lines in found.items():
            absent = (
                alike(scene.names) if kind == "adversarial" else [name for name in scenes.OBJECTS if name not in scene.names]
            )
            there, missing = (Question("exists", name).text() for name in (draws.choice(scene.names), draws.choice(absent)))
            lines += scene_files.pope_pair(len(lines) + 1, image, picture, there, missing)
    return found


def captions(split: str, pictures: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pictures to be captioned, for CHAIR: {"image", "picture", "text" (what is asked), "objects", "reference"}."""
    found = []
    for index in range(pictures):
        scene = scenes.scene(split, random.Random(seed_of(seed, "scenes captions", split, index)))
        question = Question("what")
        given: Mapping[str, Any] = {"image": f"{index:05d}.png", "picture": scene.draw(), "text": question.text()}
        found.append({**given, "objects": list(scene.names), "reference": question.answer(scene)})
    return found


def write_benchmarks(folder: str | Path, split: str, pictures: int, seed: int = 0) -> Path:
    """Write ``pope/`` (``scenes_pope_random.json`` and the like) and ``chair/`` with their pictures; every object has one name.
    See :func:`polyalign.datasets.worlds.scene_files.write_benchmarks`. Returns the folder."""
    synonyms = [(name,) for name in scenes.OBJECTS]
    made = pope(split, pictures, seed), captions(split, pictures, seed)
    return scene_files.write_benchmarks(folder, "scenes", *made, synonyms)
