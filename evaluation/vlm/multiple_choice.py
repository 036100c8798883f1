"""Accuracy on multiple-choice benchmarks of one or several images: NLVR2, BLINK, Mantis-Eval, MMMU and VLMEvalKit's tables.

Letters are read by one of :data:`polyalign.evaluation.vlm.answers.LETTERS`. An answer in which no option is found is wrong and
counted; nothing is drawn for it, while MMMU's published code takes a random option (which adds about 1 / options for each) and
BLINK's asks a language model which option was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.answers import LETTERS, yes_or_no
from polyalign.evaluation.vlm.choice_files import Choice
from polyalign.evaluation.vlm.figures import Estimate, Figure, Scores, Share, combined, estimates, figures, seed_for
from polyalign.evaluation.vlm.open_answers import open_answer_right, same_text
from polyalign.evaluation.vlm.sheets import Question, Sheet, simple_id

answer_id = simple_id("identifier")


def blink_id(row: Mapping[str, object]) -> str | None:
    """id or idx"""
    return next((str(row[key]) for key in ("id", "idx") if key in row), None)


def table_id(row: Mapping[str, object]) -> str | None:
    """id or index"""
    return next((str(row[key]) for key in ("id", "index") if key in row), None)


def is_right(text: str, choice: Choice, reader: str) -> bool | None:
    """Whether an answer is right; None where no option is found in it (for free texts: where it is empty)."""
    if choice.kind in ("short", "open"):
        if not text.strip():
            return None
        return (
            open_answer_right(text, choice.right)
            if choice.kind == "open"
            else any(same_text(text, one) for one in choice.right)
        )
    found = None
    if choice.kind == "statement":
        found = {"yes": "A", "no": "B", None: None}[yes_or_no(text)]
    found = found or LETTERS[reader](text, choice.options)
    return None if found is None else found in choice.right


def score(
    sheet: Sheet, said: Mapping[str, str], *, seed: int = 0, reader: str = "words", parts_weigh_alike: bool = False
) -> Scores:
    """Accuracy of all, of each of the benchmark's groups, and for NLVR2 its consistency.

    Args:
        parts_weigh_alike: also the mean of the groups' accuracies, which BLINK reports.

    Raises:
        UserError: no such reader.
    """
    if reader not in LETTERS:
        raise UserError(f"reader is {reader!r}; allowed for letters: {', '.join(LETTERS)}")
    asked = [question for question in sheet.questions if question.id in said]
    right = {question.id: is_right(said[question.id], question.truth, reader) for question in asked}
    parts: dict[str, list[Question]] = {}
    for question in asked:
        if question.group:
            parts.setdefault(question.group, []).append(question)
    shares = {
        name: estimates(
            _columns(found, right), {"accuracy": Share("right", "asked")}, clusters=_clusters(found), seed=seed_for(seed, name)
        )
        for name, found in {"all": asked, **parts}.items()
    }
    groups: dict[str, dict[str, Figure]] = {name: {"accuracy": one["accuracy"].figure()} for name, one in shares.items()}
    if parts_weigh_alike and parts:
        groups["all"]["mean_of_parts"] = _mean([shares[name]["accuracy"] for name in parts]).figure()
    if any(question.truth.sentence for question in asked):
        groups["all"]["consistency"] = _consistency(asked, right, seed)
    counts = {
        name: {"questions": len(found), "right": sum(bool(right[one.id]) for one in found)} for name, found in parts.items()
    }
    counts["all"] = {"questions": len(asked), "right": sum(bool(one) for one in right.values())}
    return Scores(groups, counts, [name for name, one in right.items() if one is None])


def _mean(parts: Sequence[Estimate]) -> Estimate:
    return combined(parts, 1 / len(parts), share=True)


def _columns(asked: Sequence[Question], right: Mapping[str, bool | None]) -> dict[str, list[float]]:
    return {"asked": [1.0] * len(asked), "right": [float(bool(right[one.id])) for one in asked]}


def _clusters(asked: Sequence[Question]) -> list[str]:
    return [one.cluster for one in asked]


def _consistency(asked: Sequence[Question], right: Mapping[str, bool | None], seed: int) -> Figure:
    """Sentences that are right for every pair of images they are asked of / sentences (NLVR2's second figure)."""
    throughout: dict[str, bool] = {}
    of_set: dict[str, str] = {}
    for one in asked:
        sentence = one.truth.sentence
        throughout[sentence] = throughout.get(sentence, True) and bool(right[one.id])
        of_set[sentence] = one.cluster
    columns = {"sentences": [1.0] * len(throughout), "right": [float(one) for one in throughout.values()]}
    formulas = {"consistency": Share("right", "sentences")}
    return figures(columns, formulas, clusters=list(of_set.values()), seed=seed_for(seed, "consistency"))["consistency"]
