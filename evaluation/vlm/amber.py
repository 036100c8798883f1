"""AMBER (Wang et al., arXiv 2311.07397): hallucinations in descriptions, and yes/no questions on existence, attributes and
relations, without a model as a judge.

Files, as published: ``annotations.json`` ([{"id": 1, "type": "generative", "truth": [words], "hallu": [words]}, {"id": 1005,
"type": "discriminative-hallucination", "truth": "yes"}, ...]), ``relation.json`` (words that stand for a word),
``safe_words.txt`` (words that are never wrong), and, if there, ``query_all.json`` or ``query_*.json`` ([{"id", "image",
"query"}]) for the images that questions share. Answers have ``id`` and ``response``, in JSON lines or one list.

Descriptions (words of ``relation.json`` only; a word counts as often as it is said):

    CHAIR = words that nothing true stands for / words         Cover = true objects mentioned / true objects
    Hal   = descriptions with a wrong word / descriptions      Cog   = listed likely mistakes made / listed

as in the published code, where a mention of something that several true words share counts for the first of them. Questions
have **no** as the positive class. AMBER score = (1 - CHAIR + F1) / 2.

Differences to the published code: it takes nouns by nltk's tagger, so "an orange shirt" has no orange, while here every word
on the list is a mention; it joins a word with a listed one where the cosine of their spaCy vectors (``en_core_web_lg``) is
above 0.8, which is done here with ``--vectors FILE`` (such vectors as text) and left out without; it reads only "Yes" and "No"
with capitals (``--reader amber``); it adds 0.001 to denominators and computes F1 from rounded figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.binary import Reading, binary_counts, binary_estimates, read_differently, readings, unread
from polyalign.evaluation.vlm.figures import Estimate, Figure, Scores, Share, combined, estimates, seed_for
from polyalign.evaluation.vlm.mentions import Phrases
from polyalign.evaluation.vlm.sheets import (
    Question,
    Sheet,
    field_of,
    read_json,
    read_rows,
    read_text,
    simple_id,
    without_doubles,
)
from polyalign.evaluation.vlm.vectors import Vectors

OFFICIAL = "amber"
SIMILAR = 0.8
GENERATIVE = "generative"
PARTS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "attribute/state"),
    "discriminative-attribute-number": ("attribute", "attribute/number"),
    "discriminative-attribute-action": ("attribute", "attribute/action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
answer_id = simple_id()
Similar = Callable[[str, str], bool]


@dataclass(frozen=True)
class Lists:
    """``stands_for``: the words that may be said for a word; ``safe``: words that are never wrong."""

    stands_for: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]

    @property
    def words(self) -> frozenset[str]:
        return frozenset(self.stands_for).union(*self.stands_for.values())


@dataclass(frozen=True)
class Annotation:
    """What a picture has, and what models like to add to it."""

    truth: tuple[str, ...]
    likely: tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """One description: its words that are on the list, which of them are wrong, and which annotated words were reached."""

    words: tuple[str, ...]
    wrong: tuple[str, ...]
    covered: frozenset[int]
    likely_said: frozenset[int]


def describe(words: Sequence[str], annotation: Annotation, lists: Lists, similar: Similar | None = None) -> Described:
    """The published rules for one description's words.

    A word of the safe list is passed over. One that stands for a true word covers it; every other is looked for among the
    likely mistakes and is wrong, unless it is similar to a word that stands for a true one, which it covers then.
    """
    true = list(_standing(annotation.truth, lists))
    likely = list(_standing(annotation.likely, lists))
    wrong, covered, said = [], set(), set()
    for word in words:
        if word in lists.safe:
            continue
        if (place := _place(word, true, None)) is not None:
            covered.add(place)
            continue
        for way in (None, similar):
            if (place := _place(word, likely, way)) is not None:
                said.add(place)
        if similar is not None and (place := _place(word, true, similar)) is not None:
            covered.add(place)
        else:
            wrong.append(word)
    return Described(tuple(words), tuple(wrong), frozenset(covered), frozenset(said))


def _standing(annotated: Sequence[str], lists: Lists) -> Iterator[tuple[str, int]]:
    """(word, place of the annotated word it stands for), in the order in which the published code looks: what stands for
    them first, then they themselves."""
    for place, word in enumerate(annotated):
        yield from ((other, place) for other in lists.stands_for[word])
    yield from ((word, place) for place, word in enumerate(annotated))


def _place(word: str, standing: Sequence[tuple[str, int]], similar: Similar | None) -> int | None:
    return next((place for other, place in standing if (similar(word, other) if similar else word == other)), None)


def read(folder: Path) -> Sheet:
    """AMBER's files.

    Raises:
        UserError: one is absent or not what it should be.
    """
    paths = [folder / name for name in ("annotations.json", "relation.json", "safe_words.txt")]
    relation = read_json(paths[1], "AMBER's relations")
    if not isinstance(relation, dict) or not all(isinstance(others, list) for others in relation.values()):
        raise UserError(f"{paths[1]}: an object of lists of words is expected")
    stands_for = {word.lower(): tuple(str(other).lower() for other in others) for word, others in relation.items()}
    safe = frozenset(line.strip().lower() for line in read_text(paths[2], "AMBER's safe words").splitlines() if line.strip())
    queries = sorted(path for pattern in ("query_*.json", "query/query_*.json") for path in folder.glob(pattern))
    known = {str(row.get("id")): row for path in queries for _, row in read_rows(path, "AMBER's queries")}
    rows = read_rows(paths[0], "AMBER's annotations")
    questions = [_question(row, where, stands_for, known) for where, row in rows]
    notes = () if queries else ("no query_*.json: every question is taken as an image of its own, intervals are too narrow",)
    return Sheet(without_doubles(questions, paths[0]), (*paths, *queries), Lists(stands_for, safe), notes)


def _question(row: Mapping[str, Any], where: str, words: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> Question:
    name, kind = str(field_of(row, "id", where, (int, str))), field_of(row, "type", where)
    query = known.get(name, {})
    image, text = str(query.get("image", name)), str(query.get("query", ""))
    if kind == GENERATIVE:
        listed = [tuple(str(word).lower() for word in field_of(row, key, where, list)) for key in ("truth", "hallu")]
        strange = sorted({word for found in listed for word in found if word not in words})
        if strange:
            raise UserError(f"{where}: {strange[0]!r} is not in relation.json")
        return Question(name, Annotation(*listed), image, GENERATIVE, text, (image,))
    if kind not in PARTS:
        raise UserError(f"{where}: type is {kind!r}; allowed: {GENERATIVE}, {', '.join(PARTS)}")
    if (truth := field_of(row, "truth", where)) not in ("yes", "no"):
        raise UserError(f"{where}: truth is {truth!r}; allowed: yes, no")
    return Question(name, truth, image, kind, text, (image,))


def score(
    sheet: Sheet, said: Mapping[str, str], *, seed: int = 0, reader: str = "words", vectors: Path | None = None
) -> Scores:
    """Figures of the descriptions and of the questions, whichever were answered, and AMBER's own score from both."""
    described = [question for question in sheet.questions if question.group == GENERATIVE and question.id in said]
    asked = readings([question for question in sheet.questions if question.group != GENERATIVE], said, reader)
    groups: dict[str, dict[str, Figure]] = {}
    counts: dict[str, dict[str, int]] = {}
    parts: dict[str, dict[str, Estimate]] = {}
    notes = list(sheet.notes)
    if described:
        found = _described(described, said, sheet.material, vectors)
        parts[GENERATIVE] = _generative(described, found, seed)
        counts[GENERATIVE] = {"descriptions": len(found), "words": sum(len(one.words) for one in found)}
        if vectors is None:
            notes.append("without --vectors only listed words are joined: CHAIR and Hal come out higher, Cover lower")
    for name, members in _parts(asked).items():
        parts[name] = binary_estimates(members, positive="no", seed=seed_for(seed, name))
        counts[name] = binary_counts(members, positive="no")
    for name, estimated in parts.items():
        groups[name] = {figure: one.figure() for figure, one in estimated.items()}
    if described and asked:
        both = combined([parts["discriminative"]["f1"], _negative(parts[GENERATIVE]["chair"])], 0.5)
        groups["overall"] = {"amber_score": both.figure()}
    if differ := read_differently(asked, said, OFFICIAL):
        notes.append(f"{differ} of {len(asked)} answers are read in another way by AMBER's own scorer (--reader {OFFICIAL})")
    return Scores(groups, counts, unread(asked), notes)


