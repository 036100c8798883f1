"""Clinical tables to the files that alignment reads::

    python -m polyalign.datasets.clinical.rows tables data --style physician

Into a new folder:

- ``prompts-train.jsonl`` and ``prompts-heldout.jsonl``: a condition a line, {"prompt", "source", "reference", "task", "stay"};
  the source is the stay alone, for judges of facts, the reference the doctors' summary where there is one, the stay a HADM_ID;
- ``sft.jsonl``: {"prompt", "completion"}, the doctors' summaries of the stays for training;
- ``pairs.jsonl``: {"prompt", "source", "chosen", "rejected", "error", "before", "after", "stay"}, the doctors' summaries
  against the same with one known error (:mod:`polyalign.datasets.clinical.corruption`);
- ``lexicon.json``: every name in the stays, by kind, for the judge ``clinical_facts``;
- ``summary.json``: what was read, left out and written.

A patient is either in training or held out, by the hash of the SUBJECT_ID, with all stays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import disk_full_explained
from polyalign.core.randomness import seed_of
from polyalign.datasets.clinical.corruption import ERRORS, corrupt
from polyalign.datasets.clinical.instructions import instruction_prompt, styles
from polyalign.datasets.clinical.mimic import KINDS, MimicReader, Record
from polyalign.datasets.clinical.stay import Stay, prompt_of

HELD_OUT_SHARE = 8
"""One patient in so many is held out."""
DONORS = 256
"""Summaries, the latest ones, that an invented sentence is taken from."""
FILES = ("prompts-train.jsonl", "prompts-heldout.jsonl", "sft.jsonl", "pairs.jsonl")


def held_out(subject_id: str) -> bool:
    """Whether a patient takes no part in training and alignment."""
    return hashlib.sha256(f"subject {subject_id}".encode()).digest()[0] % HELD_OUT_SHARE == 0


def condition_of(record: Record, style: str = "physician") -> dict[str, Any]:
    """A record as a condition; see the module's text for its keys."""
    told = {} if record.reference is None else {"reference": record.reference}
    own = {"prompt": instruction_prompt(record.stay, style), "source": prompt_of(record.stay)}
    return {**own, **told, "task": "summary", "stay": record.hadm_id}


def sft_row(record: Record, style: str = "physician") -> dict[str, Any] | None:
    """A prompt with the doctors' summary as completion; None where there is none."""
    return {"prompt": instruction_prompt(record.stay, style), "completion": record.reference} if record.reference else None


def pair_row(
    record: Record,
    style: str = "physician",
    *,
    donors: Sequence[str] = (),
    errors: Sequence[str] = ERRORS,
    seed: int = 0,
) -> dict[str, Any] | None:
    """The doctors' summary as chosen, the same with one error as rejected; None where there is no summary, or none of the
    errors is possible in it. ``donors`` are summaries of others, for what is invented."""
    if not record.reference:
        return None
    worse = corrupt(record.reference, random.Random(seed_of(seed, "corruption", record.hadm_id)), errors=errors, donors=donors)
    if worse is None:
        return None
    sides = {"chosen": record.reference, "rejected": worse.text}
    said = {"error": worse.error, "before": worse.before, "after": worse.after, "stay": record.hadm_id}
    return {"prompt": instruction_prompt(record.stay, style), "source": prompt_of(record.stay), **sides, **said}


