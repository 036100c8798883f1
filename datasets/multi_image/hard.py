"""Two levels above MIA-DPO's, whose questions always name the one image to look at: :func:`compare` names two, :func:`search`
none. The levels are those of S2H-DPO (arXiv 2604.18512), which had its questions written by a large model; here they are made
from single-image data by rule, so that the right answer is known: from questions that the data ask of several pictures.

Level 2: "Compare Image1 and Image3: what colour is the bus? Answer for each image and say whether the answers agree." The
answer: "Image1: red. Image3: blue. They differ." Half of the pairs agree, as far as the data have such. Wrong by construction:
the two answers exchanged, another picture's answer, the other verdict.

Level 3: "For one of the images the answer to the question "What colour is the bus?" is "red". Which image is it?" The
answer: "Image3". The images beside have another answer to the same question. Wrong by construction: every other image's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.randomness import permutation
from polyalign.datasets.multi_image import grid, sequence
from polyalign.datasets.multi_image.drawing import Rows, check_counts, drawn_others, keyed, limited, shares
from polyalign.datasets.multi_image.named import finished, lowered
from polyalign.datasets.multi_image.rows import asked
from polyalign.datasets.multi_image.sources import Item, Questions, plain

Format = Literal["sequence", "grid"]
ARRANGED = {"sequence": sequence.arranged, "grid": grid.arranged}
COUNTS: Mapping[str, Mapping[int, float]] = {"sequence": sequence.COUNTS, "grid": grid.COUNTS}
NUMBERS = {"sequence": tuple(sequence.NUMBERS), "grid": tuple(grid.SHAPES)}

CONSIDERED = 256
"""Other pictures with the same question that are looked at for one row: some questions are asked of tens of thousands."""


@dataclass(frozen=True)
class Group:
    """A question that one source asks of several pictures, and the answer for each."""

    pictures: tuple[str, ...]
    answers: tuple[str, ...]
    plain: tuple[str, ...]
    words: tuple[frozenset[str], ...]

    def apart(self, first: int, second: int) -> bool:
        """Whether two answers are sure to say different things: neither has all the words of the other, as "red" and "dark
        red" do."""
        one, other = self.words[first], self.words[second]
        return not (one <= other or other <= one)


@dataclass(frozen=True)
class Known:
    """One picture of a group, and the entry that asks the question of it."""

    item: Item
    turn: int
    group: Group
    place: int

    @property
    def key(self) -> str:
        return f"{self.item.number:08d}-{self.turn}"

    @property
    def bare(self) -> str:
        """The question without instructions of how to answer it, which LLaVA's data have in a second line; it ends with a
        mark."""
        question = self.item.turns[self.turn].question
        first = question.split("\n")[0].rstrip()
        bare = first if first.endswith("?") else question
        return bare if bare.endswith(("?", ".", "!")) else f"{bare}?"

    @property
    def answer(self) -> str:
        return self.group.answers[self.place]

    def others(self, seed: int) -> list[int]:
        """Other places of the group, in random order, all or as many as are considered."""
        size = len(self.group.pictures)
        return drawn_others(keyed(seed, "others of " + self.key, 0), size, (self.place,), min(size - 1, CONSIDERED))

    def differing(self, seed: int) -> list[int]:
        """Of those, the places whose answer is sure to say another thing."""
        return [place for place in self.others(seed) if self.group.apart(self.place, place)]

    def agreeing(self, seed: int) -> list[int]:
        """Of those, the places whose answer is the same."""
        return [place for place in self.others(seed) if self.group.plain[place] == self.group.plain[self.place]]


@dataclass(frozen=True)
class HardPlan:
    """One row before any picture is opened."""

    known: Known
    pictures: tuple[str, ...]
    targets: tuple[int, ...]
    answers: tuple[str, ...] = ()
    """Of the targets."""

    third: tuple[str, ...] = ()
    """An answer that is neither's, if there is one."""

    @property
    def item(self) -> Item:
        return self.known.item

    @property
    def key(self) -> str:
        return self.known.key


def shared_questions(questions: Questions) -> list[Known]:
    """Every question that the data ask of several pictures of a source, once for each, in the order of the file. A picture of
    which it is asked several times counts once, and not at all if the answers differ."""
    entries: dict[tuple[str, str], dict[str, tuple[Item, int, str]]] = {}
    for item in questions.items:
        for turn, asked_now in enumerate(item.turns):
            question = plain(asked_now.question)
            answer = questions.answers[item.picture, question]
            if answer is not None:
                entries.setdefault((item.source, question), {}).setdefault(item.picture, (item, turn, answer))
    found: list[Known] = []
    for members in entries.values():
        if len(members) > 1:
            answers = tuple(answer for _, _, answer in members.values())
            same = tuple(plain(answer) for answer in answers)
            words = tuple(frozenset(answer.replace(",", " ").split()) for answer in same)
            group = Group(tuple(members), answers, same, words)
            found += [Known(item, turn, group, place) for place, (item, turn, _) in enumerate(members.values())]
    return sorted(found, key=lambda one: one.key)


