"""GenEval's folders, in and out, so that pictures can go to the published evaluator and come from published samplers::

FOLDER/00000/metadata.jsonl         the prompt's line of evaluation_metadata.jsonl
FOLDER/00000/samples/0000.png       pictures of it; only names of digits count, as in the published code
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write

PICTURE = re.compile(r"\d+\.png")


def write_folder(folder: str | Path, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> Path:
    """Write pictures with their conditions; equal conditions share a numbered folder, in the order they first come.

    Raises:
        UserError: there is something at ``folder`` already.
        ValueError: another number of pictures than of conditions.
    """
    if len(conditions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures for {len(conditions)} conditions")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give another folder, or an empty one")
    numbers: dict[str, list[int]] = {}
    for place, condition in enumerate(conditions):
        numbers.setdefault(json.dumps(dict(condition), ensure_ascii=False), []).append(place)
    for number, (metadata, places) in enumerate(numbers.items()):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        atomic_write(samples.parent / "metadata.jsonl", metadata)
        for sample, place in enumerate(places):
            pictures[place].convert("RGB").save(samples / f"{sample:04d}.png")
    return folder


def read_folder(folder: str | Path) -> list[tuple[dict[str, Any], Path]]:
    """(metadata, picture's path) of every picture, in the order of the numbers.

    Raises:
        UserError: no numbered folders, none of them with a picture, or metadata that is absent or unreadable.
    """
    folder = Path(folder)
    numbered = sorted((path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()), key=lambda path: path.name)
    found = []
    for prompt in numbered:
        samples = [path for path in (prompt / "samples").glob("*") if PICTURE.fullmatch(path.name) and path.is_file()]
        metadata = _metadata(prompt / "metadata.jsonl")
        found += [(metadata, path) for path in sorted(samples, key=lambda path: (len(path.name), path.name))]
    if not found:
        raise UserError(f"{folder}: no pictures in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png) are there")
    return found


def write_results(path: str | Path, results: Sequence[tuple[Mapping[str, Any], Path, bool, Sequence[str]]]) -> None:
    """(metadata, picture, correct, reasons) as the published results file: a JSON object a line, which its summary reads."""
    lines = [
        json.dumps(
            {
                "filename": str(picture),
                "tag": metadata.get("tag"),
                "prompt": metadata.get("prompt"),
                "correct": correct,
                "reason": "\n".join(reasons),
                "metadata": json.dumps(dict(metadata), ensure_ascii=False),
            },
            ensure_ascii=False,
        )
        for metadata, picture, correct, reasons in results
    ]
    atomic_write(path, "".join(f"{line}\n" for line in lines))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); it holds the prompt's line of GenEval's prompts") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content
