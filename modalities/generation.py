"""Preference pairs made automatically, in every modality: prompts, k seeded samples of each, a judge, pairs; shard by shard.
Preferences that are there already, in whatever format, are :func:`read_pairs`'s business.

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.datasets.files import remove_unfinished
from polyalign.datasets.formats.table import Format, import_format
from polyalign.datasets.outputs import KINDS
from polyalign.datasets.pairing import Mode, Paired, Ties, histogram, pair_up
from polyalign.datasets.pairs import PairStore, table_bytes
from polyalign.datasets.pictures import content_digest
from polyalign.evaluation.judges import checked_scores, panel

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge, Model
    from polyalign.core.recipe import JudgeConfig
    from polyalign.datasets.formats.own_samples import Drawing

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

    def sample(self, model: Any, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]: ...


class PairsRead(Protocol):
    """What a recipe says of pairs that are there already."""

    @property
    def source(self) -> str: ...

    @property
    def location(self) -> str | None: ...

    @property
    def on_bad_row(self) -> Literal["error", "drop"]: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def judges(self) -> Sequence[JudgeConfig]: ...


@dataclass(frozen=True)
class GenerationSettings:
    """How pairs are made.

    ``batch_size`` samples are asked of the adapter at a time; None asks for a whole shard and leaves batches to the adapter.
    ``sampler`` is only recorded, as provenance: the adapter has its own settings. ``ties`` that are kept are pairs too, for
    objectives that take a soft target.
    """

    samples_per_prompt: int = 4
    prompts_per_shard: int = 32
    mode: Mode = "best_worst"
    margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    ties: Ties = "drop"
    batch_size: int | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One sample as it is recorded, without its output. One that is empty has no hash, and takes part in no pair."""

    prompt_index: int
    sample_index: int
    prompt: str
    seed: int
    score: float
    output_hash: str


