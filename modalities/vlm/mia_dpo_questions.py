"""The questions that MIA-DPO's pairs are made of: rows of :mod:`polyalign.datasets.multi_image`, one at a time, each alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.randomness import permutation, seed_of
from polyalign.datasets.multi_image import grid, hard, picture_in_picture, sequence
from polyalign.datasets.multi_image.drawing import Plan, Rows, limited, shares
from polyalign.datasets.multi_image.named import finished
from polyalign.datasets.multi_image.rows import Arrangement, asked
from polyalign.datasets.multi_image.sources import Item, Questions, Turn, plain, read_questions
from polyalign.datasets.worlds import scenes, scenes_questions
from polyalign.datasets.worlds.scenes_questions import ABOUT_ONE_OF_SEVERAL, TASKS
from polyalign.datasets.worlds.scenes_rows import Exercise, exercise, row_of
from polyalign.modalities.vlm.mia_dpo_config import MultiImageConfig

Row = dict[str, Any]
SINGLE = "single"


class Source(Protocol):
    """Questions with their right answers."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """One question: ``condition``, ``chosen``, ``confusions``. Raises UserError for a picture that cannot be used."""
        ...

    def right(self, row: Row, answer: str) -> bool:
        """Whether an answer is right."""
        ...

    @property
    def conversations(self) -> int:
        """How many entries have several turns."""
        ...

    def inputs(self) -> dict[str, Any]:
        """As JSON, what tells these questions from others made with the same configuration."""
        ...


def source_of(config: MultiImageConfig, seed: int) -> Source:
    """The questions that a configuration asks for.

    Raises:
        UserError: data that cannot be used, or numbers of images that are not possible with them.
    """
    return OfTheWorld(config, seed) if config.world is not None else OfAFile(config, seed)


def alone(picture: Image.Image) -> Arrangement:
    """A picture by itself, without a name."""
    found = sequence.arranged([picture])
    return Arrangement(SINGLE, found.images, found.opening[1:], found.places)


class OfTheWorld:
    """Questions of the world `scenes`, of its training pictures. An answer is right if the world's exact judge says so."""

    def __init__(self, config: MultiImageConfig, seed: int):
        assert config.count is not None
        self.seed = seed
        self.tasks = ABOUT_ONE_OF_SEVERAL if config.tasks is None else config.tasks
        several = config.single < 1
        if not set(self.tasks) <= set(TASKS) or (several and not set(self.tasks) & set(ABOUT_ONE_OF_SEVERAL)):
            raise UserError(
                f"tasks: the world 'scenes' asks {', '.join(ABOUT_ONE_OF_SEVERAL)} about one of several pictures, of one alone "
                f"{', '.join(TASKS)}; found {', '.join(self.tasks) or 'none'}"
            )
        weights = {(SINGLE, 1): config.single}
        total = sum(share for given in config.shares.values() for share in given.values())
        for name, given in config.shares.items():
            weights |= {(name, number): (1 - config.single) * share / total for number, share in given.items()}
        kinds = list(weights)
        quotas = shares(dict(enumerate(weights.values())), config.count)
        drawn = [kinds[place] for place, quota in quotas.items() for _ in range(quota)]
        self.kinds = [drawn[place] for place in permutation(seed, len(drawn), "mia_dpo", "order")]

    def __len__(self) -> int:
        return len(self.kinds)

    def row(self, index: int) -> Row:
        name, number = self.kinds[index]
        draws = random.Random(seed_of(self.seed, "mia_dpo", "scenes", index))
        one = exercise("train", number, draws, self.tasks)
        key = f"scenes-{name}-{number}-{index:06d}"
        if name != SINGLE:
            return row_of(one, key, "grid" if name == "grid" else "sequence")
        row = row_of(one, key)
        row["confusions"] = [_of_another(one, draws)]
        return row

    def right(self, row: Row, answer: str) -> bool:
        return scenes_questions.asked(row["condition"]).verdict(answer) == "right"

    @property
    def conversations(self) -> int:
        return 0

    def inputs(self) -> dict[str, Any]:
        return {"world": "scenes", "tasks": list(self.tasks)}


