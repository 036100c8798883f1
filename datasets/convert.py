"""Pair stores to public formats and back::

    python -m polyalign.datasets.convert runs/x/pairs --to webdataset shards      a store into a new folder
    python -m polyalign.datasets.convert my_pairs --from pickapic data/ --option split=train      into a new store
    python -m polyalign.datasets.convert my_pairs --outputs sound --from alpaca audio-alpaca/     of sounds

An import that was interrupted goes on when the same command is given again. A recipe reads the new store with
``pairs: {source: store, store: my_pairs}``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyalign.core.config_source import parse_value
from polyalign.core.errors import UserError
from polyalign.datasets.formats.exporting import export_pairs
from polyalign.datasets.formats.table import FORMATS_OF, exporter, import_format
from polyalign.datasets.pairs import PairStore

OUTPUTS = ("picture", "sound")
"""Kinds of outputs that have formats to be written in."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.to:
            _export(given)
        else:
            _import(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    description = "Pair stores to formats and back"
    parser = argparse.ArgumentParser(prog="python -m polyalign.datasets.convert", description=description)
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the pair store")
    way = parser.add_mutually_exclusive_group(required=True)
    every = {name: row for outputs in OUTPUTS for name, row in FORMATS_OF[outputs].items()}
    written = [name for name, row in every.items() if row.writes]
    read = [name for name, row in every.items() if not row.needs]
    way.add_argument("--to", nargs=2, metavar=("FORMAT", "FOLDER"), help=f"write a new folder: {', '.join(written)}")
    way.add_argument("--from", nargs=2, dest="source", metavar=("FORMAT", "PATH"), help=f"read into a store: {', '.join(read)}")
    parser.add_argument("--outputs", choices=OUTPUTS, default="picture", help="with --from: what the pairs are of")
    parser.add_argument("--on-bad-row", choices=("error", "drop"), default="error", help="with --from: stop, or leave it out")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="with --from: one of the format's")
    return parser


def _export(given: argparse.Namespace) -> None:
    name, folder = given.to
    if given.option or given.on_bad_row != "error":
        raise UserError("--option and --on-bad-row belong to --from; the formats are written in one way")
    store = PairStore(given.store)
    outputs = store.kind.name if store.shards() else given.outputs
    if outputs not in OUTPUTS:
        raise UserError(
            f"{given.store} holds pairs of {outputs}s, and these formats are of pictures or sounds. Its shards are parquet "
            "files that Hugging Face datasets opens; a recipe reads the store itself with pairs: {source: store, store: FOLDER}"
        )
    count = export_pairs(store, exporter(name, FORMATS_OF[outputs]), Path(folder))
    print(f"{folder}: {count} pairs as {name}")


def _import(given: argparse.Namespace) -> None:
    name, path = given.source
    formats = FORMATS_OF[given.outputs]
    row = formats.get(name)
    if row and row.needs:
        more = "needs judges, which a recipe names" if row.needs == "judge" else "samples from a model, which a recipe names"
        raise UserError(f"'{name}' {more}: pairs: {{source: {name}, {row.place}: {path}, ...}}")
    store = PairStore(given.store)
    summary = import_format(name, path, store, on_bad_row=given.on_bad_row, options=_options(given.option), formats=formats)
    dropped = {key: summary[key] for key in summary if key.endswith("_dropped") and summary[key]}
    said = "".join(f", {count} {key.replace('_', ' ')}" for key, count in dropped.items())
    print(f"{store.folder}: {summary['pairs']} pairs from {summary['rows']} rows{said} (see summary.json)")


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise UserError(f"--option: write it as key=value, for example split=train (found {option!r})")
        options[name] = parse_value(value)
    return options


if __name__ == "__main__":
    sys.exit(main())