def read_pairs(
    pairs: PairsRead, store: PairStore, formats: Mapping[str, Format], drawing: Drawing | None = None
) -> dict[str, Any]:
    """The pairs that a recipe reads instead of making them, into ``store``; returns the summary.

    Args:
        formats: the table of the store's kind of outputs.
        drawing: who draws the rejected outputs, for the sources that need it.

    Raises:
        UserError: whatever is wrong with the data; see :func:`polyalign.datasets.formats.importing.import_pairs`.
    """
    assert pairs.location is not None  # the schema asks for it
    return import_format(
        pairs.source,
        pairs.location,
        store,
        on_bad_row=pairs.on_bad_row,
        options=pairs.options,
        judge=panel(pairs.judges) if formats[pairs.source].needs == "judge" else None,
        drawing=drawing,
        formats=formats,
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
    outputs: str = "picture",
    pictured: bool = False,
    may_be_none: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Make the shards that ``folder`` lacks, write ``summary.json`` and return it.

    ``outputs`` is the kind of what the adapter samples; ``pictured``: conditions have pictures. ``progress(samples done,
    samples in all)`` is called after every shard; without it a progress line is shown.

    Raises:
        UserError: no conditions, the folder holds pairs made in another way, a score that is not a number, no pair at all
            (unless there ``may_be_none``), or no room on the disk (finished shards are kept).
    """
    if not conditions:
        raise UserError("there are no prompts to make pairs from; give at least one")
    store = PairStore(folder, outputs, pictured=pictured)
    store.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(store.folder)
    claim(store.folder, _inputs(model, conditions, judge, settings, seed))
    work = _Generation(adapter, model, conditions, judge, settings, store, seed)
    todo = work.unfinished()
    total = len(conditions) * settings.samples_per_prompt
    with reporting(progress, total - sum(len(work.places(index)) for index in todo), total) as report:
        for index in todo:
            work.make(index)
            report(len(work.places(index)))
    summary = summarise(store, judge, settings)
    atomic_write(store.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if not summary["pairs"] and not may_be_none:
        raise UserError(_no_pairs(summary, settings, store.folder))
    return summary


def _inputs(
    model: Model, conditions: Sequence[Condition], judge: Judge, settings: GenerationSettings, seed: int
) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    return {
        "model": model.identity,
        "prompts": {"count": len(conditions), "sha256": digest_of(conditions)},
        "judge": {"name": judge.name, "version": judge.version},
        "settings": json.loads(json.dumps(asdict(settings), default=dict)),
        "seed": seed,
    }


def digest_of(conditions: Sequence[Condition]) -> str:
    """SHA-256 of conditions; pictures in them count by their content."""
    plain = json.dumps([dict(one) for one in conditions], sort_keys=True, ensure_ascii=False, default=content_digest)
    return hashlib.sha256(plain.encode()).hexdigest()


def claim(folder: Path, inputs: Mapping[str, Any]) -> None:
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
def reporting(progress: Report | None, done: int, total: int) -> Iterator[Callable[[int], None]]:
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
        outputs, kind = self.sampled(conditions, seeds), KINDS[self.store.outputs or "picture"]
        scores = checked_scores(self.judge, conditions, outputs, seeds=seeds, where="finished shards are kept")
        samples = [
            Sample(
                prompt,
                number,
                self.conditions[prompt]["prompt"],
                seed,
                score,
                "" if kind.empty(output) else kind.fingerprint(output),
            )
            for (prompt, number), seed, score, output in zip(places, seeds, scores, outputs, strict=True)
        ]
        k = self.settings.samples_per_prompt
        cuts = [slice(start, start + k) for start in range(0, len(samples), k)]
        rows = [row for cut in cuts for row in self.rows(samples[cut], outputs[cut])]
        recorded = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SAMPLE)
        atomic_write(self.samples_path(index), table_bytes(recorded))
        self.store.write_shard(index, rows, judges=[self.judge.name])

    def sampled(self, conditions: Sequence[Condition], seeds: Sequence[int]) -> list[Any]:
        batch = self.settings.batch_size or len(seeds)
        outputs: list[Any] = []
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            made = self.adapter.sample(self.model, conditions[part], seeds[part])
            if len(made) != len(seeds[part]):
                raise ValueError(f"the adapter gave {len(made)} samples for {len(seeds[part])} seeds")
            outputs += made
        return outputs

    def rows(self, samples: Sequence[Sample], outputs: Sequence[Any]) -> list[dict[str, Any]]:
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
                    "chosen": outputs[pair.chosen],
                    "rejected": outputs[pair.rejected],
                    "chosen_scores": {judge.name: chosen.score},
                    "rejected_scores": {judge.name: rejected.score},
                    "provenance": provenance,
                }
            )
        return rows


def _paired(samples: Sequence[Sample], settings: GenerationSettings) -> Paired:
    """The pairs of one prompt."""
    places = [place for place, sample in enumerate(samples) if sample.output_hash]
    paired = pair_up(
        [samples[place].score for place in places],
        mode=settings.mode,
        margin=settings.margin,
        max_pairs=settings.max_pairs_per_prompt,
        ties=settings.ties,
        identities=[samples[place].output_hash for place in places],
    )
    moved = [replace(pair, chosen=places[pair.chosen], rejected=places[pair.rejected]) for pair in paired.pairs]
    return replace(paired, pairs=tuple(moved))


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
    empty = sum(not sample.output_hash for sample in samples)
    shown = pairs[:: max(1, math.ceil(len(pairs) / EXAMPLES))]
    return {
        "prompts": len(groups),
        "samples": len(samples),
        "pairs": len(pairs),
        "ties_dropped": sum(result.ties_dropped for result in results),
        "below_margin": sum(result.below_margin for result in results),
        "duplicates_dropped": sum(result.duplicates_dropped for result in results),
        "over_limit": sum(result.over_limit for result in results),
        **({"empty_dropped": empty} if empty else {}),
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
    empty = f", {summary['empty_dropped']} empty" if "empty_dropped" in summary else ""
    return (
        f"{folder}: the judge '{summary['judge']['name']}' prefers none of {summary['samples']} samples of "
        f"{summary['prompts']} prompts: {summary['ties_dropped']} ties, {summary['below_margin']} differences not above the "
        f"margin {settings.margin}, {summary['duplicates_dropped']} duplicates{empty}. Take more samples per prompt, a smaller "
        "margin, harder prompts or another judge."
    )
