"""COCO's annotation files: captions and instances by image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.sheets import field_of, read_json


def captions(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of ``captions_*.json``.

    Raises:
        UserError: unreadable, or an annotation without image_id and caption.
    """
    for where, annotation in _annotations(_content(path, "captions"), path):
        yield str(field_of(annotation, "image_id", where, (int, str))), field_of(annotation, "caption", where)


def instances(path: Path) -> Iterator[tuple[str, str]]:
    """(image, category's name) of every object in ``instances_*.json``.

    Raises:
        UserError: unreadable, or an annotation without image_id and a known category.
    """
    content = _content(path, "instances")
    given = content.get("categories")
    if not isinstance(given, list):
        raise UserError(f"{path}: COCO's instances have a list of categories")
    wheres = [f"{path}: category {number}" for number in range(len(given))]
    categories = {
        field_of(one, "id", where, int): field_of(one, "name", where) for one, where in zip(given, wheres, strict=True)
    }
    for where, annotation in _annotations(content, path):
        category = field_of(annotation, "category_id", where, int)
        if category not in categories:
            raise UserError(f"{where}: category_id {category} is none of the file's categories")
        yield str(field_of(annotation, "image_id", where, (int, str))), categories[category]


def _content(path: Path, what: str) -> dict[str, Any]:
    content = read_json(path, f"COCO's {what}")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path}: COCO's {what} are an object with a list of annotations")
    return content


def _annotations(content: dict[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: annotation {number} is no object")
        yield f"{path}: annotation {number}", annotation
