"""GenEval's rules (Ghosh et al., arXiv 2310.11513): is what the prompt asks for in the picture, as a detector sees it?

Rules and thresholds are those of the published code; a detector and a classifier of colours are given from outside
(:mod:`polyalign.evaluation.image_judges.geneval`). A box is (x0, y0, x1, y1, score) in pixels, y downwards.

Known properties of the rules, kept so that figures compare: extra objects are forgiven except where a task excludes them
(counting); of the objects found only the ``count`` most confident are asked for colour and position; the offset between two
objects is shrunk by a tenth of their sizes, but divided by its length before shrinking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyalign.core.errors import UserError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SHRINK = 0.1
"""Share of both sizes that is taken from the offset of two objects before it counts as a direction."""
DIRECTION = 0.5
"""Share of the distance that the shrunk offset along an axis must exceed."""
NOTHING = 1e-3
"""Pixels; a shrunk offset below this on both axes is no direction at all."""


@dataclass(frozen=True)
class Detection:
    """One object: its box, and its mask (H, W) of booleans if the detector gives one."""

    box: tuple[float, float, float, float, float]
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Thresholds:
    """Which detections count."""

    confidence: float = 0.3
    counting: float = 0.9
    """In place of ``confidence`` for the task "counting", where doubles would be counted."""
    objects: int = 16
    """At most so many of a class, the most confident first."""
    overlap: float = 1.0
    """Intersection over union from which on the less confident of two boxes of a class is dropped; 1 keeps all."""


@dataclass(frozen=True)
class Verdict:
    """``reasons`` are the requirements that failed, in the words of the published results files."""

    correct: bool
    reasons: tuple[str, ...] = ()


Objects = Mapping[str, Sequence[Detection]]
Colours = Callable[[str, Sequence[Detection]], Sequence[str]]
"""From a class's name and its objects to the colour of each."""


def kept(found: Objects, task: str, thresholds: Thresholds | None = None) -> dict[str, list[Detection]]:
    """What counts of a detector's findings, the most confident first; classes without any are left out."""
    limits = thresholds or Thresholds()
    least = limits.counting if task == "counting" else limits.confidence
    result: dict[str, list[Detection]] = {}
    for name, detections in found.items():
        confident = sorted((one for one in detections if one.box[4] > least), key=lambda one: -one.box[4])
        for one in confident[: limits.objects]:
            chosen = result.setdefault(name, [])
            if limits.overlap >= 1 or all(iou(other.box, one.box) < limits.overlap for other in chosen):
                chosen.append(one)
    return result


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, whose last pixels belong to them (so a side is x1 - x0 + 1); 0 for empty ones."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    total = area(*a[:4]) + area(*b[:4]) - shared
    return shared / total if total else 0.0


def relations(a: Sequence[float], b: Sequence[float], shrink: float = SHRINK) -> list[str]:
    """Where box a is as seen from box b; none, one, or two of :data:`RELATIONS`, in that order.

    With o the offset of the middles and w the sizes of the boxes, axis by axis: s = sign(o) max(|o| - shrink (w_a + w_b), 0);
    a direction holds where s / |o| along it is above one half.
    """
    corners = np.array([a[:4], b[:4]], dtype=np.float64).reshape(2, 2, 2)  # box, corner, axis
    middles, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = middles[0] - middles[1]
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - shrink * sizes.sum(axis=0), 0)
    if (np.abs(shrunk) < NOTHING).all():
        return []
    x, y = shrunk / np.linalg.norm(offset)
    holds = (x < -DIRECTION, x > DIRECTION, y < -DIRECTION, y > DIRECTION)
    return [relation for relation, held in zip(RELATIONS, holds, strict=True) if held]


