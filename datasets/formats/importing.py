"""Any public format to the pair store: in order, in shards, going on where an interrupted import stopped.

A format is a :class:`Source`: it gives :class:`Entry` objects in a fixed order, each of which reads its outputs only when
asked. Shard i holds the pairs of entries i*R to (i+1)*R - 1, so its bytes depend on these entries alone and an import that was
killed goes on at the first missing shard, without reading the outputs before it. Beside ``pairs-00000.parquet`` lies
``imported-00000.json``: what became of the entries that are in no pair. ``import.json`` says what is imported, so that shards
of two different imports never come together; ``summary.json`` is computed from all these at the end.

A bad row is an error that names file and row (all of its shard's are listed); with ``on_bad_row="drop"`` it is left out,
counted and listed in ``summary.json``. Data from which nothing can be read (a missing column, a damaged file) are always an
error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.datasets.files import listed, remove_unfinished
from polyalign.datasets.formats.import_summary import column_of, no_pairs, note_path, notes_of, summary_of
from polyalign.datasets.formats.source import JUDGE, Entry, OnBadRow, Outcome, Pair, Source
from polyalign.datasets.outputs import KINDS
from polyalign.datasets.pair_rows import SCORES, SIDES
from polyalign.datasets.pairs import PairStore

NOTE = "import.json"


def import_pairs(source: Source, store: PairStore, *, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store`` from ``source``, write its ``summary.json`` and return the summary. Finished already, it changes nothing.

    A pair whose two outputs are the same (pictures: to the pixel) holds no preference: it is left out and counted.

    Raises:
        UserError: bad rows (unless dropped), no pair left, the store holds other pairs or is for another kind of outputs, or no
            room on the disk; finished shards are kept.
    """
    _same_outputs(source, store)
    around = source.problems()
    if around and on_bad_row == "error":
        raise UserError(f"{source.path}: {len(around)} problem(s), nothing was imported:\n{listed(around)}\n{_ADVICE}")
    store.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(store.folder)
    _claim(store, {"source": source.name, "rows_per_shard": source.rows_per_shard, **source.identity()})
    work = _Import(source, store, on_bad_row)
    work.run()
    summary = summary_of(source, store, around)
    atomic_write(store.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if not summary["pairs"]:
        raise UserError(no_pairs(source, summary))
    if summary["rows_dropped"] and on_bad_row == "error":
        raise UserError(
            f"{store.folder}: {summary['rows_dropped']} bad row(s) were left out here before (summary.json lists them), and "
            "now they are to be an error. Ask for drop again, or import into another folder"
        )
    return summary


def _same_outputs(source: Source, store: PairStore) -> None:
    """Raises UserError if the store is for another kind of outputs than the source has; one that is for none takes on its."""
    if store.outputs not in (None, source.outputs):
        found, wanted = KINDS[source.outputs].words, KINDS[store.outputs].words
        raise UserError(f"{source.path}: holds pairs of {found}, and pairs of {wanted} are needed here")
    if source.pictured and store.outputs is not None and not store.pictured:
        raise UserError(
            f"{source.path}: holds pairs of answers about pictures, and pairs without pictures are needed here. "
            "Recipes of 'modality: vlm' take these"
        )
    store.outputs, store.pictured = source.outputs, store.pictured or source.pictured


_ADVICE = (
    "Mend this and run again, or leave such rows out with pairs.on_bad_row: drop (convert: --on-bad-row drop); they are then "
    "counted and listed in summary.json"
)


def _claim(store: PairStore, inputs: Mapping[str, Any]) -> None:
    """Write ``import.json``, or compare it with the one there.

    Raises:
        UserError: the folder's shards are of other data, or were not imported.
    """
    note, wanted = store.folder / NOTE, json.loads(json.dumps(inputs))
    if store.shards():
        try:
            before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        except ValueError as error:
            raise UserError(f"{note}: is damaged ({error}). Remove the folder to import its pairs anew") from error
        if before != wanted:
            changed = [key for key in wanted if (before or {}).get(key) != wanted[key]]
            what = f"from other data or with other settings ({', '.join(changed)} changed)" if before else "made in another way"
            raise UserError(f"{store.folder}: holds pairs {what}. Take another folder, or remove this one to import anew")
    atomic_write(note, json.dumps(wanted, indent=1) + "\n")


class _Import:
    """One import: shards that are missing, made in order."""

    def __init__(self, source: Source, store: PairStore, on_bad_row: OnBadRow):
        self.source, self.store, self.on_bad_row = source, store, on_bad_row
        self.kind = KINDS[source.outputs]
        self.seen: set[str] = set()
        self.known_judges = source.judges

    def run(self) -> None:
        size, first = self.source.rows_per_shard, 0
        while self._finished(first):
            self._note_ids(first)
            first += 1
        entries, index = self.source.entries(first * size), first
        total = self.source.total()
        with ProgressLine("importing (rows)", total=total or 0, start=first * size, visible=total is not None) as line:
            while part := list(islice(entries, size)):
                if self._finished(index):
                    self._note_ids(index)
                else:
                    self._make(index, part)
                line.advance(count=len(part))
                index += 1
        self._remove_from(index)

    def _finished(self, index: int) -> bool:
        return self.store.shard_path(index).is_file() and note_path(self.store, index).is_file()

    def _note_ids(self, index: int) -> None:
        self.seen.update(column_of(self.store.shard_path(index), "pair_id"))

    def _remove_from(self, index: int) -> None:
        """Shards of nothing: the source has no entries for them."""
        for path in self.store.shards():
            if int(path.stem.removeprefix("pairs-")) >= index:
                path.unlink()
        for path in notes_of(self.store):
            if int(path.stem.removeprefix("imported-")) >= index:
                path.unlink()

    def _make(self, index: int, part: Sequence[Entry]) -> None:
        """Write one shard, and before it the note about the entries that are not in it."""
        kept: list[Pair] = []
        duplicates: list[str] = []
        dropped: list[dict[str, str]] = []
        counts: Counter[str] = Counter(rows=len(part))
        for entry in part:
            try:
                outcome = entry.read()
                pairs, same = self._looked_at(outcome)
            except ValueError as error:  # also json.JSONDecodeError and UnicodeDecodeError
                dropped.append({"place": _printable(entry.place), "problem": _printable(str(error))})
                continue
            kept += pairs
            duplicates += same
            counts.update(outcome.counts, samples=outcome.samples, without_pair=int(not pairs))
        if dropped and self.on_bad_row == "error":
            lines = listed([f"{row['place']}: {row['problem']}" for row in dropped])
            raise UserError(
                f"{self.source.path}: {len(dropped)} bad row(s); shards finished before are kept:\n{lines}\n{_ADVICE}"
            )
        note = {"counts": dict(sorted(counts.items())), "duplicates": duplicates, "dropped": dropped}
        atomic_write(note_path(self.store, index), json.dumps(note, indent=1, ensure_ascii=False) + "\n")
        self.store.write_shard(index, [self._row(pair) for pair in kept], judges=self._judges())

    def _looked_at(self, outcome: Outcome) -> tuple[list[Pair], list[str]]:
        """The entry's pairs with two different outputs, and the ids of the others.

        Raises:
            ValueError: an output that cannot be used, an id used before, scores of other judges.
        """
        kept, same, ids = [], [_printable(name) for name in outcome.duplicates], []
        for pair in outcome.pairs:
            if pair.pair_id in self.seen or pair.pair_id in ids:
                raise ValueError(f"the name {pair.pair_id!r} was used before, and every pair needs its own")
            _check_text(pair)
            if not pair.checked and self._checked(pair, "chosen") == self._checked(pair, "rejected"):
                same.append(pair.pair_id)
                continue
            judges = sorted(self._judges())
            if any(sorted(scores) != judges for scores in pair.scores):
                raise ValueError(f"scores of {sorted(pair.scores[0])}, but the first pair has scores of {judges}")
            kept.append(pair)
            ids.append(pair.pair_id)
        self.seen.update(ids)
        return kept, same

    def _checked(self, pair: Pair, side: str) -> str:
        try:
            return self.kind.check(getattr(pair, side))
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from error

    def _row(self, pair: Pair) -> dict[str, Any]:
        """The pair as the store takes it."""
        provenance = pair.provenance
        if provenance is None:
            hashes = {f"{side}_sha256": self.kind.fingerprint(getattr(pair, side)) for side in SIDES}
            judges = {name: {"version": "1"} for name in pair.scores[0]}
            provenance = {"sampler": {"source": self.source.name, **pair.origin, **hashes}, "judges": judges}
        return {
            "pair_id": pair.pair_id,
            "condition": pair.condition,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            **dict(zip(SCORES, pair.scores, strict=True)),
            "provenance": provenance,
            **pair.losing,
        }

    def _judges(self) -> Sequence[str]:
        """Whose scores the store holds: the source's word, or that of its first good pair."""
        if self.known_judges is None:
            self.known_judges = next(_judges_found(self.source.entries(0)), (JUDGE,))
        return self.known_judges


def _judges_found(entries: Iterable[Entry]) -> Iterator[Sequence[str]]:
    for entry in entries:
        try:
            outcome = entry.read()
        except ValueError:
            continue  # reported when its shard is made
        yield from (sorted(pair.scores[0]) for pair in outcome.pairs)


def _printable(text: str) -> str:
    """File names may be no Unicode at all; what is written about them is."""
    return text.encode("utf-8", "backslashreplace").decode()


def _nothing(picture: Any) -> None:
    """In the place of a picture's bytes in a condition.

    Raises:
        TypeError: something else that JSON cannot hold.
    """
    if not isinstance(picture, bytes):
        raise TypeError(f"a condition has {picture!r} in it, which JSON cannot hold"[:200])


def _check_text(pair: Pair) -> None:
    """Raises ValueError for text that no file can hold: half of a Unicode pair, as JSON and file names may have it."""
    try:
        plain = [pair.pair_id, pair.condition, dict(pair.origin), pair.provenance]
        json.dumps(plain, ensure_ascii=False, default=_nothing).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text that is not Unicode: {error.object[max(0, error.start - 20) : error.end]!r}") from error
