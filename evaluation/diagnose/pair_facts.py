"""What the pairs of a run say about themselves: read from the store's parquet files alone, whatever the outputs are.

Nothing is decoded. A picture's size is that of its file and its number of pixels (from the header), a text's its characters.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAIRS_READ = 20_000
"""So many pairs are read at most, the first of the store; what is said of them is said of a sample."""

RIGHT, LOSING = "images", "rejected_images"
"""Columns of pictures; the right ones, which may be gigabytes, are read only where there are losing ones."""

COLUMNS = ("condition", "chosen", "rejected", "chosen_scores", "rejected_scores", "provenance", RIGHT, LOSING)


@dataclass
class Tally:
    """Of the pairs whose two sides differ in something: how often the chosen side has more of it."""

    chosen: int = 0
    rejected: int = 0
    equal: int = 0

    def add(self, chosen: float, rejected: float) -> None:
        self.chosen += chosen > rejected
        self.rejected += chosen < rejected
        self.equal += chosen == rejected

    @property
    def differing(self) -> int:
        return self.chosen + self.rejected

    @property
    def share(self) -> float:
        """Of the chosen side; 0.5 where nothing differs."""
        return self.chosen / self.differing if self.differing else 0.5


@dataclass
class PairFacts:
    """Counts over the pairs read.

    ``identical``: both sides have the same content. ``scores``: which side the store's own judges, weighted as the recipe says,
    gave more to. ``sizes``: by what is measured. ``sampled_chosen`` and ``sampled_rejected``: sides that the base itself has
    written, which have the seed they were sampled with. ``reached``: pairs for whose prompt some sample of the base scored at
    least as high as the chosen side, of the ``compared`` for whose prompt samples are known. ``losing_pictures``: pairs with
    pictures under which the chosen answer is to lose; ``same_pictures``: those of them whose losing pictures are, byte by byte,
    the right ones.
    """

    pairs: int = 0
    identical: int = 0
    scores: Tally = field(default_factory=Tally)
    sizes: dict[str, Tally] = field(default_factory=dict)
    sampled_chosen: int = 0
    sampled_rejected: int = 0
    compared: int = 0
    reached: int = 0
    losing_pictures: int = 0
    same_pictures: int = 0
    chosen_scores: list[float] = field(default_factory=list)
    best_of_prompts: list[float] = field(default_factory=list)
    """The best score among the base's samples of each prompt that was sampled, with a pair or without."""


def read_pair_facts(
    folder: Path, weights: Mapping[str, float], missing: list[str], *, sampled: bool = True
) -> PairFacts | None:
    """The facts of the store in ``folder``; None, with a line in ``missing``, where there is none.

    Args:
        weights: of the judges, by name; a judge that is not in it counts with 1.
        sampled: whether the pairs' source keeps scores of all samples, so that their absence is worth a line.
    """
    shards = sorted(folder.glob("pairs-*.parquet")) if folder.is_dir() else []
    if not shards:
        missing.append("pairs/: the pairs themselves (identical sides, scores, sizes, who wrote them)")
        return None
    samples = _read_samples(folder, missing, expected=sampled)
    facts = PairFacts(best_of_prompts=list(samples.best.values()))
    for row in _rows(shards, COLUMNS, missing):
        _count(facts, row, samples, weights)
        if facts.pairs == PAIRS_READ:
            missing.append(f"pairs/: only the first {PAIRS_READ:,} pairs were read")
            break
    return facts if facts.pairs else None


def _count(facts: PairFacts, row: Mapping[str, Any], samples: _Samples, weights: Mapping[str, float]) -> None:
    chosen, rejected = _content(row.get("chosen")), _content(row.get("rejected"))
    facts.pairs += 1
    if chosen is not None and rejected is not None:
        facts.identical += _plain(chosen) == _plain(rejected)
        left, right = _sizes(chosen), _sizes(rejected)
        for name in left.keys() & right.keys():
            facts.sizes.setdefault(name, Tally()).add(left[name], right[name])
    losing = row.get(LOSING)
    if losing:
        facts.losing_pictures += 1
        facts.same_pictures += [_content(one) for one in losing] == [_content(one) for one in row.get(RIGHT) or ()]
    score, other = (_weighted(row.get(f"{side}_scores"), weights) for side in ("chosen", "rejected"))
    if score is not None and other is not None:
        facts.scores.add(score, other)
    provenance = row.get("provenance") or {}
    facts.sampled_chosen += provenance.get("chosen_seed") is not None
    facts.sampled_rejected += provenance.get("rejected_seed") is not None
    prompt = str((row.get("condition") or {}).get("prompt"))
    if score is not None:
        facts.chosen_scores.append(score)
        best = samples.beside(prompt, provenance.get("rejected_seed"))
        if best is not None:
            facts.compared += 1
            facts.reached += best >= score


