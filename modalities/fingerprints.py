"""Hashes of what a run reads, as inputs of its stages: another file under the same name makes a stage stale."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.datasets.formats.table import Format, listed_files

if TYPE_CHECKING:
    from polyalign.core.recipe import JudgeConfig

MODEL_FILES = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".txt", ".model"})
"""Endings of the files that a model is read from: weights, configurations, vocabularies."""


def fingerprint(path: str | None, *, endings: frozenset[str] | None = None) -> str | None:
    """Content hash of a file or of all files in a folder (those with certain ``endings``); None stays None.

    Raises:
        UserError: there is nothing at ``path``.
    """
    if path is None:
        return None
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder (relative to the working directory {Path.cwd().name}/)")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    kept = [file for file in files if file == place or endings is None or file.suffix in endings]
    return sha256_of("\n".join(f"{file.relative_to(place)} {_content(file)}" for file in kept).encode())


def _content(file: Path) -> str:
    status = file.stat()
    return _content_once(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_once(file: Path, size: int, changed_ns: int) -> str:
    """A file's hash, computed once a process as long as its size and time stay: several stages ask for gigabytes of weights."""
    return sha256_of(file)


def model_files(places: Mapping[str, str | None], *, endings: frozenset[str] = MODEL_FILES) -> dict[str, Any]:
    """Hashes of the files that a model is read from, by what they are to it: another base under the same name is another base.
    Empty for a base on a model hub, which a revision pins."""
    here = {name: Path(place).expanduser() for name, place in places.items() if place is not None}
    hashes = {name: fingerprint(str(place), endings=endings) for name, place in here.items() if place.exists()}
    return {"model_files": hashes} if hashes else {}


def judge_files(specs: Sequence[JudgeConfig]) -> dict[str, Any]:
    """Hashes of the files on this machine that judges are read from: other weights under the same name are another judge.
    Empty for judges without any, or from a model hub, which a revision pins."""
    from polyalign.evaluation import judges

    ours = [judges.build(spec) for spec in specs if spec.name in judges.JUDGES]
    paths = sorted({str(path) for judge in ours for path in getattr(judge, "local_files", list)()})
    return {"judges": {path: fingerprint(path) for path in paths}} if paths else {}


def listed(
    source: str, location: str | None, formats: Mapping[str, Format], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The hash of the files that the data's own file only names; ``options`` are the source's."""
    if source not in formats or location is None:
        return {}
    return files_named("listed", listed_files(source, location, formats, options), location)


def files_named(key: str, files: Sequence[Path], location: str) -> dict[str, Any]:
    """The hash of ``files``, named from beside ``location``, under ``key``; empty without any."""
    beside = Path(location).parent
    hashes = "\n".join(f"{os.path.relpath(file, beside)} {fingerprint(str(file))}" for file in files)
    return {key: sha256_of(hashes.encode())} if files else {}
