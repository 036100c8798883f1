"""MODPO's margins (arXiv 2310.03708): the weighted rewards w'r of the other objectives, for both candidates of every pair.

They do not depend on what is trained, so any number of judges scores all pairs once, before the training; the official code
asks its reward models in every step. Scores lie in ``margins-00000.jsonl`` and so on, without weights, so that other weights
need no new judging.

A margin is subtracted from beta times the log-ratio, so it has to be on that scale: a judge whose scores run to 100 needs a
weight of 0.01, or it drowns the preferences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.evaluation.judges import checked_scores

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge
    from polyalign.core.algorithm import Rows
    from polyalign.datasets.pairs import PairStore

NOTE = "margins.json"
PART = 64
"""Pairs whose scores are written together; an interrupted judging goes on behind the last of these."""

Scores = dict[str, dict[str, tuple[float, float]]]
"""By pair and judge: the chosen and the rejected candidate's score."""


@dataclass(frozen=True)
class WithMargins:
    """``data`` with ``margins`` in every row, the sum over judges of weight times score for both candidates.

    Raises:
        UserError: at a row whose pair was not judged.
    """

    data: Rows
    scores: Scores
    weights: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [dict(row) | {"margins": self._margins(row["pair_id"])} for row in self.data.rows(indices)]

    def _margins(self, pair_id: str) -> tuple[float, ...]:
        found = self.scores.get(pair_id)
        if found is None or set(self.weights) - set(found):
            lacking = sorted(set(self.weights) - set(found or ()))
            raise UserError(f"the pair {pair_id!r} has no margin of {', '.join(lacking)}; judge the pairs anew")
        return tuple(sum(weight * found[judge][side] for judge, weight in self.weights.items()) for side in (0, 1))


def judge_margins(store: PairStore, judges: Sequence[Judge], folder: Path) -> Scores:
    """Scores of both candidates of every pair, by every judge: those in ``folder``, and what it lacks is judged now.

    Raises:
        UserError: no judges or two of one name, one that only ranks candidates against each other, a folder with scores of
            other pairs or judges, or a score that is no finite number.
    """
    _refuse(judges)
    made_with = {"pairs": store.content_hash(), "judges": {judge.name: judge.version for judge in judges}}
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, made_with)
    scores: Scores = {}
    with ProgressLine("judging margins (pairs)", total=len(store)) as line:
        for start in range(0, len(store), PART):
            file = folder / f"margins-{start // PART:05d}.jsonl"
            if not file.is_file():
                rows = store.rows(range(start, min(start + PART, len(store))))
                lines = [json.dumps(found, ensure_ascii=False) for found in _judged(rows, judges)]
                atomic_write(file, "".join(f"{text}\n" for text in lines))
            for text in file.read_text(encoding="utf-8").splitlines():
                found = json.loads(text)
                scores[found["pair_id"]] = {name: (pair[0], pair[1]) for name, pair in found["scores"].items()}
            line.advance(count=min(PART, len(store) - start))
    return scores


def _judged(rows: Sequence[Mapping[str, Any]], judges: Sequence[Judge]) -> list[dict[str, Any]]:
    conditions = [row["condition"] for row in rows for _ in range(2)]
    outputs = [row[side] for row in rows for side in ("chosen", "rejected")]
    by_judge = {
        judge.name: checked_scores(judge, conditions, outputs, where="pairs judged before are kept") for judge in judges
    }
    return [
        {
            "pair_id": row["pair_id"],
            "scores": {name: found[2 * place : 2 * place + 2] for name, found in by_judge.items()},
        }
        for place, row in enumerate(rows)
    ]


def _refuse(judges: Sequence[Judge]) -> None:
    names = [judge.name for judge in judges]
    if not names:
        raise UserError("objective modpo subtracts the rewards of other objectives: give at least one of margins.judges")
    for judge in judges:
        if names.count(judge.name) > 1:
            raise UserError(f"two of margins.judges are called {judge.name!r}; give them names of their own (option 'label')")
        if getattr(judge, "relative", False):
            raise UserError(
                f"the judge {judge.name!r} compares candidates with each other and gives none a score of its own, which a "
                "margin is. Take its other mode (pointwise)"
            )


def _claim(folder: Path, made_with: Mapping[str, Any]) -> None:
    note = folder / NOTE
    if not note.is_file():
        atomic_write(note, json.dumps(made_with, indent=1) + "\n")
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{note}: is damaged ({error}). Remove the folder {folder} to judge the pairs anew") from error
    if before != made_with:
        changed = [
            f"{name} was {before.get(name)}, now {value}" for name, value in made_with.items() if before.get(name) != value
        ]
        raise UserError(
            f"{folder}: holds scores of other pairs or judges: {'; '.join(changed)}. Remove the folder to judge the pairs anew"
        )
