"""HallusionBench (Guan et al., arXiv 2310.14566): yes/no questions in sets, asked of a figure, of its edited versions, and of
none.

File: ``HallusionBench.json``, a list of {"category": "VD"|"VS", "subcategory", "visual_input", "set_id", "figure_id",
"question_id", "question", "gt_answer": "1"|"0", ...}. An answer's id is ``VD_illusion_0_1_2`` (category, subcategory, set,
figure, question), or it has these keys.

    aAcc = right answers / questions
    qAcc = questions that are right for every figure of their set / questions of sets
    fAcc = figures of which every question is right / figures
    easy, hard = qAcc over the original figures (figure_id 0) and over the others

VS questions with figure 0 are asked without a picture. They are no figure for fAcc, and there an answer that does not know is
right, both as published. The published scorer asks GPT-4 whether an answer agrees with the reference; here yes and no are
read from it (as the forks of LLaVA do). VLMEvalKit counts them as figures too and gives nothing for not knowing
(``without_picture="as_others"``). "Hard" is told by ``figure_id`` in the published code, not by ``visual_input``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.answers import unsure
from polyalign.evaluation.vlm.binary import readings, unread
from polyalign.evaluation.vlm.figures import Scores, Share, figures, seed_for
from polyalign.evaluation.vlm.sheets import Question, Sheet, field_of, only_file, read_rows, without_doubles

KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
RULES = ("published", "as_others")
FIGURES = ("aAcc", "qAcc", "fAcc", "easy", "hard")


@dataclass(frozen=True)
class Place:
    """Where a question stands, and its answer."""

    category: str
    set: str
    figure: str
    question: str
    truth: str

    @property
    def without_picture(self) -> bool:
        return self.category == "VS" and self.figure == "0"


def answer_id(row: Mapping[str, Any]) -> str | None:
    """id (such as "VD_illusion_0_1_2"), or category, subcategory, set_id, figure_id and question_id"""
    if "id" in row:
        return str(row["id"])
    return "_".join(str(row[key]) for key in KEYS) if all(key in row for key in KEYS) else None


def read(folder: Path) -> Sheet:
    """The benchmark's file.

    Raises:
        UserError: absent, or a row that is no question of it.
    """
    path = only_file(folder, ("HallusionBench*.json",), "HallusionBench's questions")
    questions = [_question(row, where) for where, row in read_rows(path, "HallusionBench's questions")]
    return Sheet(without_doubles(questions, path), (path,))


def _question(row: Mapping[str, Any], where: str) -> Question:
    category, subcategory, number, figure, question = (str(field_of(row, key, where, (str, int))) for key in KEYS)
    if category not in ("VD", "VS"):
        raise UserError(f"{where}: category is {category!r}; allowed: VD, VS")
    if (truth := str(field_of(row, "gt_answer", where, (str, int)))) not in ("0", "1"):
        raise UserError(f"{where}: gt_answer is {truth!r}; allowed: 0, 1")
    text = field_of(row, "question", where)
    of_set = f"{category}_{subcategory}_{number}"
    place = Place(category, of_set, figure, question, "yes" if truth == "1" else "no")
    images = () if place.without_picture else (f"{category}/{subcategory}/{number}_{figure}.png",)
    return Question(f"{of_set}_{figure}_{question}", place, of_set, category, text, images)


def score(
    sheet: Sheet, said: Mapping[str, str], *, seed: int = 0, reader: str = "words", without_picture: str = "published"
) -> Scores:
    """aAcc, qAcc, fAcc, easy and hard, of all and of each category; whole sets are drawn together.

    Raises:
        UserError: another rule for questions without a picture.
    """
    if without_picture not in RULES:
        raise UserError(f"without_picture is {without_picture!r}; allowed: {', '.join(RULES)}")
    lenient = without_picture == "published"
    read = readings(sheet.questions, said, reader)
    right = {}
    for one in read:
        place = one.question.truth
        unknowing = lenient and place.without_picture and one.found is None and unsure(said[one.question.id])
        right[one.question.id] = unknowing or one.found == place.truth
    asked = [one.question for one in read]
    parts = {"all": asked} | {name: found for name in ("VD", "VS") if (found := [one for one in asked if one.group == name])}
    groups = {name: _figures(found, right, lenient, seed_for(seed, name)) for name, found in parts.items()}
    counts = {name: {"questions": len(found), "right": sum(right[one.id] for one in found)} for name, found in parts.items()}
    silent = [name for name in unread(read) if not right[name]]
    return Scores(groups, counts, silent)


def _figures(asked: Sequence[Question], right: Mapping[str, bool], lenient: bool, seed: int) -> dict[str, Any]:
    """One row a set: how many of each kind of thing it has, and how many of them are right throughout."""
    columns: dict[str, list[float]] = {f"{name} {side}": [] for name in FIGURES for side in ("right", "all")}
    for of_set in dict.fromkeys(one.cluster for one in asked):
        members = [one for one in asked if one.cluster == of_set]
        kinds = {
            "aAcc": [(one.id, one) for one in members],
            "qAcc": [(one.truth.question, one) for one in members],
            "fAcc": [(one.truth.figure, one) for one in members if not (lenient and one.truth.without_picture)],
            "easy": [(one.truth.question, one) for one in members if one.truth.figure == "0"],
            "hard": [(one.truth.question, one) for one in members if one.truth.figure != "0"],
        }
        for name, things in kinds.items():
            throughout: dict[str, bool] = {}
            for thing, one in things:
                throughout[thing] = throughout.get(thing, True) and right[one.id]
            columns[f"{name} right"].append(float(sum(throughout.values())))
            columns[f"{name} all"].append(float(len(throughout)))
    return figures(columns, {name: Share(f"{name} right", f"{name} all") for name in FIGURES}, seed=seed)
