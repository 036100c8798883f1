"""Pairs of another pair store: taken over as they are, or judged anew.

Judging anew is the AI feedback of Diffusion-DPO (arXiv 2311.12908): of each pair the output with the higher score becomes the
chosen one; where the judge disagrees with the store the two are swapped, where it gives both the same score the pair is a tie,
dropped and counted. The official code can do this for one pair at a time only and has no count of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from polyalign.core.adapter import Judge
from polyalign.core.errors import UserError
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Pair, Source, entry
from polyalign.datasets.pair_rows import SIDES
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictured_rows import LOSING_IMAGES, LOSING_MESSAGES, is_pictured

LOSING = (LOSING_IMAGES, LOSING_MESSAGES)
TOGETHER = 16  # pairs that are read together, and that a judge sees in one call


def import_store(path: Path, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store`` with the pairs of the store at ``path``; see
    :func:`polyalign.datasets.formats.importing.import_pairs`."""
    return import_pairs(Stored(Path(path)), store, on_bad_row=on_bad_row)


def relabel(path: Path, store: PairStore, *, judge: Judge, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store`` with the pairs of the store at ``path`` as ``judge`` prefers them. Its scores stand beside the old ones,
    and in the place of those of a judge of the same name. The summary has ``disagreement``, the share of all pairs without
    ties that were swapped.

    Raises:
        UserError: a score that is no finite number, or what :func:`polyalign.datasets.formats.importing.import_pairs` raises.
    """
    return import_pairs(Relabelled(Path(path), judge), store, on_bad_row=on_bad_row)


class Stored(Source):
    """The rows of a pair store."""

    name = "store"

    def __init__(self, path: Path):
        self.path, self.given = path, PairStore(path)
        if not self.given.validate():
            raise UserError(f"{path}: there are no pairs in this store")
        self.outputs = self.given.kind.name
        self.pictured = is_pictured(pq.read_schema(self.given.shards()[0]))
        first = self.given.rows([0], decode=False)[0]
        self._rows: tuple[int, list[dict[str, Any]]] = (-1, [])
        self.judges = self.own_judges = sorted(first["chosen_scores"])

    def identity(self) -> dict[str, Any]:
        return {"pairs_sha256": self.given.content_hash()}

    def total(self) -> int:
        return len(self.given)

    def entries(self, start: int) -> Iterator[Entry]:
        for index in range(start, len(self.given)):
            yield entry(f"row {index}", self._read, index)

    def _read(self, index: int) -> Outcome:
        return Outcome([_pair(self._around(index)[index % TOGETHER])])

    def _around(self, index: int) -> list[dict[str, Any]]:
        """The rows that are read together with this one."""
        first = index - index % TOGETHER
        if self._rows[0] != first:
            self._rows = first, self.given.rows(range(first, min(first + TOGETHER, len(self.given))), decode=False)
        return self._rows[1]


class Relabelled(Stored):
    """The rows of a pair store in the order that a judge prefers."""

    name = "relabel"

    def __init__(self, path: Path, judge: Judge):
        super().__init__(path)
        self.judge, self.scored_by = judge, judge.name
        self.judges = sorted({*self.own_judges, judge.name})
        self._scores: tuple[int, list[float]] = (-1, [])

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "judge": {"name": self.judge.name, "version": self.judge.version}}

    def remarks(self, counts: Mapping[str, int]) -> dict[str, Any]:
        compared = counts["agreed"] + counts["disagreed"]
        return {
            "judge": {"name": self.judge.name, "version": self.judge.version},
            "agreed": counts["agreed"],
            "disagreed": counts["disagreed"],
            "disagreement": counts["disagreed"] / compared if compared else None,
        }

    def _read(self, index: int) -> Outcome:
        row, chosen, rejected = self._judged(index)
        if chosen == rejected:
            return Outcome(counts={"ties_dropped": 1})
        row["chosen_scores"][self.judge.name], row["rejected_scores"][self.judge.name] = chosen, rejected
        row["provenance"]["judges"][self.judge.name] = {"version": self.judge.version}
        if chosen > rejected:
            return Outcome([_pair(row)], counts={"agreed": 1})
        return Outcome([_pair(_swapped(row))], counts={"disagreed": 1})

    def _judged(self, index: int) -> tuple[dict[str, Any], float, float]:
        """A row with the judge's scores of its two outputs; the judge sees the rows around it in the same call."""
        rows, place = self._around(index), index % TOGETHER
        if self._scores[0] != index - place:
            conditions = [row["condition"] for row in rows for _ in SIDES]
            outputs = [self.given.kind.opened(row[side]) for row in rows for side in SIDES]
            self._scores = index - place, self._finite(rows, self.judge.score(conditions, outputs))
        chosen, rejected = self._scores[1][2 * place : 2 * place + 2]
        return rows[place], chosen, rejected

    def _finite(self, rows: Sequence[Mapping[str, Any]], given: Sequence[float]) -> list[float]:
        who, scores = f"the judge '{self.judge.name}' (version {self.judge.version})", [float(score) for score in given]
        if len(scores) != 2 * len(rows):
            raise UserError(f"{who} gave {len(scores)} scores for {2 * len(rows)} {self.given.kind.words}")
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                row, side = rows[place // 2], SIDES[place % 2]
                raise UserError(
                    f"{who} gave {score} for the {side} output of pair {row['pair_id']!r}, prompt "
                    f"{row['condition']['prompt']!r}; scores must be finite numbers. Finished shards are kept"
                )
        return scores


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(
        row["pair_id"],
        row["condition"],
        row["chosen"],
        row["rejected"],
        scores=(row["chosen_scores"], row["rejected_scores"]),
        provenance=row["provenance"],
        checked=True,  # the whole store was validated
        losing={name: row[name] for name in LOSING if name in row},
    )


def _swapped(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its two sides exchanged, in its provenance too. Pictures and words that lose do so beside either answer."""
    provenance, losing = _other_side(row["provenance"]), {name: row[name] for name in LOSING if name in row}
    sides = _other_side({name: value for name, value in row.items() if name not in losing})
    return {**sides, **losing, "provenance": {**provenance, "sampler": _other_side(provenance["sampler"])}}


def _other_side(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {"chosen": "rejected", "rejected": "chosen"}
    parts = {key: key.partition("_") for key in given}
    return {names.get(parts[key][0], parts[key][0]) + "".join(parts[key][1:]): value for key, value in given.items()}
