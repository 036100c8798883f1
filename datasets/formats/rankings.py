"""Several pictures of one prompt, ranked by a person, to pairs: ImageReward's ``test.json`` and alike.

An entry (of a ``.json`` list or a ``.jsonl`` file) has ``prompt``, ``generations`` (paths of pictures below the file's folder)
and one of

- ``ranking``: a number for each picture, 1 the best. Equal numbers are ties; ``null`` is a picture nobody ranked, which is
  compared with none;
- ``better``: a partial order, a list of ``[i, j]``: picture i is preferred to picture j (counted from 0). What follows from two
  of them (i over j, j over k) counts as well; two pictures that nothing connects are no pair; a circle is a bad row.

``all_pairs`` (as ImageReward trains, C(k, 2) pairs without ties) takes every two that differ, the widest apart first;
``best_worst`` the first and last of a ``ranking`` alone. Ties are counted for each comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from polyalign.core.errors import UserError
from polyalign.datasets.formats.checking import check_picture, read_file
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Pair, Source, entry, identity_of
from polyalign.datasets.formats.text_lines import as_object, count_objects, named_files, objects
from polyalign.datasets.pairing import Mode, pair_up
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import as_condition

_KEYS = ("generations", "ranking", "better")


def import_rankings(
    path: Path,
    store: PairStore,
    *,
    on_bad_row: OnBadRow = "error",
    mode: Mode = "all_pairs",
    max_pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None,
) -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: a ``.json`` or ``.jsonl`` file.
        mode: ``all_pairs`` or ``best_worst``.
        max_pairs_per_prompt: at most so many of one entry.
    """
    return import_pairs(Rankings(Path(path), mode, max_pairs_per_prompt), store, on_bad_row=on_bad_row)


def listed(path: Path) -> list[Path]:
    """The pictures that the file at ``path`` names."""
    return named_files(Rankings(path).path, ("generations",))


class Rankings(Source):
    """The entries of one file."""

    name = "rankings"
    rows_per_shard = 16  # nine pictures of a prompt are up to 36 pairs

    def __init__(self, path: Path, mode: Mode = "all_pairs", limit: int | None = None):
        self.path, self.limit = path, limit
        self.mode: Mode = mode
        if not path.is_file():
            raise UserError(f"{path}: no such file. It holds entries with prompt, generations and ranking")

    def identity(self) -> dict[str, Any]:
        return {"files": identity_of({self.path.name: self.path}), "mode": self.mode, "max_pairs_per_prompt": self.limit}

    def total(self) -> int:
        return count_objects(self.path)

    def entries(self, start: int) -> Iterator[Entry]:
        for place, number, given in objects(self.path, start):
            yield entry(place, self._read, f"{number:06d}", place, given)

    def _read(self, name: str, place: str, given: Any) -> Outcome:
        one = as_object(given)
        condition = as_condition({key: value for key, value in one.items() if key not in _KEYS})
        paths = one.get("generations")
        if not isinstance(paths, list) or len(paths) < 2:
            raise ValueError(f"'generations' must be a list of at least two paths, found {paths!r}")
        pictures = [read_file(self.path.parent, path) for path in paths]
        prints = [_checked(content, path) for content, path in zip(pictures, paths, strict=True)]
        found, counts = self._pairs(one, prints)
        pairs = [
            Pair(
                f"{name}-{better}-{worse}",
                condition,
                pictures[better],
                pictures[worse],
                {"file": self.path.name, "place": place, "chosen": paths[better], "rejected": paths[worse]},
                checked=True,
            )
            for better, worse in found
        ]
        return Outcome(pairs, len(paths), counts)

    def _pairs(self, one: dict[str, Any], prints: Sequence[str]) -> tuple[list[tuple[int, int]], dict[str, int]]:
        """(better, worse) and what was dropped. Of pictures that are the same only the first takes part."""
        ranking, better = one.get("ranking"), one.get("better")
        if (ranking is None) == (better is None):
            raise ValueError("expected one of 'ranking' (a number for each picture) and 'better' (a list of [i, j])")
        if better is not None:
            order = partial_order(better, len(prints))
            kept = [(i, j) for i, j in order if prints[i] != prints[j]]
            limited = kept[: self.limit]
            undecided = len(prints) * (len(prints) - 1) // 2 - len(order)
            return limited, {"undecided": undecided, "over_limit": len(kept) - len(limited)}
        ranked = _ranked(ranking, len(prints))
        places = [place for place, rank in enumerate(ranked) if rank is not None]
        result = pair_up(
            [-float(ranked[place]) for place in places],  # pyright: ignore[reportArgumentType]  (None is sorted out)
            mode=self.mode,
            max_pairs=self.limit,
            identities=[prints[place] for place in places],
        )
        counts = {"ties_dropped": result.ties_dropped, "over_limit": result.over_limit}
        counts |= {"unranked": len(prints) - len(places), "same_pictures": result.duplicates_dropped}
        return [(places[pair.chosen], places[pair.rejected]) for pair in result.pairs], counts


def _checked(content: bytes, path: str) -> str:
    try:
        return check_picture(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _ranked(ranking: Any, count: int) -> list[float | None]:
    if not isinstance(ranking, list) or len(ranking) != count:
        found = len(ranking) if isinstance(ranking, list) else repr(ranking)
        raise ValueError(f"'ranking' must give a number for each of the {count} pictures, found {found}")
    for rank in ranking:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) < 1e9):
            raise ValueError(f"'ranking' must be of numbers (1 the best) or null, found {rank!r}")
    return ranking


def partial_order(better: Any, count: int) -> list[tuple[int, int]]:
    """All (i, j) with i preferred to j that follow from the given ones, in order of i, then j.

    Raises:
        ValueError: not a list of two different positions below ``count`` each, or the preferences go in a circle.
    """
    above: list[set[int]] = [set() for _ in range(count)]
    for one in better if isinstance(better, list) else [better]:
        whole = isinstance(one, list) and len(one) == 2 and all(isinstance(i, int) and not isinstance(i, bool) for i in one)
        if not whole or not all(0 <= i < count for i in one) or one[0] == one[1]:
            raise ValueError(f"'better' must be a list of [i, j], two different pictures of 0 to {count - 1}; found {one!r}")
        above[one[0]].add(one[1])
    for middle in range(count):  # Warshall's closure
        for first in range(count):
            if middle in above[first]:
                above[first] |= above[middle]
    for i, j in combinations(range(count), 2):
        if j in above[i] and i in above[j]:
            raise ValueError(f"'better' goes in a circle: picture {i} is above {j}, and {j} above {i}")
    return [(i, j) for i in range(count) for j in sorted(above[i])]
