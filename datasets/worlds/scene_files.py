"""Folders of questions and benchmarks about pictures of known objects, as the worlds `scenes` and `emoji_scenes` write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def pope_pair(number: int, image: str, picture: Image.Image, there: str, absent: str) -> list[dict[str, Any]]:
    """POPE's lines of one object that is there and one that is not, with their ``picture``; the first has this number.

    Args:
        there: the question about the one that is there.
    """
    asked = ((there, "yes"), (absent, "no"))
    return [
        {"question_id": number + place, "image": image, "text": text, "label": label, "picture": picture}
        for place, (text, label) in enumerate(asked)
    ]


def write_benchmarks(
    folder: str | Path,
    world: str,
    pope: Mapping[str, Sequence[Mapping[str, Any]]],
    described: Sequence[Mapping[str, Any]],
    synonyms: Iterable[Sequence[str]],
) -> Path:
    """Write ``pope/`` (``{world}_pope_random.json`` and the like, JSON lines) and ``chair/`` (``objects.json``,
    ``synonyms.txt``, ``captions.jsonl``) with their pictures, as ``evaluation/vlm`` reads them. Returns the folder.

    Args:
        pope: lines by POPE's split, each with its ``picture``.
        described: lines of ``image``, ``picture``, ``text`` (what is asked), ``objects``, ``reference``.
        synonyms: all names of every object that is looked for, its own first.
    """
    folder = Path(folder)
    for part in ("pope", "chair"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for kind, lines in pope.items():
        write_lines(folder / "pope" / f"{world}_pope_{kind}.json", lines)
    write_lines(folder / "chair" / "captions.jsonl", described)
    (folder / "chair" / "objects.json").write_text(json.dumps({one["image"]: one["objects"] for one in described}, indent=1))
    write_synonyms(folder / "chair" / "synonyms.txt", synonyms)
    return folder


def write_synonyms(file: Path, synonyms: Iterable[Sequence[str]]) -> None:
    """CHAIR's list: a line an object, its names separated by commas, the first one its own."""
    file.write_text("".join(f"{', '.join(names)}\n" for names in synonyms))


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, and beside them the ``picture`` of each that has one, by the name in ``image``."""
    for name, picture in {line["image"]: line["picture"] for line in lines if "picture" in line}.items():
        picture.save(file.parent / name)
    kept = ({key: value for key, value in line.items() if key != "picture"} for line in lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
