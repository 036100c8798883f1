"""The formats of preference pairs by name: one row each, and nothing else to edit for the next one.

Pictures, texts and sounds have a table each. A row names where its data lie (the recipe's key under ``pairs``), the function
that reads them into a pair store and the one that writes them from it, as ``module:function``. An importer is ``f(path, store,
*, on_bad_row, **options)``; its keyword arguments with defaults are its options, and their annotations what is allowed. An
exporter is ``f(store, folder)``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from polyalign.core.errors import UserError

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge
    from polyalign.datasets.formats.own_samples import Drawing
    from polyalign.datasets.pairs import PairStore

Place = Literal["folder", "path", "store"]
_HERE = "polyalign.datasets.formats"


@dataclass(frozen=True)
class Format:
    """One row. ``what`` ends the sentence "source 'x' needs 'path', ..."; ``needs`` names what the importer is given besides: a
    ``judge``, or a ``drawing`` (who samples from the base). ``lists`` gives the files that the data's own file only names."""

    name: str
    place: Place
    what: str
    reads: str
    writes: str | None = None
    needs: Literal["judge", "drawing"] | None = None
    lists: str | None = None


FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "folders",
            "folder",
            "the one that holds chosen/ and rejected/",
            f"{_HERE}.folders:import_folders",
            f"{_HERE}.folders:export_folders",
        ),
        Format(
            "suffixes",
            "folder",
            "the one that holds NAME_w.png and NAME_l.png",
            f"{_HERE}.suffixes:import_suffixes",
            f"{_HERE}.suffixes:export_suffixes",
        ),
        Format(
            "jsonl",
            "path",
            "a file of lines with prompt, chosen and rejected",
            f"{_HERE}.jsonl:import_jsonl",
            f"{_HERE}.jsonl:export_jsonl",
            lists=f"{_HERE}.jsonl:listed",
        ),
        Format(
            "pickapic",
            "path",
            "a parquet file or a folder of them",
            f"{_HERE}.pickapic:import_pickapic",
            f"{_HERE}.pickapic:export_pickapic",
        ),
        Format(
            "rows",
            "path",
            "a parquet file, a folder of them, or a saved data set",
            f"{_HERE}.rows:import_rows",
            f"{_HERE}.rows:export_rows",
        ),
        Format(
            "webdataset",
            "path",
            "a tar file or a folder of them",
            f"{_HERE}.webdataset:import_webdataset",
            f"{_HERE}.webdataset:export_webdataset",
        ),
        Format(
            "rankings",
            "path",
            "a file of prompts, pictures and their ranking",
            f"{_HERE}.rankings:import_rankings",
            lists=f"{_HERE}.rankings:listed",
        ),
        Format("store", "store", "the folder of a pair store", f"{_HERE}.stores:import_store"),
        Format("relabel", "store", "the folder of a pair store", f"{_HERE}.stores:relabel", needs="judge"),
        Format(
            "own_samples",
            "folder",
            "the one that holds pictures and their captions",
            f"{_HERE}.own_samples:import_own_samples",
            needs="drawing",
        ),
    )
}


TEXT_FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "rows",
            "path",
            "a parquet file, a folder of them, a saved data set, or a file of JSON lines",
            f"{_HERE}.text_rows:import_text_rows",
        ),
        Format("jsonl", "path", "a file of JSON lines, or a .json file that is a list", f"{_HERE}.text_rows:import_text_rows"),
        Format("store", "store", "the folder of a pair store of texts", f"{_HERE}.stores:import_store"),
        Format("relabel", "store", "the folder of a pair store of texts", f"{_HERE}.stores:relabel", needs="judge"),
    )
}

SOUND_FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "alpaca",
            "path",
            "a parquet file or a folder of them, with prompt, chosen, rejected and strategy",
            f"{_HERE}.sounds:import_alpaca",
            f"{_HERE}.sounds:export_alpaca",
        ),
        Format(
            "jsonl",
            "path",
            "a file of lines with prompt, chosen and rejected",
            f"{_HERE}.sounds:import_sound_jsonl",
            f"{_HERE}.jsonl:export_jsonl",
            lists=f"{_HERE}.jsonl:listed",
        ),
        Format(
            "folders",
            "folder",
            "the one that holds chosen/ and rejected/",
            f"{_HERE}.sounds:import_sound_folders",
            f"{_HERE}.folders:export_folders",
        ),
        Format("store", "store", "the folder of a pair store of sounds", f"{_HERE}.stores:import_store"),
        Format("relabel", "store", "the folder of a pair store of sounds", f"{_HERE}.stores:relabel", needs="judge"),
    )
}

