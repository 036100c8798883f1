"""MME (Fu et al., arXiv 2306.13394): two yes/no questions an image in 14 subtasks; a score is accuracy plus accuracy+.

Files: ``SUBTASK.txt`` (``existence.txt``, ``OCR.txt``, ...) of lines "image TAB question TAB Yes|No", as in the published
tool's results folders (a fourth column, an answer, is not read). An answer's id is ``existence/IMAGE/1`` or ``/2``, the first
or second of the image's questions in the file; or it has ``subtask``, ``image`` and ``number``.

    accuracy = right / questions    accuracy_plus = images with both right / images    score = 100 (accuracy + accuracy_plus)

Perception sums ten subtasks (at most 2,000), cognition four (at most 800). The published tool takes every two lines as one
image without comparing names, and reads the first four letters of an answer (``--reader mme``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.binary import Reading, binary_counts, read_differently, readings, unread
from polyalign.evaluation.vlm.figures import Estimate, Figure, Scores, Share, Sums, combined, estimates, seed_for
from polyalign.evaluation.vlm.sheets import Question, Sheet, read_text, simple_id, without_doubles

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OFFICIAL = "mme"
answer_id = simple_id("subtask", "image", "number")


def read(folder: Path) -> Sheet:
    """The subtasks that the folder has.

    Raises:
        UserError: none, a line that is no question, or an image without exactly two.
    """
    files = [path for name in (*PERCEPTION, *COGNITION) if (path := folder / f"{name}.txt").is_file()]
    if not files:
        raise UserError(f"{folder}: a folder with MME's subtasks is expected, such as existence.txt")
    questions = [question for path in files for question in _subtask(path)]
    return Sheet(without_doubles(questions, folder), tuple(files))


def _subtask(path: Path) -> list[Question]:
    counted: dict[str, int] = {}
    questions = []
    for number, line in enumerate(read_text(path, "a subtask of MME").splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        truth = parts[2].strip().lower() if len(parts) in (3, 4) else ""
        if truth not in ("yes", "no"):
            raise UserError(f"{path}: line {number} is not image, question and Yes or No, separated by tabs")
        image = parts[0].strip()
        counted[image] = counted.get(image, 0) + 1
        name = f"{path.stem}/{image}"
        questions.append(Question(f"{name}/{counted[image]}", truth, name, path.stem, parts[1].strip(), (image,)))
    strange = [image for image, count in counted.items() if count != 2]
    if strange:
        raise UserError(f"{path}: {strange[0]!r} has {counted[strange[0]]} questions; every image of MME has two")
    return questions


def _score(sums: Sums) -> np.ndarray:
    return 100 * (sums["right"] / sums["asked"] + sums["both"] / sums["images"])


def score(sheet: Sheet, said: Mapping[str, str], *, seed: int = 0, reader: str = "words") -> Scores:
    """Accuracy, accuracy+ and score of every subtask, and the two totals over the subtasks that are there.

    An image of which only one question is answered (with ``--missing drop``) counts as not both right.
    """
    read = readings(sheet.questions, said, reader)
    parts: dict[str, list[Reading]] = {}
    for one in read:
        parts.setdefault(one.question.group, []).append(one)
    found = {name: _estimates(members, seed_for(seed, name)) for name, members in parts.items()}
    groups: dict[str, dict[str, Figure]] = {}
    notes = []
    for total, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [name for name in names if name in found]
        if there:
            groups[total] = {"score": combined([found[name]["score"] for name in there]).figure()}
        if there and len(there) < len(names):
            notes.append(f"{total} is the sum of {len(there)} of {len(names)} subtasks, at most {200 * len(there)} points")
    groups |= {name: {figure: one.figure() for figure, one in estimated.items()} for name, estimated in found.items()}
    if differ := read_differently(read, said, OFFICIAL):
        notes.append(f"{differ} of {len(read)} answers are read in another way by MME's own tool (--reader {OFFICIAL})")
    counts = {name: binary_counts(members, positive="yes") for name, members in parts.items()}
    return Scores(groups, counts, unread(read), notes)


def _estimates(members: Sequence[Reading], seed: int) -> dict[str, Estimate]:
    """One row an image."""
    right: dict[str, list[bool]] = {}
    for one in members:
        right.setdefault(one.question.cluster, []).append(one.found == one.question.truth)
    columns = {
        "asked": [float(len(found)) for found in right.values()],
        "right": [float(sum(found)) for found in right.values()],
        "images": [1.0] * len(right),
        "both": [float(len(found) == 2 and all(found)) for found in right.values()],
    }
    formulas = {"score": _score, "accuracy": Share("right", "asked"), "accuracy_plus": Share("both", "images")}
    return estimates(columns, formulas, seed=seed)