@dataclass
class _Samples:
    """Best scores of the base's samples, by prompt (its index, since one text may be asked for several times)."""

    best: dict[int, float] = field(default_factory=dict)
    of_seed: dict[tuple[str, int], int] = field(default_factory=dict)
    of_text: dict[str, int] = field(default_factory=dict)

    def beside(self, prompt: str, seed: int | None) -> float | None:
        """The best score among the samples that were drawn together with the one of that seed; without it, of the prompt."""
        index = self.of_seed.get((prompt, seed)) if seed is not None else None
        index = self.of_text.get(prompt) if index is None else index
        return None if index is None else self.best[index]


def _read_samples(folder: Path, missing: list[str], *, expected: bool) -> _Samples:
    """The samples that ``generate`` made, from ``samples-*.parquet``."""
    found = _Samples()
    shards = sorted(folder.glob("samples-*.parquet"))
    if not shards and expected:
        missing.append("pairs/samples-*.parquet: scores of all samples (which prompts the base fails and masters)")
    for row in _rows(shards, ("prompt_index", "prompt", "seed", "score"), missing):
        score, index, prompt = row.get("score"), row.get("prompt_index"), str(row.get("prompt"))
        if isinstance(score, int | float) and math.isfinite(score) and isinstance(index, int):
            found.best[index] = max(found.best.get(index, -math.inf), float(score))
            found.of_text.setdefault(prompt, index)
            if row.get("seed") is not None:
                found.of_seed[prompt, row["seed"]] = index
    return found


def _rows(shards: Sequence[Path], columns: Sequence[str], missing: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    for path in shards:
        try:
            file = parquet.ParquetFile(path)
            present = [name for name in columns if name in file.schema_arrow.names]
            if LOSING in present and _is_empty(file.metadata, LOSING):
                present = [name for name in present if name not in (LOSING, RIGHT)]
            for batch in file.iter_batches(batch_size=64, columns=present):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            missing.append(f"pairs/{path.name}: unreadable ({' '.join(str(error).split())[:120]})")


def _is_empty(metadata: Any, column: str) -> bool:
    """Whether a Parquet file's own statistics say that nothing stands in a column."""
    chunks = [
        group.column(place)
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for place in range(group.num_columns)
        if group.column(place).path_in_schema.split(".")[0] == column
    ]
    counts = [(chunk.num_values, chunk.statistics) for chunk in chunks]
    return all(found is not None and found.has_null_count and found.null_count == count for count, found in counts)


def _content(stored: Any) -> bytes | str | None:
    """What a side is: a text, or the bytes of a file."""
    found = stored.get("bytes") if isinstance(stored, Mapping) else stored
    return found if isinstance(found, bytes | str) else None


def _plain(content: bytes | str) -> bytes | str:
    """White space makes no other answer."""
    return " ".join(content.split()) if isinstance(content, str) else content


def _sizes(content: bytes | str) -> dict[str, float]:
    if isinstance(content, str):
        return {"characters": float(len(_plain(content)))}
    sizes = {"bytes of the file": float(len(content))}
    pixels = _pixels(content)
    return sizes if pixels is None else {**sizes, "pixels": pixels}


def _pixels(content: bytes) -> float | None:
    """Width times height from a picture's header; None for a file that is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            return float(picture.width * picture.height)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def _weighted(scores: Any, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of a side's scores; None where there is none, or one is not finite."""
    if not isinstance(scores, Mapping):
        return None
    known = {name: score for name, score in scores.items() if isinstance(score, int | float)}
    if not known or not all(math.isfinite(score) for score in known.values()):
        return None
    return sum(weights.get(name, 1.0) * score for name, score in known.items())
