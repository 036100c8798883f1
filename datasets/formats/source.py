"""What a public format is to an importer: entries in a fixed order, each of which reads its pictures only when asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from polyalign.core.files import sha256_of
from polyalign.datasets.prompts import Condition

OnBadRow = Literal["error", "drop"]

JUDGE = "user"  # whose preference it is: 1 for the chosen output, 0 for the rejected one
PREFERRED = ({JUDGE: 1.0}, {JUDGE: 0.0})
_ENDS = 1 << 20  # bytes at either end of a large file that are looked at to know it again


@dataclass(frozen=True)
class Pair:
    """One preference as an importer found it; pictures are the bytes of their files, texts are text.

    ``origin`` says where it is from (it becomes ``provenance.sampler``). ``provenance`` is only given for pairs that this
    package exported, and then kept as it is. ``checked``: the outputs have been looked at before. ``losing``: the pictures or
    words of the prompt that lose (:mod:`polyalign.datasets.pictured_rows`).
    """

    pair_id: str
    condition: Condition
    chosen: bytes | str
    rejected: bytes | str
    origin: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[Mapping[str, float], Mapping[str, float]] = PREFERRED
    provenance: Mapping[str, Any] | None = None
    checked: bool = False
    losing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one entry holds: its pairs, how many outputs took part, and counts of what became no pair, such as
    ``ties_dropped``; they are summed up in the summary under these names."""

    pairs: Sequence[Pair] = ()
    samples: int = 2
    counts: Mapping[str, int] = field(default_factory=dict)
    duplicates: Sequence[str] = ()


@dataclass(frozen=True)
class Entry:
    """One row, line or group of files. ``place`` names it in messages (``train.parquet row 7``); ``read`` raises ValueError if
    it is bad."""

    place: str
    read: Callable[[], Outcome]


class Source(ABC):
    """Data in a public format."""

    name: str
    """The format's."""

    path: Path
    """Where the data are, for messages."""

    outputs: str = "picture"
    """The kind of its outputs, a name of :data:`polyalign.datasets.outputs.KINDS`."""

    pictured: bool = False
    """Whether conditions have pictures (:mod:`polyalign.datasets.pictured_rows`)."""

    judges: Sequence[str] | None = (JUDGE,)
    """Whose scores its pairs carry; None if only the pairs say."""

    rows_per_shard: int = 64

    scored_by: str | None = None
    """The judge whose scores the summary shows as a histogram."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the shards' bytes depend on, as JSON knows it."""

    @abstractmethod
    def entries(self, start: int) -> Iterator[Entry]:
        """Entries in order, from number ``start`` on."""

    def total(self) -> int | None:
        """How many entries there are, where that is known without reading everything."""
        return None

    def problems(self) -> list[str]:
        """What is wrong outside of any entry, such as a picture without a partner."""
        return []

    def remarks(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """More for the summary."""
        return {}


def identity_of(files: Mapping[str, Path]) -> dict[str, str]:
    """For each file a hash of its size and content; of a file above 2 MiB its two ends stand for the content."""
    return {name: _identity(path) for name, path in files.items()}


def _identity(path: Path) -> str:
    size = path.stat().st_size
    if size <= 2 * _ENDS:
        return sha256_of(path)
    with open(path, "rb") as file:
        first = file.read(_ENDS)
        file.seek(size - _ENDS)
        return sha256_of(b"%d:" % size + first + file.read(_ENDS))


def entry(place: str, read: Callable[..., Outcome], *arguments: Any) -> Entry:
    """An entry that calls ``read(*arguments)`` when it is read."""
    return Entry(place, partial(read, *arguments))
