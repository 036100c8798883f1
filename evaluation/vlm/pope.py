"""POPE (Li et al., arXiv 2305.10355): "Is there a X in the image?", with X absent at random, popular, or often seen with what
is there.

Files: JSON lines named ``*random*``, ``*popular*``, ``*adversarial*`` (``coco_pope_random.json``), each line
``{"question_id": 0, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": "yes"}``. Numbers start
again in every file, so an answer's id is ``random/0``, or it has ``split`` and ``question_id``.

Yes is the positive class. What others do differently:

- The published scorer pairs answers with questions by their place in the file, so one lost line shifts all that follow; here
  ids pair them. It reads everything that is no "No", "no" or "not" as yes, an empty answer too (``--reader pope``).
- It divides by TP + FP and fails where nothing is yes; precision is not defined there, here as well, and F1 is 0.
- lmms-eval takes the yes-ratio of the labels, which is always about a half; here it is that of the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.binary import Reading, binary_counts, binary_estimates, read_differently, readings, unread
from polyalign.evaluation.vlm.figures import Scores, seed_for
from polyalign.evaluation.vlm.sheets import Question, Sheet, field_of, read_rows, without_doubles

SPLITS = ("random", "popular", "adversarial")
OFFICIAL = "pope"


def answer_id(row: Mapping[str, Any]) -> str | None:
    """id (such as "random/0"), or split (or category) and question_id"""
    if "id" in row:
        return str(row["id"])
    split = row.get("split", row.get("category"))
    return None if split is None or "question_id" not in row else f"{split}/{row['question_id']}"


def read(folder: Path) -> Sheet:
    """The splits that the folder has.

    Raises:
        UserError: no split's file, several for one, or a line that is no POPE question.
    """
    questions, files = [], []
    for split in SPLITS:
        found = sorted(path for path in folder.glob(f"*{split}*.json*") if path.is_file()) if folder.is_dir() else []
        if len(found) > 1:
            raise UserError(f"{folder}: has {len(found)} files of the split {split}: {', '.join(path.name for path in found)}")
        for path in found:
            files.append(path)
            questions += [_question(row, where, split) for where, row in read_rows(path, "a split of POPE")]
    if not files:
        raise UserError(f"{folder}: a folder with POPE's JSON lines is expected, named like coco_pope_random.json")
    return Sheet(without_doubles(questions, folder), tuple(files))


def _question(row: Mapping[str, Any], where: str, split: str) -> Question:
    image, label = str(field_of(row, "image", where, (str, int))), field_of(row, "label", where)
    if label not in ("yes", "no"):
        raise UserError(f"{where}: label is {label!r}; allowed: yes, no")
    number = field_of(row, "question_id", where, (int, str))
    text = field_of(row, "text", where)
    return Question(f"{split}/{number}", label, cluster=image, group=split, text=text, images=(image,))


def score(sheet: Sheet, said: Mapping[str, str], *, seed: int = 0, reader: str = "words") -> Scores:
    """Figures by split (a question's group) and of all questions; an image's questions, of all splits, are drawn together."""
    read = readings(sheet.questions, said, reader)
    parts: dict[str, list[Reading]] = {}
    for one in read:
        parts.setdefault(one.question.group or "all", []).append(one)
    if len(parts) > 1:
        parts["all"] = read
    groups = {}
    for split, found in parts.items():
        estimated = binary_estimates(found, positive="yes", seed=seed_for(seed, split))
        groups[split] = {name: one.figure() for name, one in estimated.items()}
    differ = read_differently(read, said, OFFICIAL)
    notes = [f"{differ} of {len(read)} answers are read in another way by POPE's own scorer (--reader {OFFICIAL})"]
    counts = {split: binary_counts(found, positive="yes") for split, found in parts.items()}
    return Scores(groups, counts, unread(read), notes if differ else [])
