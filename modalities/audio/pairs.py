"""Pairs by Audio-alpaca's strategies, shard by shard: the generator that was never published.

As in :mod:`polyalign.modalities.generation`, every sample has its own seed, the bytes of a shard do not depend on what was made
before it, and an interrupted generation goes on at the first missing shard. Beside ``pairs-00000.parquet`` lie the file
``samples-00000.parquet``, every sample with its strategy, prompt, seed and scores, and ``strategies-00000.json``, what became
no pair. ``perturbed.jsonl`` holds the perturbed captions, so that they are written once whoever writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.randomness import seed_of
from polyalign.datasets.audio.perturb import Perturbed
from polyalign.datasets.files import remove_unfinished
from polyalign.datasets.formats.sounds import STRATEGY
from polyalign.datasets.outputs import KINDS
from polyalign.datasets.pairing import histogram
from polyalign.datasets.pairs import PairStore, table_bytes
from polyalign.evaluation.judges import build, checked_scores
from polyalign.modalities.audio.config import PairsConfig
from polyalign.modalities.audio.perturbing import Writer, writer_of
from polyalign.modalities.audio.strategies import Asked, Judged, Made, Perturbations, as_text, asked_of, pairs_of, table_of
from polyalign.modalities.generation import EXAMPLES, Sampler, claim, reporting

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge, Model

PERTURBED = "perturbed.jsonl"
Condition = Mapping[str, Any]


def strategy_pairs(
    adapter: Sampler,
    model: Model,
    conditions: Sequence[Condition],
    pairs: PairsConfig,
    *,
    folder: Path,
    seed: int,
    sampler: Mapping[str, Any],
) -> dict[str, Any]:
    """Make the shards that ``folder`` lacks, write ``summary.json``, print the strategies' table, and return the summary.

    Args:
        sampler: recorded as provenance: the adapter has its own settings.

    Raises:
        UserError: no prompts, a folder with pairs made in another way, a score that is no number, an endpoint that fails, no
            pair at all, or no room on the disk; finished shards are kept.
    """
    if not conditions:
        raise UserError("there are no prompts to make pairs from; give at least one")
    store = PairStore(folder, "sound")
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    judges = [build(judge) for judge in pairs.judges]
    claim(folder, _inputs(model, conditions, judges, pairs, seed, sampler))
    perturbed = perturbed_captions(folder / PERTURBED, conditions, pairs, seed)
    work = _Work(adapter, model, conditions, perturbed, pairs, judges, store, seed, sampler)
    todo = [index for index in range(work.shards) if not work.finished(index)]
    total = sum(len(work.asked(prompt)) for prompt in range(len(conditions)))
    left = sum(len(work.asked(prompt)) for index in todo for prompt in work.prompts(index))
    with reporting(None, total - left, total) as report:
        for index in todo:
            report(work.make(index))
    summary = summarise(store, judges, len(conditions))
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(as_text(summary["strategies"]), file=sys.stderr, flush=True)
    if not summary["pairs"]:
        raise UserError(
            f"{folder}: of {summary['samples']} samples of {summary['prompts']} prompts no two make a pair (the table above "
            "says why). Take more samples, a wider filter (pairs.judges), a smaller margin, harder prompts or another judge"
        )
    return summary


def _inputs(
    model: Model, conditions: Sequence[Condition], judges: Sequence[Judge], pairs: PairsConfig, seed: int, sampler: Any
) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    prompts = json.dumps([dict(condition) for condition in conditions], sort_keys=True, ensure_ascii=False)
    keys = {"strategies", "pairing", "prompts_per_shard", "judges"}
    return {
        "model": model.identity,
        "prompts": {"count": len(conditions), "sha256": hashlib.sha256(prompts.encode()).hexdigest()},
        "judges": [{"name": judge.name, "version": judge.version} for judge in judges],
        "settings": {**pairs.model_dump(mode="json", include=keys), "sampler": dict(sampler)},
        "seed": seed,
    }


def perturbed_captions(file: Path, conditions: Sequence[Condition], pairs: PairsConfig, seed: int) -> list[Perturbations]:
    """The perturbed captions of every prompt, read from ``file``, or written there."""
    if file.is_file():
        lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        return [
            {name: [Perturbed(**one) for one in given] for name, given in line.items() if name != "prompt"} for line in lines
        ]
    write: Writer = writer_of(pairs, conditions, file.parent, seed)
    counts = {"2": pairs.strategies.perturbed, "3": pairs.strategies.temporal}
    found: list[Perturbations] = [
        {name: write(condition["prompt"], name, count) for name, count in counts.items() if count} for condition in conditions
    ]
    lines = [
        {"prompt": condition["prompt"], **{name: [vars(one) for one in given] for name, given in of.items()}}
        for condition, of in zip(conditions, found, strict=True)
    ]
    atomic_write(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return found


@dataclass(frozen=True)
class _Work:
    """One generation: what every shard is made with."""

    adapter: Sampler
    model: Model
    conditions: Sequence[Condition]
    perturbed: Sequence[Perturbations]
    pairs: PairsConfig
    judges: Sequence[Judge]
    store: PairStore
    seed: int
    sampler: Mapping[str, Any]

    @property
    def shards(self) -> int:
        return math.ceil(len(self.conditions) / self.pairs.prompts_per_shard)

    def prompts(self, index: int) -> range:
        first = index * self.pairs.prompts_per_shard
        return range(first, min(first + self.pairs.prompts_per_shard, len(self.conditions)))

    def asked(self, prompt: int) -> list[Asked]:
        return asked_of(self.conditions[prompt], self.perturbed[prompt], self.pairs.strategies)

    def finished(self, index: int) -> bool:
        beside = [self.store.folder / f"samples-{index:05d}.parquet", _note(self.store.folder, index)]
        return self.store.shard_path(index).is_file() and all(path.is_file() for path in beside)

    def make(self, index: int) -> int:
        """Sample, judge, pair and write one shard; returns how many samples it took. The pairs come last: their file says that
        the shard is finished."""
        places = [(prompt, one) for prompt in self.prompts(index) for one in self.asked(prompt)]
        seeds = [seed_of(self.seed, "sample", one.strategy, prompt, one.number) for prompt, one in places]
        outputs = self.adapter.sample(self.model, [one.condition for _, one in places], seeds)
        judged = self._judged([self.conditions[prompt] for prompt, _ in places], outputs, seeds)
        rows, counts, start = list[dict[str, Any]](), dict[str, Counter[str]](), 0
        without = 0
        for prompt in self.prompts(index):
            asked = self.asked(prompt)
            part = slice(start, start + len(asked))
            start += len(asked)
            filters = self._filters()
            outcome = pairs_of(asked, judged[part], self.pairs.strategies, self.pairs.pairing, filters)
            rows += [self._row(prompt, pair, asked, judged[part], outputs[part], seeds[part]) for pair in outcome.pairs]
            without += not outcome.pairs
            for name, counted in outcome.counts.items():
                counts.setdefault(name, Counter()).update(counted)
        self._write_samples(index, places, seeds, judged)
        note = {"without_pair": without, "strategies": counts}
        atomic_write(_note(self.store.folder, index), json.dumps(note, indent=1) + "\n")
        self.store.write_shard(index, rows, judges=[judge.name for judge in self.judges])
        return len(places)

    def _filters(self) -> dict[str, Any]:
        named = zip(self.judges, self.pairs.judges, strict=True)
        return {judge.name: config.filter for judge, config in named if config.filter is not None}

    def _judged(self, conditions: Sequence[Condition], outputs: Sequence[Any], seeds: Sequence[int]) -> list[Judged]:
        """Every sample under the prompt that it is for, by every judge."""
        kind, where = KINDS["sound"], "finished shards are kept"
        by = {judge.name: checked_scores(judge, conditions, outputs, seeds=seeds, where=where) for judge in self.judges}
        weights = {judge.name: config.weight for judge, config in zip(self.judges, self.pairs.judges, strict=True)}
        found = []
        for place, output in enumerate(outputs):
            scores = {name: given[place] for name, given in by.items()}
            total = sum(weights[name] * score for name, score in scores.items())
            found.append(Judged("" if kind.empty(output) else kind.fingerprint(output), scores, total))
        return found

    def _row(
        self,
        prompt: int,
        pair: Made,
        asked: Sequence[Asked],
        judged: Sequence[Judged],
        outputs: Sequence[Any],
        seeds: Sequence[int],
    ) -> dict[str, Any]:
        """A row of the pair store."""
        model, _, content_hash = self.model.identity.partition("@")
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        how = {f"{side}_steps": asked[place].condition["steps"] for side, place in sides.items() if pair.strategy == "1.1"}
        if asked[pair.rejected].kind:
            how |= {"rejected_prompt": asked[pair.rejected].condition["prompt"], "perturbation": asked[pair.rejected].kind}
        provenance = {
            "model": model,
            "model_hash": content_hash or None,
            **{f"{side}_seed": seeds[place] for side, place in sides.items()},
            "sampler": {**self.sampler, STRATEGY: pair.strategy, **how},
            "judges": {judge.name: {"version": judge.version} for judge in self.judges},
        }
        return {
            "pair_id": f"{prompt:06d}-{pair.strategy}-{pair.chosen}-{pair.rejected}",
            "condition": {**self.conditions[prompt], STRATEGY: pair.strategy},
            **{side: outputs[place] for side, place in sides.items()},
            **{f"{side}_scores": dict(judged[place].scores) for side, place in sides.items()},
            "provenance": provenance,
        }

    def _write_samples(
        self, index: int, places: Sequence[tuple[int, Asked]], seeds: Sequence[int], judged: Sequence[Judged]
    ) -> None:
        rows = [
            {
                "prompt_index": prompt,
                STRATEGY: one.strategy,
                "number": one.number,
                "prompt": one.condition["prompt"],
                "steps": one.condition.get("steps"),
                "seed": seed,
                "output_hash": found.output_hash,
                "total": found.total,
                "scores": json.dumps(found.scores, sort_keys=True),
            }
            for (prompt, one), seed, found in zip(places, seeds, judged, strict=True)
        ]
        atomic_write(
            self.store.folder / f"samples-{index:05d}.parquet", table_bytes(pa.Table.from_pylist(rows, schema=_SAMPLE))
        )


_SAMPLE = pa.schema(
    [
        ("prompt_index", pa.int64()),
        (STRATEGY, pa.string()),
        ("number", pa.int64()),
        ("prompt", pa.string()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("output_hash", pa.string()),
        ("total", pa.float64()),
        ("scores", pa.string()),
    ]
)


def _note(folder: Path, index: int) -> Path:
    return folder / f"strategies-{index:05d}.json"


def summarise(store: PairStore, judges: Sequence[Judge], prompts: int) -> dict[str, Any]:
    """The data card's figures, from what lies beside the shards; ``strategies`` is the publication's table."""
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(store.folder.glob("strategies-*.json"))]
    counts: dict[str, Counter[str]] = {}
    for note in notes:
        for name, counted in note["strategies"].items():
            counts.setdefault(name, Counter()).update(counted)
    columns = ["pair_id", "condition", "chosen_scores", "rejected_scores"]
    rows = [row for path in store.shards() for row in pq.read_table(path, columns=columns).to_pylist()]
    scores: dict[str, list[tuple[Mapping[str, float], Mapping[str, float]]]] = {}
    for row in rows:
        scores.setdefault(row["pair_id"].split("-")[1], []).append((row["chosen_scores"], row["rejected_scores"]))
    samples = [path for path in sorted(store.folder.glob("samples-*.parquet"))]
    totals = [score for path in samples for score in pq.read_table(path, columns=["total"])["total"].to_pylist()]
    table = table_of(counts, scores)
    every = table[-1] if table else Counter[str]()
    first = judges[0].name
    return {
        "prompts": prompts,
        "samples": len(totals),
        "pairs": len(rows),
        "ties_dropped": every["ties"],
        "reversed_dropped": every["reversed"],
        "below_margin": every["below_margin"],
        "filtered_dropped": every["filtered"],
        "duplicates_dropped": every["duplicates"],
        "silent_dropped": every["silent"],
        "over_limit": every["over_limit"],
        "no_pair_prompts": sum(note["without_pair"] for note in notes),
        "score_histogram": histogram(totals),
        "judge": {"name": " + ".join(judge.name for judge in judges), "version": "+".join(judge.version for judge in judges)},
        "strategies": table,
        "examples": [
            {
                "pair_id": row["pair_id"],
                "prompt": row["condition"]["prompt"],
                "chosen_score": row["chosen_scores"][first],
                "rejected_score": row["rejected_scores"][first],
            }
            for row in rows[:: max(1, math.ceil(len(rows) / EXAMPLES))]
        ],
    }
