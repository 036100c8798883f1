"""Accuracy, precision, recall, F1 and the yes-ratio of yes/no questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.answers import YES_NO
from polyalign.evaluation.vlm.figures import Estimate, Share, Sums, estimates, ratio
from polyalign.evaluation.vlm.sheets import Question


@dataclass(frozen=True)
class Reading:
    """A question with what its answer says: "yes", "no" or None."""

    question: Question
    found: str | None


def readings(questions: Sequence[Question], said: Mapping[str, str], reader: str) -> list[Reading]:
    """What each answered question's answer says, by the reader of that name.

    Raises:
        UserError: no such reader.
    """
    if reader not in YES_NO:
        raise UserError(f"reader is {reader!r}; allowed for yes and no: {', '.join(YES_NO)}")
    read = YES_NO[reader]
    return [Reading(question, read(said[question.id])) for question in questions if question.id in said]


def read_differently(read: Sequence[Reading], said: Mapping[str, str], official: str) -> int:
    """How many answers the published scorer reads in another way."""
    return sum(YES_NO[official](said[one.question.id]) != one.found for one in read)


def unread(read: Sequence[Reading]) -> list[str]:
    return [one.question.id for one in read if one.found is None]


def _f1(sums: Sums) -> np.ndarray:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall; undefined without a positive question or answer."""
    return ratio(2 * sums["hit"], sums["said"] + sums["true"])


FORMULAS = {
    "accuracy": Share("right", "asked"),
    "precision": Share("hit", "said"),
    "recall": Share("hit", "true"),
    "f1": _f1,
}


def binary_estimates(read: Sequence[Reading], *, positive: str, seed: int) -> dict[str, Estimate]:
    """Figures of some questions, resampled by their clusters.

    precision = TP / (TP + FP), recall = TP / (TP + FN), F1 their harmonic mean, with ``positive`` ("yes" or "no") as the
    positive class; ``yes_ratio`` is the share of answers that say yes. An answer in which nothing was found is wrong: for a
    positive question it is a false negative; it is never a false positive.
    """
    columns = {
        "asked": [1.0] * len(read),
        "right": [float(one.found == one.question.truth) for one in read],
        "said": [float(one.found == positive) for one in read],
        "true": [float(one.question.truth == positive) for one in read],
        "hit": [float(one.found == positive == one.question.truth) for one in read],
        "yes": [float(one.found == "yes") for one in read],
    }
    formulas = {**FORMULAS, "yes_ratio": Share("yes", "asked")}
    return estimates(columns, formulas, clusters=[one.question.cluster for one in read], seed=seed)


def binary_counts(read: Sequence[Reading], *, positive: str) -> dict[str, int]:
    """TP, FP, TN, FN and the answers in which nothing was found (which are in none of the four)."""
    found = {"tp": 0, "fp": 0, "tn": 0, "fn": 0, "unread": 0}
    for one in read:
        if one.found is None:
            found["unread"] += 1
        else:
            right = "t" if one.found == one.question.truth else "f"
            found[right + ("p" if one.found == positive else "n")] += 1
    return found
