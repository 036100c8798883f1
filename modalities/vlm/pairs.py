"""Pairs of a vision-language run, shard by shard: the frame of the makers (MIA-DPO, Re-Align), and losing pictures and contexts
for pairs of any source.

As in :mod:`polyalign.modalities.generation`, a shard's bytes do not depend on what was made before it, and an interrupted
generation goes on at the first missing shard. Beside ``pairs-00000.parquet`` lies ``made-00000.json``, the maker's counts of
what became no pair, and why.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.datasets.files import remove_unfinished
from polyalign.datasets.formats.source import JUDGE, PREFERRED
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictured_rows import LOSING_IMAGES, LOSING_MESSAGES
from polyalign.datasets.pictures import decode
from polyalign.modalities.generation import claim, reporting
from polyalign.modalities.vlm.data_card import table_of_losers
from polyalign.modalities.vlm.negative_config import NegativesConfig

if TYPE_CHECKING:
    from polyalign.core.adapter import Model

PLAIN = "pairs/plain"
"""Where pairs are made that get losing pictures or contexts afterwards, in the run folder."""

LOSERS = "losers.json"
LOSERS_PER_SHARD = 64


class Maker(Protocol):
    """What makes pairs of questions. ``len()`` is how many questions there are."""

    def __len__(self) -> int: ...

    def inputs(self) -> Mapping[str, Any]:
        """What the pairs depend on, besides the model and the recipe's section."""
        ...

    def make(self, indices: range) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The pairs of some questions, and the note about the others; they depend on the indices alone."""
        ...

    def summary(self, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What ``summary.json`` says, from the notes of all shards."""
        ...

    def lines(self, summary: Mapping[str, Any]) -> list[str]:
        """The same for a terminal."""
        ...


def make_pairs(
    maker: Maker, model: Model, *, folder: Path, seed: int, settings: Mapping[str, Any], questions_per_shard: int
) -> dict[str, Any]:
    """Make the shards that ``folder`` lacks, write ``summary.json``, print what became of the questions, return the summary.

    Args:
        settings: the recipe's, which the bytes depend on.

    Raises:
        UserError: no questions, a folder with pairs made in another way, no pair at all, or no room on the disk; finished
            shards are kept.
    """
    if not len(maker):
        raise UserError("there are no questions to make pairs from; give at least one")
    store = PairStore(folder, "text", pictured=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    claim(folder, {"model": model.identity, "questions": dict(maker.inputs()), "settings": dict(settings), "seed": seed})
    parts = [range(first, min(first + questions_per_shard, len(maker))) for first in range(0, len(maker), questions_per_shard)]
    todo = [place for place in range(len(parts)) if not (store.shard_path(place).is_file() and _note(folder, place).is_file())]
    done = len(maker) - sum(len(parts[place]) for place in todo)
    with reporting(None, done, len(maker)) as report:
        for place in todo:
            rows, note = maker.make(parts[place])
            atomic_write(_note(folder, place), json.dumps(note, indent=1, ensure_ascii=False) + "\n")
            store.write_shard(place, [_scored(row) for row in rows], judges=[JUDGE])
            report(len(parts[place]))
    notes = [json.loads(_note(folder, place).read_text(encoding="utf-8")) for place in range(len(parts))]
    found = {"prompts": len(maker), "questions": len(maker), "pairs": len(store), **maker.summary(notes)}
    atomic_write(folder / "summary.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(maker.lines(found)), file=sys.stderr, flush=True)
    if not len(store):
        raise UserError(
            f"{folder}: of {len(maker)} questions none became a pair; summary.json says what each filter dropped. Ask more "
            "questions, or turn off the filter that drops most"
        )
    return found


def _note(folder: Path, place: int) -> Path:
    return folder / f"made-{place:05d}.json"


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    """A pair that is known by its making and not by a judge's score: whose preference it is, as for pairs that are read."""
    chosen, rejected = PREFERRED
    return {**row, "chosen_scores": dict(chosen), "rejected_scores": dict(rejected)}


class _Opened(Sequence[dict[str, Any]]):
    """The rows of a store with their pictures decoded, one at a time."""

    def __init__(self, store: PairStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.store.rows([index], decode=False)[0]
        images = [decode(picture["bytes"]) for picture in row["condition"].get("images") or ()]
        return {**row, "condition": {**row["condition"], "images": images}}


def with_losers(given: Path, folder: Path, negatives: NegativesConfig, *, seed: int) -> None:
    """Fill ``folder`` with the pairs of the store ``given``, and with what is to lose beside their rejected answers. Whatever
    else lies beside the pairs (summary, samples) is copied.

    Raises:
        UserError: a pair without the pictures that are to lose, or no other pair to take from.
    """
    from polyalign.modalities.vlm.negatives import loser_of

    source, store = PairStore(given, "text"), PairStore(folder, "text", pictured=True)
    rows = _Opened(source)
    inputs = {"pairs_sha256": source.content_hash(), "negatives": negatives.model_dump(mode="json"), "seed": seed}
    note, wanted = folder / LOSERS, json.dumps(inputs, indent=1) + "\n"
    if not note.is_file() or note.read_text(encoding="utf-8") != wanted:
        store.clear()
    remove_unfinished(folder)
    atomic_write(note, wanted)
    with ProgressLine("making what loses (pairs)", total=len(rows)) as line:
        for place in range(math.ceil(len(rows) / LOSERS_PER_SHARD)):
            part = range(place * LOSERS_PER_SHARD, min((place + 1) * LOSERS_PER_SHARD, len(rows)))
            if not store.shard_path(place).is_file():
                plain = source.rows(part, decode=False)
                made = [loser_of(rows, index, negatives, seed=seed) for index in part]
                store.write_shard(place, [{**row, **_losing(one)} for row, one in zip(plain, made, strict=True)])
            line.advance(count=len(part))
    for file in given.iterdir():
        if file.is_file() and file.name not in {path.name for path in source.shards()}:
            shutil.copyfile(file, folder / file.name)
    _tell(folder / "summary.json", table_of_losers(negatives, len(rows)))


def _tell(file: Path, table: Mapping[str, Any]) -> None:
    """Add a table to a summary, where there is one."""
    if file.is_file():
        summary = json.loads(file.read_text(encoding="utf-8"))
        summary["tables"] = [*summary.get("tables", []), table]
        atomic_write(file, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _losing(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (LOSING_IMAGES, LOSING_MESSAGES) if name in row}