def compare(
    questions: Questions,
    *,
    seed: int,
    arrangement: Format = "sequence",
    counts: Mapping[int, float] | None = None,
    limit: int | None = None,
) -> Rows:
    """Level 2: a question that two named images have to be compared for.

    Args:
        arrangement: the images one after another, or in a collage.
        counts: shares of the numbers of images; None is the arrangement's own.
        limit: at most so many rows.

    Raises:
        UserError: no question is asked of two pictures, or counts that are not possible.
    """
    known = [
        (one, len(questions.pictures[one.item.source]))
        for one in shared_questions(questions)
        if one.agreeing(seed) or one.differing(seed)
    ]
    chosen = _numbered(questions, known, "compare", arrangement, counts, seed, limit)
    plans = [_compared(questions, one, number, seed) for one, number in chosen]

    def compose(plan: HardPlan, pictures: list[Image.Image]) -> dict[str, Any]:
        shown = ARRANGED[arrangement](pictures)
        first, second = (f"Image{target + 1}" for target in plan.targets)
        words = f"Compare {first} and {second}: {lowered(plan.known.bare)} Answer for each image and say whether the "
        agree = plain(plan.answers[0]) == plain(plan.answers[1])
        right = _comparison((first, second), plan.answers, agree)
        wrong = [
            *([] if agree else [_comparison((first, second), plan.answers[::-1], False)]),
            *(_comparison((first, second), (plan.answers[0], third), False) for third in plan.third),
            _comparison((first, second), plan.answers, not agree),
        ]
        messages = [asked(shown, words + "answers agree.")]
        return finished(messages, shown, plan.targets, 2, right, wrong)

    return Rows(f"compare-{arrangement}", questions, plans, compose)


def search(
    questions: Questions,
    *,
    seed: int,
    arrangement: Format = "sequence",
    counts: Mapping[int, float] | None = None,
    limit: int | None = None,
) -> Rows:
    """Level 3: which of the images has this answer; the arguments as in :func:`compare`.

    Raises:
        UserError: no question has different answers for enough pictures, or counts that are not possible.
    """
    known = [(one, 1 + len(one.differing(seed))) for one in shared_questions(questions)]
    chosen = _numbered(questions, known, "search", arrangement, counts, seed, limit)
    plans = [_searched(one, number, seed) for one, number in chosen]

    def compose(plan: HardPlan, pictures: list[Image.Image]) -> dict[str, Any]:
        shown = ARRANGED[arrangement](pictures)
        (target,) = plan.targets
        words = f'For one of the images the answer to the question "{plan.known.bare}" is "{plan.known.answer}". '
        names = [f"Image{number}" for number in range(1, len(pictures) + 1)]
        messages = [asked(shown, words + "Which image is it?")]
        return finished(messages, shown, plan.targets, 3, names[target], names)

    return Rows(f"search-{arrangement}", questions, plans, compose)


def _numbered(
    questions: Questions,
    known: Sequence[tuple[Known, int]],
    kind: str,
    arrangement: Format,
    counts: Mapping[int, float] | None,
    seed: int,
    limit: int | None,
) -> list[tuple[Known, int]]:
    """Each usable question with its number of images. The quotas are filled from the largest number on, by questions that have
    so many pictures; what is wanting there goes to smaller numbers."""
    if arrangement not in ARRANGED:
        raise UserError(f"arrangement: one of {', '.join(ARRANGED)}, found {arrangement!r}")
    wanted = COUNTS[arrangement] if counts is None else counts
    check_counts(wanted, NUMBERS[arrangement], f"a {arrangement}")
    numbers = sorted(number for number, share in wanted.items() if share > 0)
    shares(wanted, 0)  # refuses shares that are none
    usable = [one for one in known if one[1] >= numbers[0]]
    if not usable:
        raise UserError(
            f"{questions.folder}: no question is asked of {numbers[0]} pictures of one source"
            f"{' with answers that differ' if kind == 'search' else ''} ({len(questions.items)} entries). This level needs "
            "data that ask the same of many pictures, as VQA does"
        )
    usable = limited(usable, limit, seed, kind)
    left = [usable[place] for place in permutation(seed, len(usable), kind, arrangement, "counts")]
    quotas = shares(wanted, len(usable))
    given: list[tuple[Known, int]] = []
    for number in reversed(numbers):
        fit = [one for one in left if one[1] >= number]
        taken = fit if number == numbers[0] else fit[: quotas[number]]
        chosen = {id(one) for one in taken}
        left = [one for one in left if id(one) not in chosen]
        given += [(one[0], number) for one in taken]
    return sorted(given, key=lambda one: one[0].key)


def _compared(questions: Questions, known: Known, number: int, seed: int) -> HardPlan:
    """A second picture with the question: by a coin one that agrees or one that differs, if there is such."""
    draws = keyed(seed, "compare " + known.key, number)
    agreeing, differing, answers = known.agreeing(seed), known.differing(seed), known.group.answers
    second = (agreeing if agreeing and (draws.integers(2) or not differing) else differing)[0]
    own, other = known.item.picture, known.group.pictures[second]
    pool, where = questions.pictures[known.item.source], questions.places[known.item.source]
    beside = [pool[place] for place in drawn_others(draws, len(pool), (where[own], where[other]), number - 2)]
    order = draws.permutation(number).tolist()
    shown = tuple((own, other, *beside)[place] for place in order)
    third = next((answers[place] for place in differing if known.group.apart(second, place)), None)
    pair = (known.answer, answers[second])
    return HardPlan(known, shown, (order.index(0), order.index(1)), pair, () if third is None else (third,))


def _searched(known: Known, number: int, seed: int) -> HardPlan:
    beside = [known.group.pictures[place] for place in known.differing(seed)[: number - 1]]
    slot = int(keyed(seed, "search " + known.key, number).integers(number))
    return HardPlan(known, (*beside[:slot], known.item.picture, *beside[slot:]), (slot,))


def _comparison(names: Sequence[str], answers: Sequence[str], agree: bool) -> str:
    said = " ".join(f"{name}: {answer.rstrip('.')}." for name, answer in zip(names, answers, strict=True))
    return f"{said} They {'agree' if agree else 'differ'}."