def judge(objects: Objects, metadata: Mapping[str, Any], colours: Colours) -> Verdict:
    """Every ``include`` must hold and no ``exclude`` may.

    Args:
        objects: by class, those that count (:func:`kept`), the most confident first.
        metadata: a line of GenEval's prompts: ``include``: [{class, count, color?, position?: [relation, index]}], where index
            counts the includes before it; ``exclude``: [{class, count}], violated from that count on.
        colours: asked only where a colour is required.

    Raises:
        UserError: the metadata is not of that form.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for requirement in _requirements(metadata, "include"):
        name, count = requirement["class"], requirement["count"]
        found = list(objects.get(name, ()))[:count]
        failed = _count_failure(name, count, found) or _colour_failure(requirement, found, colours)
        if failed is None and "position" in requirement:
            failed = _position_failure(requirement, found, groups)
        groups.append(found if failed is None else None)
        if failed is not None:
            reasons.append(failed)
    for requirement in _requirements(metadata, "exclude"):
        number = len(objects.get(requirement["class"], ()))
        if number >= requirement["count"]:
            reasons.append(f"expected {requirement['class']}<{requirement['count']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def _requirements(metadata: Mapping[str, Any], kind: str) -> Sequence[Mapping[str, Any]]:
    found = metadata.get(kind, [])
    good = isinstance(found, list | tuple) and all(
        isinstance(one, Mapping) and isinstance(one.get("class"), str) and isinstance(one.get("count"), int) for one in found
    )
    if not good:
        raise UserError(f"GenEval: '{kind}' must be a list of {{class, count}}, found {found!r}")
    return found


def _count_failure(name: str, count: int, found: Sequence[Detection]) -> str | None:
    return f"expected {name}>={count}, found {len(found)}" if len(found) < count else None


def _colour_failure(requirement: Mapping[str, Any], found: Sequence[Detection], colours: Colours) -> str | None:
    if "color" not in requirement:
        return None
    name, count, wanted = requirement["class"], requirement["count"], requirement["color"]
    seen = list(colours(name, found))
    if seen.count(wanted) >= count:
        return None
    others = ", ".join(f"{seen.count(colour)} {colour}" for colour in COLOURS if colour in seen)
    return f"expected {wanted} {name}>={count}, found {seen.count(wanted)} {wanted}; and {others}"


def _target(
    requirement: Mapping[str, Any], groups: Sequence[Sequence[Detection] | None]
) -> tuple[str, Sequence[Detection] | None]:
    relation, index = requirement["position"]
    if relation not in RELATIONS or not isinstance(index, int) or not 0 <= index < len(groups):
        raise UserError(
            f"GenEval: position {requirement['position']!r} of {requirement['class']!r}: a relation ({', '.join(RELATIONS)}) "
            "and the place of an include before it are needed"
        )
    return relation, groups[index]


def _position_failure(
    requirement: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> str | None:
    relation, target = _target(requirement, groups)
    name = requirement["class"]
    if target is None:
        return f"no target for {name} to be {relation}"
    for one in found:
        for other in target:
            true = relations(one.box, other.box)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return None


def summary(results: Sequence[tuple[Mapping[str, Any], bool]]) -> dict[str, Any]:
    """Scores of (metadata, correct) of every picture: the share right for each task; ``overall``, the mean of the tasks
    (GenEval's figure, not the mean of the pictures); ``pictures`` and ``prompts``, the share of pictures that are right and of
    prompts with at least one right picture.

    Raises:
        UserError: nothing to sum up, or metadata without a ``tag``.
    """
    if not results:
        raise UserError("GenEval: there are no results to sum up")
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for metadata, correct in results:
        if "tag" not in metadata:
            raise UserError(f"GenEval: the prompt {metadata.get('prompt')!r} has no 'tag'; known tags: {', '.join(TASKS)}")
        by_task.setdefault(str(metadata["tag"]), []).append(correct)
        prompt = str(metadata.get("prompt"))
        by_prompt[prompt] = by_prompt.get(prompt, False) or correct
    tasks = {task: {"right": sum(of), "n": len(of), "share": sum(of) / len(of)} for task, of in by_task.items()}
    return {
        "tasks": tasks,
        "overall": sum(task["share"] for task in tasks.values()) / len(tasks),
        "pictures": sum(correct for _, correct in results) / len(results),
        "prompts": sum(by_prompt.values()) / len(by_prompt),
    }
