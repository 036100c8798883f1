"""Preference pairs made automatically: prompts, k seeded samples of each, a judge, pairs; shard by shard. Preferences that are
there already, in whatever format, are :func:`read_pairs`'s business.

Every sample has its own seed, keyed by prompt and number, and the batches of a shard are always cut alike, so a shard's bytes
do not depend on what was generated before it in the same process: after an interruption the missing shards are made, and the
store is the one that an uninterrupted run would have written.

Beside each ``pairs-00000.parquet`` lies ``samples-00000.parquet`` with the seed, score and hash of *every* sample of the shard,
also of those in no pair; ``summary.json`` is computed from these.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.datasets.files import remove_unfinished
from polyalign.datasets.formats.table import FORMATS, import_format
from polyalign.datasets.pairing import Mode, Paired, histogram, pair_up
from polyalign.datasets.pairs import PairStore, table_bytes
from polyalign.datasets.pictures import fingerprint
from polyalign.evaluation.judges import checked_scores, panel

if TYPE_CHECKING:
    from PIL import Image

    from polyalign.core.adapter import Judge, Model
    from polyalign.datasets.formats.own_samples import Drawing
    from polyalign.modalities.image.config import PairsConfig

Condition = Mapping[str, Any]
Report = Callable[[int, int], None]

EXAMPLES = 8  # pairs named in the summary
_SAMPLE = pa.schema(
    [
        ("prompt_index", pa.int64()),
        ("sample_index", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("output_hash", pa.string()),
    ]
)


class Sampler(Protocol):
    """The part of an adapter that is needed here."""

    def sample(self, model: Any, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Image.Image]: ...


@dataclass(frozen=True)
class GenerationSettings:
    """How pairs are made.

    ``batch_size`` samples are asked of the adapter at a time; None asks for a whole shard and leaves batches to the adapter.
    ``sampler`` is only recorded, as provenance: the adapter has its own settings.
    """

    samples_per_prompt: int = 4
    prompts_per_shard: int = 32
    mode: Mode = "best_worst"
    margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    batch_size: int | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One sample as it is recorded, without its picture."""

    prompt_index: int
    sample_index: int
    prompt: str
    seed: int
    score: float
    output_hash: str


def read_pairs(pairs: PairsConfig, folder: Path, drawing: Drawing | None = None) -> dict[str, Any]:
    """The pairs that a recipe reads instead of making them, into a pair store in ``folder``; returns the summary.

    Args:
        drawing: who draws the rejected pictures, for the sources that need it.

    Raises:
        UserError: whatever is wrong with the data; see :func:`polyalign.datasets.formats.importing.import_pairs`.
    """
    assert pairs.location is not None  # the schema asks for it
    return import_format(
        pairs.source,
        pairs.location,
        PairStore(folder),
        on_bad_row=pairs.on_bad_row,
        options=pairs.options,
        judge=panel(pairs.judges) if FORMATS[pairs.source].needs == "judge" else None,
        drawing=drawing,
    )