FORMATS_OF: Mapping[str, Mapping[str, Format]] = {"picture": FORMATS, "text": TEXT_FORMATS, "sound": SOUND_FORMATS}
"""The tables by the kind of outputs."""

ANSWER_SOURCES: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "rows",
            "path",
            "a file of JSON lines, a .json list, a parquet file, or a folder of them: conversations about pictures",
            f"{_HERE}.visual_rows:import_visual_rows",
            lists=f"{_HERE}.visual_rows:listed",
        ),
        Format("store", "store", "the folder of a pair store of texts", f"{_HERE}.stores:import_store"),
        Format("relabel", "store", "the folder of a pair store of texts", f"{_HERE}.stores:relabel", needs="judge"),
    )
}
"""What a recipe of vision-language models reads: pairs of texts whose conditions have pictures."""

IMAGE_SOURCES: Mapping[str, Format] = {
    **FORMATS,
    "labels": Format(
        "labels",
        "path",
        "a folder that holds liked/ and disliked/, or a file of lines with prompt, image and label",
        "polyalign.datasets.picture_labels:import_picture_labels",
        lists="polyalign.datasets.picture_labels:listed",
    ),
}
"""What an image recipe reads: formats of pairs, and single pictures with a label."""

TEXT_SOURCES: Mapping[str, Format] = {
    **TEXT_FORMATS,
    "labels": Format(
        "labels",
        "path",
        "a file or folder of rows with prompt, completion and label",
        "polyalign.datasets.labels:import_labels",
    ),
}
"""What a text recipe reads: formats of pairs, and single answers with a label, which are no pairs and have a store of their
own."""


def checked_options(name: str, options: Mapping[str, Any], formats: Mapping[str, Format] = FORMATS) -> dict[str, Any]:
    """The options of a format, ready for its importer.

    Raises:
        ValueError: it has no such option, or a value of another kind.
    """
    from pydantic import TypeAdapter, ValidationError

    importer = _load(formats[name].reads)
    parameters = inspect.signature(importer).parameters.values()
    known = [one.name for one in parameters if one.default is not inspect.Parameter.empty and one.name != "on_bad_row"]
    hints = get_type_hints(importer, include_extras=True)
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"options.{option}: source '{name}' has no such option; its options: {', '.join(known) or 'none'}")
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"options.{option}: {error.errors()[0]['msg']} (found {value!r})") from error
    return dict(options)


def import_format(
    name: str,
    path: str | Path,
    store: PairStore,
    *,
    on_bad_row: Literal["error", "drop"] = "error",
    options: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    drawing: Drawing | None = None,
    formats: Mapping[str, Format] = FORMATS,
) -> dict[str, Any]:
    """Read the data at ``path`` into ``store`` and return the summary; ``formats`` is the table of the store's kind.

    Raises:
        UserError: no such format or option, or whatever is wrong with the data.
    """
    row = _row(name, formats)
    try:
        given = checked_options(name, options or {}, formats)
    except ValueError as error:
        raise UserError(str(error)) from error
    if row.needs:
        given[row.needs] = {"judge": judge, "drawing": drawing}[row.needs]
        if given[row.needs] is None:
            raise UserError(f"source '{name}' needs a {row.needs}")
    return _load(row.reads)(Path(path), store, on_bad_row=on_bad_row, **given)


def listed_files(
    name: str, path: str | Path, formats: Mapping[str, Format] = FORMATS, options: Mapping[str, Any] | None = None
) -> list[Path]:
    """The files that the data at ``path`` are made of besides ``path`` itself, where it only names them; ``options`` are those
    of the importer, of which some say where they lie.

    Raises:
        UserError: no such format, or the file that names them cannot be read.
    """
    lists = _row(name, formats).lists
    if lists is None:
        return []
    listing = _load(lists)
    known = inspect.signature(listing).parameters
    return listing(Path(path), **{option: value for option, value in (options or {}).items() if option in known})


def exporter(name: str, formats: Mapping[str, Format] = FORMATS) -> Callable[[PairStore, Path], None]:
    """The function that writes a store in this format.

    Raises:
        UserError: no such format, or one that is only read.
    """
    writes = _row(name, formats).writes
    if writes is None:
        able = ", ".join(row.name for row in formats.values() if row.writes)
        raise UserError(f"'{name}' is only read, not written; formats that are written: {able}")
    return _load(writes)


def _row(name: str, formats: Mapping[str, Format] = FORMATS) -> Format:
    if name not in formats:
        raise UserError(f"there is no format '{name}'; formats: {', '.join(formats)}")
    return formats[name]


def _load(place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