def _of_another(one: Exercise, draws: random.Random) -> str:
    """The answer to the same question that is right of another picture."""
    while True:
        found = one.question.answer(scenes.scene("train", draws))
        if found is not None and found != one.answer:
            return found


class OfAFile:
    """Questions of single-image data, each part by its own builder. An answer is right if it is the data's, apart from case,
    spaces, marks at the end and an article in front."""

    def __init__(self, config: MultiImageConfig, seed: int):
        assert config.questions is not None
        self.questions = read_questions(config.questions, config.pictures, on_bad_row=config.on_bad_row)
        self.parts = _parts(self.questions, config, seed)
        places = [(part, place) for part, rows in enumerate(self.parts) for place in range(len(rows))]
        self.places = [places[place] for place in permutation(seed, len(places), "mia_dpo", "order")]

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int) -> Row:
        part, place = self.places[index]
        return self.parts[part][place]

    def right(self, row: Row, answer: str) -> bool:
        return plain(answer) == plain(row["chosen"])

    @property
    def conversations(self) -> int:
        return sum(len(item.turns) > 1 for item in self.questions.items)

    def inputs(self) -> dict[str, Any]:
        """Pictures are told apart by name and size of the file."""
        return {"questions": self.questions.digest, "entries": len(self.questions.items)}


def _parts(questions: Questions, config: MultiImageConfig, seed: int) -> list[Rows]:
    """The rows of each part that has a share: formats, levels, single images."""
    count = len(questions.items) if config.count is None else config.count
    given = config.shares
    within = {name: sum(numbers.values()) for name, numbers in given.items()}
    harder = sum(config.levels.values())
    weights = {(name, ""): (1 - config.single - harder) * share / sum(within.values()) for name, share in within.items()}
    named = {name: within.get(name, 0.0) for name in hard.ARRANGED}
    for level, share in config.levels.items():
        weights |= {(name, level): share * part / sum(named.values()) for name, part in named.items()}
    weights[SINGLE, ""] = config.single
    quotas = shares(dict(enumerate(weights.values())), count)
    made = []
    for (name, level), quota in zip(weights, quotas.values(), strict=True):
        if quota:
            made.append(_part(questions, config, seed, name, level, quota))
    return made


def _part(questions: Questions, config: MultiImageConfig, seed: int, name: str, level: str, quota: int) -> Rows:
    across = config.across_sources
    if name == SINGLE:
        return _single(questions, seed, quota)
    counts: Mapping[int, float] = config.shares[name]
    if level:
        build = hard.compare if level == "compare" else hard.search
        arrangement: hard.Format = "grid" if name == "grid" else "sequence"
        return build(questions, seed=seed, arrangement=arrangement, counts=counts, limit=quota)
    if name == "picture_in_picture":
        return picture_in_picture.build(questions, seed=seed, limit=quota, across_sources=across)
    if name == "grid":
        items: Sequence[Item] = [item for item in questions.items if not picture_in_picture.has_box(item)]
        return grid.build(questions, seed=seed, counts=counts, limit=quota, across_sources=across, items=items)
    return sequence.build(questions, seed=seed, counts=counts, limit=quota, across_sources=across)


def _single(questions: Questions, seed: int, quota: int) -> Rows:
    """Questions of their own picture alone. Their confusions are answers that are right of other pictures, where the data ask
    the same of such."""
    others = {(one.item.number, one.turn): one for one in hard.shared_questions(questions)}
    plans = [Plan(item, (item.picture,), 0) for item in limited(questions.items, quota, seed, SINGLE)]

    def compose(plan: Plan, pictures: list[Image.Image]) -> Row:
        turn: Turn = plan.item.turns[0]
        known = others.get((plan.item.number, 0))
        wrong = [] if known is None else [known.group.answers[place] for place in known.differing(seed)[:1]]
        shown = alone(pictures[0])
        return finished([asked(shown, turn.question)], shown, (0,), 1, turn.answer, wrong)

    return Rows(SINGLE, questions, plans, compose)
