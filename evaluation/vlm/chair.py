"""CHAIR (Rohrbach et al., arXiv 1809.02156): objects that captions mention and that are not in the picture.

    CHAIR_i = hallucinated mentions / mentions of objects        CHAIR_s = captions with one / captions
    recall  = objects of the pictures that are mentioned / objects of the pictures

Two kinds of folders:

- ``objects.json`` ({image: [objects]}) or ``objects.jsonl`` ({"image", "objects"}), for any set of pictures, with
  ``synonyms.txt`` where objects have other names. Without it the objects named for some picture are the ones looked for.
- COCO's ``instances_*.json`` and ``captions_*.json`` with ``synonyms.txt``: an image's objects are those of its segmentations
  and those that its own captions name, both, as published.

``synonyms.txt`` is the published list's format: a line an object, its names separated by commas, the first one its own.

Captions are answers whose id is the image's (for COCO its number). Differences to the published code: words are cut by a
pattern and made singular with the list itself (:mod:`polyalign.evaluation.vlm.mentions`), not by nltk and pattern; names of
three words are one mention too. Kept: "baby" or "adult" before an animal and "passenger" before a vehicle are no person, a
train track is no train, and a toilet's seat no chair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm import coco
from polyalign.evaluation.vlm.figures import Scores, Share, figures, seed_for
from polyalign.evaluation.vlm.mentions import Phrases, words_of
from polyalign.evaluation.vlm.sheets import (
    Question,
    Sheet,
    field_of,
    only_file,
    read_json,
    read_rows,
    read_text,
    simple_id,
    without_doubles,
)

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
NO_OBJECTS = ("home plate", "train track")
answer_id = simple_id("image_id")


@dataclass(frozen=True)
class Objects:
    """The objects that are looked for: their own names by every name they have."""

    names: Mapping[str, str]

    def phrases(self) -> Phrases:
        """With the published rules for words that mean something else beside others; each holds where its words are names."""
        meanings: dict[str, str | None] = dict.fromkeys(NO_OBJECTS)
        for before, kinds in (("baby", ANIMALS), ("adult", ANIMALS), ("passenger", VEHICLES)):
            meanings |= {f"{before} {kind}": self.names.get(kind) for kind in kinds}
        if "toilet" in self.names:
            meanings["toilet seat"] = self.names["toilet"]
        return Phrases(meanings | dict(self.names))


def mentioned(text: str, phrases: Phrases) -> list[str]:
    """The object of every mention, as often as it is mentioned."""
    found = phrases.find(text)
    said = {phrase for phrase, _ in found}
    toilet = "toilet" in said or "toilet seat" in said
    return [meaning for phrase, meaning in found if not (toilet and phrase == "seat")]


def read_synonyms(path: Path) -> dict[str, str]:
    """Every name's object.

    Raises:
        UserError: unreadable, without names, or a name on two lines.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "the list of synonyms").splitlines(), start=1):
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        for name in names:
            if found.setdefault(name, names[0]) != names[0]:
                raise UserError(f"{path}: line {number}: {name!r} is a name of {found[name]!r} already")
    if not found:
        raise UserError(f"{path}: names no objects; a line is like 'dog, puppy, hound'")
    return found


def read(folder: Path) -> Sheet:
    """Pictures with their objects, as the top of this file says.

    Raises:
        UserError: neither kind of folder, or a file that is not what it should be.
    """
    if list(folder.glob("objects.json*")):
        return _read_objects(folder)
    return _read_coco(folder)


def _read_objects(folder: Path) -> Sheet:
    path = only_file(folder, ("objects.json", "objects.jsonl"), "objects by image")
    if path.suffix == ".json":
        listed = read_json(path, "objects by image")
        if not isinstance(listed, dict):
            raise UserError(f"{path}: an object of lists by image is expected, found {type(listed).__name__}")
        rows: list[tuple[str, str, Any]] = [(f"{path}: image {image!r}", image, objects) for image, objects in listed.items()]
    else:
        given = read_rows(path, "objects by image")
        rows = [(w, str(field_of(row, "image", w, (str, int))), row.get("objects")) for w, row in given]
    truths = {image: _object_names(objects, where) for where, image, objects in rows}
    if len(truths) != len(rows):
        raise UserError(f"{path}: an image is listed twice")
    synonyms = folder / "synonyms.txt"
    files = (path, synonyms) if synonyms.is_file() else (path,)
    names = read_synonyms(synonyms) if synonyms.is_file() else {one: one for objects in truths.values() for one in objects}
    strange = sorted({one for objects in truths.values() for one in objects if one not in names})
    if strange:
        raise UserError(f"{path}: {len(strange)} objects are not in {synonyms.name}, such as {strange[0]!r}")
    known = {image: frozenset(names[one] for one in objects) for image, objects in truths.items()}
    return Sheet(_questions(known, path), files, Objects(names))