class Names:
    """The names of events by kind, for a lexicon: each with what stands before its first comma as another wording, since
    titles of codes are of the form 'Pneumonia, organism unspecified', and nobody writes that."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS}

    def add(self, stay: Stay) -> None:
        for event in stay.events:
            short = event.name.split(",")[0].strip()
            useful = short != event.name and sum(letter.isalpha() for letter in short) >= 4
            self._found[event.kind][event.name] = [short] if useful else []

    def lexicon(self) -> dict[str, dict[str, list[str]]]:
        return {kind: dict(sorted(names.items())) for kind, names in self._found.items()}


def write_rows(
    folder: str | Path, reader: MimicReader, *, style: str = "physician", errors: Sequence[str] = ERRORS, seed: int = 0
) -> dict[str, Any]:
    """Write the files into ``folder``, which gets its name when all is in it, and return what ``summary.json`` holds.

    One stay is in memory at a time besides those that ``reader`` holds.

    Raises:
        UserError: there is something in ``folder``; the tables cannot be read; an unknown style; no stay is left.
    """
    folder = Path(folder)
    if style not in styles():
        raise UserError(f"there is no style {style!r} of prompts; choose one of: {', '.join(styles())}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; nothing was written. Give another folder, or move this one away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the rows in {folder}"):
            summary = _write(partial / "rows", reader, style, errors, seed)
            if folder.exists():
                folder.rmdir()
            (partial / "rows").rename(folder)
    finally:
        shutil.rmtree(partial)
    return summary


def _write(folder: Path, reader: MimicReader, style: str, errors: Sequence[str], seed: int) -> dict[str, Any]:
    folder.mkdir()
    names, donors, written = Names(), deque[str](maxlen=DONORS), Counter[str]()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "w", encoding="utf-8", newline="\n")) for name in FILES}
        for record in reader.records():
            names.add(record.stay)
            for name, row in _rows_of(record, style, donors, errors, seed).items():
                files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
                written[name] += 1
            if record.reference and not held_out(record.subject_id):
                donors.append(record.reference)
    if not written:
        raise UserError(f"{reader.admissions.path}: no stay is left of {reader.tally.counts['admissions']} admissions")
    read, dropped = (dict(sorted(counts.items())) for counts in (reader.tally.counts, reader.tally.dropped))
    summary = {"style": style, "read": read, "dropped": dropped, "written": {name: written[name] for name in FILES}}
    for name, content in (("lexicon.json", names.lexicon()), ("summary.json", summary)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return summary


def _rows_of(record: Record, style: str, donors: Sequence[str], errors: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """The row of each file that a record gives one for."""
    condition = condition_of(record, style)
    if held_out(record.subject_id):
        return {"prompts-heldout.jsonl": condition}
    pair = pair_row(record, style, donors=donors, errors=errors, seed=seed)
    found = {"prompts-train.jsonl": condition, "sft.jsonl": sft_row(record, style), "pairs.jsonl": pair}
    return {name: row for name, row in found.items() if row is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        reader = MimicReader(
            given.tables,
            kinds=given.kinds,
            labs=given.labs,
            notes=not given.no_notes,
            limit=given.limit,
            on_bad_row=given.on_bad_row,
        )
        summary = write_rows(given.folder, reader, style=given.style, errors=given.errors, seed=given.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    dropped = "".join(f", {count} {kind}" for kind, count in summary["dropped"].items())
    print(f"{given.folder}: {', '.join(f'{count} in {name}' for name, count in summary['written'].items())}{dropped}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.datasets.clinical.rows", description="Prompts and preference rows from clinical tables"
    )
    parser.add_argument("tables", type=Path, metavar="TABLES", help="folder of tables in MIMIC-III's layout (.csv or .csv.gz)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not be there yet, or be empty")
    parser.add_argument("--style", choices=styles(), default="physician", help="of the prompts (default: physician)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="events to tell (default: all)")
    parser.add_argument("--labs", choices=("abnormal", "all"), default="abnormal", help="values to tell (default: abnormal)")
    parser.add_argument("--no-notes", action="store_true", help="without NOTEEVENTS: prompts only, no references")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N admissions")
    parser.add_argument("--errors", nargs="+", choices=ERRORS, default=ERRORS, help="of the rejected summaries (default: all)")
    parser.add_argument("--on-bad-row", choices=("error", "drop"), default="error", help="stop, or leave it out and count it")
    parser.add_argument("--seed", type=int, default=0, help="of the errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
