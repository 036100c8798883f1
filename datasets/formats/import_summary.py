"""What an import says about itself: a note beside every shard, and ``summary.json`` from these and the shards."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.datasets.formats.source import JUDGE, Source
from polyalign.datasets.outputs import KINDS
from polyalign.datasets.pair_rows import SCORES
from polyalign.datasets.pairing import histogram
from polyalign.datasets.pairs import PairStore

EXAMPLES = 8  # pairs named in the summary
LISTED = 1000  # dropped rows and duplicates named in the summary; imported-*.json name all
_NOTE_NAME = re.compile(r"imported-(\d{5})\.json")


def note_path(store: PairStore, index: int) -> Path:
    return store.folder / f"imported-{index:05d}.json"


def notes_of(store: PairStore) -> list[Path]:
    return sorted(path for path in store.folder.glob("imported-*.json") if _NOTE_NAME.fullmatch(path.name))


def column_of(shard: Path, name: str) -> list[Any]:
    try:
        return pq.read_table(shard, columns=[name]).column(name).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard}: not a readable parquet file: {error}. Delete it and run the import again") from error


def summary_of(source: Source, store: PairStore, around: Sequence[str]) -> dict[str, Any]:
    """The data card's figures, from the shards and the notes beside them."""
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in notes_of(store)]
    counts = Counter[str]()
    for note in notes:
        counts.update(note["counts"])
    duplicates = [name for note in notes for name in note["duplicates"]]
    dropped = [{"place": "", "problem": problem} for problem in around] + [row for note in notes for row in note["dropped"]]
    prompts, examples, pairs = set(), [], 0
    for shard in store.shards():
        ids, conditions = column_of(shard, "pair_id"), column_of(shard, "condition")
        pairs += len(ids)
        prompts.update(condition["prompt"] for condition in conditions)
        short = zip(ids[: EXAMPLES - len(examples)], conditions, strict=False)
        examples += [{"pair_id": name, "prompt": condition["prompt"]} for name, condition in short]
    own = {"rows", "samples", "without_pair"}
    return {
        "source": source.name,
        "rows": counts["rows"],
        "prompts": len(prompts),
        "samples": counts["samples"],
        "pairs": pairs,
        "ties_dropped": 0,
        "below_margin": 0,
        "duplicates_dropped": len(duplicates),
        **{name: number for name, number in sorted(counts.items()) if name not in own},
        "rows_dropped": len(dropped),
        "no_pair_prompts": counts["without_pair"],
        "score_histogram": histogram(_scores(store, source.scored_by)),
        "judge": {"name": " + ".join(_judges_of(store)), "version": "1"},
        "examples": examples,
        "duplicates": duplicates[:LISTED],
        "dropped": dropped[:LISTED],
        **source.remarks(counts),
    }


def _judges_of(store: PairStore) -> list[str]:
    shards = store.shards()
    return [part.name for part in pq.read_schema(shards[0]).field("chosen_scores").type] if shards else [JUDGE]


def _scores(store: PairStore, judge: str | None) -> list[float]:
    """All scores of one judge; none where a preference came without scores."""
    if judge is None:
        return []
    return [scores[judge] for shard in store.shards() for side in SCORES for scores in column_of(shard, side)]


def no_pairs(source: Source, summary: Mapping[str, Any]) -> str:
    counted = ("rows", "ties_dropped", "unlabelled_dropped", "rows_dropped")
    said = ", ".join(f"{summary[name]} {name.replace('_', ' ')}" for name in counted if name in summary)
    same = summary["duplicates_dropped"]
    first = f". The first row dropped: {summary['dropped'][0]['problem']}" if summary["dropped"] else ""
    return (
        f"{source.path}: no pair is left ({said}); in {same} the two {KINDS[source.outputs].words} are identical, so nothing "
        f"is preferred{first}"
    )