def _described(questions: Sequence[Question], said: Mapping[str, str], lists: Lists, vectors: Path | None) -> list[Described]:
    phrases = Phrases({word: word for word in lists.words})
    similar = None if vectors is None else _similar(Vectors(vectors, lists.words))
    return [
        describe([word for word, _ in phrases.find(said[question.id])], question.truth, lists, similar)
        for question in questions
    ]


def _similar(vectors: Vectors) -> Similar:
    return lambda first, second: vectors.similarity(first, second) > SIMILAR


def _generative(questions: Sequence[Question], found: Sequence[Described], seed: int) -> dict[str, Estimate]:
    columns = {
        "words": [float(len(one.words)) for one in found],
        "wrong": [float(len(one.wrong)) for one in found],
        "covered": [float(len(one.covered)) for one in found],
        "true": [float(len(question.truth.truth)) for question in questions],
        "said": [float(len(one.likely_said)) for one in found],
        "likely": [float(len(question.truth.likely)) for question in questions],
        "with_wrong": [float(bool(one.wrong)) for one in found],
        "descriptions": [1.0] * len(found),
    }
    formulas = {
        "chair": Share("wrong", "words"),
        "cover": Share("covered", "true"),
        "hal": Share("with_wrong", "descriptions"),
        "cog": Share("said", "likely"),
    }
    return estimates(columns, formulas, clusters=[one.cluster for one in questions], seed=seed_for(seed, GENERATIVE))


def _parts(asked: Sequence[Reading]) -> dict[str, list[Reading]]:
    found: dict[str, list[Reading]] = {}
    for one in asked:
        for name in ("discriminative", *PARTS[one.question.group]):
            found.setdefault(name, []).append(one)
    return found


def _negative(one: Estimate) -> Estimate:
    """1 - CHAIR."""
    return Estimate(1 - one.value, 1 - one.draws, one.rows, one.clusters)