def generate_pairs(
    adapter: Sampler,
    model: Model,
    conditions: Sequence[Condition],
    judge: Judge,
    *,
    settings: GenerationSettings,
    folder: Path,
    seed: int,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Make the shards that ``folder`` lacks, write ``summary.json`` and return it.

    ``progress(samples done, samples in all)`` is called after every shard; without it a progress line is shown.

    Raises:
        UserError: no conditions, the folder holds pairs made in another way, a score that is not a number, no pair at all, or
            no room on the disk (finished shards are kept).
    """
    if not conditions:
        raise UserError("there are no prompts to make pairs from; give at least one")
    store = PairStore(folder)
    store.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(store.folder)
    _claim(store.folder, _inputs(model, conditions, judge, settings, seed))
    work = _Generation(adapter, model, conditions, judge, settings, store, seed)
    todo = work.unfinished()
    total = len(conditions) * settings.samples_per_prompt
    with _reporting(progress, total - sum(len(work.places(index)) for index in todo), total) as report:
        for index in todo:
            work.make(index)
            report(len(work.places(index)))
    summary = summarise(store, judge, settings)
    atomic_write(store.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if not summary["pairs"]:
        raise UserError(_no_pairs(summary, settings, store.folder))
    return summary


def _inputs(
    model: Model, conditions: Sequence[Condition], judge: Judge, settings: GenerationSettings, seed: int
) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    prompts = json.dumps([dict(condition) for condition in conditions], sort_keys=True, ensure_ascii=False)
    return {
        "model": model.identity,
        "prompts": {"count": len(conditions), "sha256": hashlib.sha256(prompts.encode()).hexdigest()},
        "judge": {"name": judge.name, "version": judge.version},
        "settings": json.loads(json.dumps(asdict(settings), default=dict)),
        "seed": seed,
    }


def _claim(folder: Path, inputs: dict[str, Any]) -> None:
    """Write ``generation.json``, or compare with the one there: shards made in different ways must not come together.

    Raises:
        UserError: the folder's shards were made in another way, or nobody knows how.
    """
    note = folder / "generation.json"
    if not note.is_file():
        if PairStore(folder).shards():
            raise UserError(f"{folder}: holds pairs, but no generation.json that says how they were made. Take another folder")
        atomic_write(note, json.dumps(inputs, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{note}: is damaged ({error}). Remove the folder {folder} to make its pairs anew") from error
    changed = [f"{name} was {before.get(name)}, now {value}" for name, value in inputs.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{folder}: holds pairs that were made in another way, and they cannot be continued: {'; '.join(changed)}. "
            "Take another run folder, or remove this folder to make the pairs anew."
        )


@contextmanager
def _reporting(progress: Report | None, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of samples just made."""
    if progress is None:
        with ProgressLine("making pairs (samples)", total=total, start=done) as line:
            yield lambda count: line.advance(count=count)
        return

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    yield report


@dataclass(frozen=True)
class _Generation:
    """One generation: what every shard is made with."""

    adapter: Sampler
    model: Model
    conditions: Sequence[Condition]
    judge: Judge
    settings: GenerationSettings
    store: PairStore
    seed: int

    def unfinished(self) -> list[int]:
        """Shards that lack their pairs or their record of samples."""
        total = math.ceil(len(self.conditions) / self.settings.prompts_per_shard)
        unrecorded = {index for index in range(total) if not self.samples_path(index).is_file()}
        return sorted(unrecorded | set(self.store.missing(total)))

    def samples_path(self, index: int) -> Path:
        return self.store.folder / f"samples-{index:05d}.parquet"

    def places(self, index: int) -> list[tuple[int, int]]:
        """(prompt, number of the sample) of every sample in a shard."""
        first = index * self.settings.prompts_per_shard
        prompts = range(first, min(first + self.settings.prompts_per_shard, len(self.conditions)))
        return [(prompt, number) for prompt in prompts for number in range(self.settings.samples_per_prompt)]

    def make(self, index: int) -> None:
        """Sample, judge, pair and write one shard. The pairs come last: their file says that the shard is finished."""
        places = self.places(index)
        conditions = [self.conditions[prompt] for prompt, _ in places]
        seeds = [seed_of(self.seed, "sample", prompt, number) for prompt, number in places]
        pictures = self.sampled(conditions, seeds)
        scores = checked_scores(self.judge, conditions, pictures, seeds=seeds, where="finished shards are kept")
        samples = [
            Sample(prompt, number, self.conditions[prompt]["prompt"], seed, score, fingerprint(picture))
            for (prompt, number), seed, score, picture in zip(places, seeds, scores, pictures, strict=True)
        ]
        k = self.settings.samples_per_prompt
        cuts = [slice(start, start + k) for start in range(0, len(samples), k)]
        rows = [row for cut in cuts for row in self.rows(samples[cut], pictures[cut])]
        recorded = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SAMPLE)
        atomic_write(self.samples_path(index), table_bytes(recorded))
        self.store.write_shard(index, rows, judges=[self.judge.name])

    def sampled(self, conditions: Sequence[Condition], seeds: Sequence[int]) -> list[Image.Image]:
        batch = self.settings.batch_size or len(seeds)
        pictures: list[Image.Image] = []
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            made = self.adapter.sample(self.model, conditions[part], seeds[part])
            if len(made) != len(seeds[part]):
                raise ValueError(f"the adapter gave {len(made)} samples for {len(seeds[part])} seeds")
            pictures += made
        return pictures

    def rows(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Rows of the pair store from the samples of one prompt."""
        model, _, content_hash = self.model.identity.partition("@")
        judge = self.judge
        rows = []
        for pair in _paired(samples, self.settings).pairs:
            chosen, rejected = samples[pair.chosen], samples[pair.rejected]
            provenance = {
                "model": model,
                "model_hash": content_hash or None,
                "chosen_seed": chosen.seed,
                "rejected_seed": rejected.seed,
                "sampler": dict(self.settings.sampler),
                "judges": {judge.name: {"version": judge.version}},
            }
            rows.append(
                {
                    "pair_id": _pair_id(chosen, rejected),
                    "condition": self.conditions[chosen.prompt_index],
                    "chosen": pictures[pair.chosen],
                    "rejected": pictures[pair.rejected],
                    "chosen_scores": {judge.name: chosen.score},
                    "rejected_scores": {judge.name: rejected.score},
                    "provenance": provenance,
                }
            )
        return rows


def _paired(samples: Sequence[Sample], settings: GenerationSettings) -> Paired:
    """The pairs of one prompt."""
    return pair_up(
        [sample.score for sample in samples],
        mode=settings.mode,
        margin=settings.margin,
        max_pairs=settings.max_pairs_per_prompt,
        identities=[sample.output_hash for sample in samples],
    )


def _pair_id(chosen: Sample, rejected: Sample) -> str:
    return f"{chosen.prompt_index:06d}-{chosen.sample_index}-{rejected.sample_index}"


# --- the summary --------------------------------------------------------------------------------------------------------------


def read_samples(store: PairStore) -> list[Sample]:
    """Every sample that was judged, in the order of prompts."""
    paths = sorted(store.folder.glob("samples-*.parquet"))
    return [Sample(**row) for path in paths for row in pq.read_table(path, schema=_SAMPLE).to_pylist()]


def summarise(store: PairStore, judge: Judge, settings: GenerationSettings) -> dict[str, Any]:
    """The data card's figures, from the recorded samples alone."""
    samples = read_samples(store)
    k = settings.samples_per_prompt
    groups = [samples[start : start + k] for start in range(0, len(samples), k)]
    results = [_paired(group, settings) for group in groups]
    pairs = [
        (group[pair.chosen], group[pair.rejected]) for group, one in zip(groups, results, strict=True) for pair in one.pairs
    ]
    shown = pairs[:: max(1, math.ceil(len(pairs) / EXAMPLES))]
    return {
        "prompts": len(groups),
        "samples": len(samples),
        "pairs": len(pairs),
        "ties_dropped": sum(result.ties_dropped for result in results),
        "below_margin": sum(result.below_margin for result in results),
        "duplicates_dropped": sum(result.duplicates_dropped for result in results),
        "over_limit": sum(result.over_limit for result in results),
        "no_pair_prompts": sum(not result.pairs for result in results),
        "score_histogram": histogram([sample.score for sample in samples]),
        "judge": {"name": judge.name, "version": judge.version},
        "examples": [
            {
                "pair_id": _pair_id(chosen, rejected),
                "prompt": chosen.prompt,
                "chosen_score": chosen.score,
                "rejected_score": rejected.score,
            }
            for chosen, rejected in shown
        ],
    }


def _no_pairs(summary: Mapping[str, Any], settings: GenerationSettings, folder: Path) -> str:
    return (
        f"{folder}: the judge '{summary['judge']['name']}' prefers none of {summary['samples']} samples of "
        f"{summary['prompts']} prompts: {summary['ties_dropped']} ties, {summary['below_margin']} differences not above the "
        f"margin {settings.margin}, {summary['duplicates_dropped']} duplicates. Take more samples per prompt, a smaller "
        "margin, harder prompts or another judge."
    )