def _object_names(objects: Any, where: str) -> list[str]:
    if not isinstance(objects, list) or not all(isinstance(one, str) and one.strip() for one in objects):
        raise UserError(f"{where}: a list of names of objects is expected, found {objects!r}")
    return [" ".join(words_of(one)) for one in objects]


def _read_coco(folder: Path) -> Sheet:
    instances, captions = (sorted(folder.glob(f"{kind}_*.json")) for kind in ("instances", "captions"))
    synonyms = folder / "synonyms.txt"
    if not instances or not captions or not synonyms.is_file():
        raise UserError(
            f"{folder}: objects.json(l), or COCO's instances_*.json and captions_*.json with synonyms.txt are expected there"
        )
    objects = Objects(read_synonyms(synonyms))
    phrases = objects.phrases()
    truths: dict[str, set[str]] = {}
    for path in instances:
        for image, name in _segmented(path, objects.names):
            truths.setdefault(image, set()).add(name)
    for path in captions:
        for image, caption in coco.captions(path):
            truths.setdefault(image, set()).update(mentioned(caption, phrases))
    known = {image: frozenset(found) for image, found in truths.items()}
    return Sheet(_questions(known, folder), (*instances, *captions, synonyms), objects)


def _segmented(path: Path, names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for image, category in coco.instances(path):
        if category.lower() not in names:
            raise UserError(f"{path}: the category {category!r} is not in synonyms.txt")
        yield image, names[category.lower()]


def _questions(truths: Mapping[str, frozenset[str]], path: Path) -> tuple[Question, ...]:
    return without_doubles([Question(image, found, cluster=image, images=(image,)) for image, found in truths.items()], path)


def columns_of(captions: Sequence[tuple[Sequence[str], frozenset[str], int]]) -> dict[str, list[float]]:
    """Sums' columns from each caption's mentions, its picture's objects, and its length in words."""
    wrong = [sum(name not in truth for name in found) for found, truth, _ in captions]
    return {
        "captions": [1.0] * len(captions),
        "mentions": [float(len(found)) for found, _, _ in captions],
        "wrong": [float(count) for count in wrong],
        "with_wrong": [float(count > 0) for count in wrong],
        "covered": [float(len(truth & set(found))) for found, truth, _ in captions],
        "objects": [float(len(truth)) for _, truth, _ in captions],
        "words": [float(length) for _, _, length in captions],
    }


FORMULAS = {
    "chair_i": Share("wrong", "mentions"),
    "chair_s": Share("with_wrong", "captions"),
    "recall": Share("covered", "objects"),
}


def score(sheet: Sheet, said: Mapping[str, str], *, seed: int = 0) -> Scores:
    """CHAIR_i, CHAIR_s, recall, and how long captions are (words) and how many objects they mention; intervals over images.

    Longer captions mention more and err more, so figures compare at like lengths only.
    """
    phrases = sheet.material.phrases()
    rows = []
    for question in sheet.questions:
        if question.id in said:
            text = said[question.id]
            length = sum(word[0].isalnum() for word in words_of(text))
            rows.append((mentioned(text, phrases), question.truth, length))
    columns = columns_of(rows)
    formulas = {
        **FORMULAS,
        "words_per_caption": lambda sums: sums["words"] / sums["captions"],
        "mentions_per_caption": lambda sums: sums["mentions"] / sums["captions"],
    }
    counts = {name: int(sum(columns[name])) for name in ("captions", "mentions", "wrong", "covered", "objects")}
    return Scores({"all": figures(columns, formulas, seed=seed_for(seed, "chair"))}, {"all": counts})
