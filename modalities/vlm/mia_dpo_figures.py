"""What is told of a generation of MIA-DPO's pairs: counts and attention ratios of each shard as JSON, put together at the end.

A *kind* of question is its format, number of images and level: ``sequence 2``, ``grid 4``, ``compare sequence 3``, ``single``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polyalign.evaluation.selection import selection
from polyalign.modalities.vlm.attention_ratio import auc
from polyalign.modalities.vlm.data_card import tables_of_mia_dpo
from polyalign.modalities.vlm.filters import Audit

COUNTED = ("questions", "right", "confused", "mistakes", "balanced", "elsewhere_right", "elsewhere_wrong")
"""Of each kind: ``confused`` are wrong answers that are right of another image; ``mistakes`` and ``balanced`` pairs that are
kept of wrong and of right answers; ``elsewhere``: of the right and of the wrong answers, those whose target is not the image
that was looked at most."""

PARTS = ("mistakes", "balanced")
SIDES = ("right", "wrong")


def kind_of(layout: Mapping[str, Any]) -> str:
    """The kind of a question, by its layout."""
    if layout["format"] == "single":
        return "single"
    level = {1: "", 2: "compare ", 3: "search "}[layout["level"]]
    return f"{level}{layout['format']} {len(layout['places'])}"


def new_kind() -> dict[str, Any]:
    """The counts of a kind of question, and its ratios by layer and task: of the right answers and of the wrong."""
    return {**dict.fromkeys(COUNTED, 0), "ratios": {}}


def add_ratio(kind: dict[str, Any], layer: int, task: str, side: str, ratio: float) -> None:
    """Note one answer's ratio."""
    tasks = kind["ratios"].setdefault(str(layer), {})
    tasks.setdefault(task, {name: [] for name in SIDES})[side].append(round(ratio, 6))


def merged(audits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Audits (:meth:`polyalign.modalities.vlm.filters.Audit.plain`) added up."""
    total: dict[str, Any] = {"pairs": 0, "kept": 0, "dropped": {}, "refused_alone": {}}
    for audit in audits:
        for name in ("pairs", "kept"):
            total[name] += audit[name]
        for name in ("dropped", "refused_alone"):
            for key, count in audit[name].items():
                total[name][key] = total[name].get(key, 0) + count
    return total


def summary_of(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The audit over all, and the figures of each kind of question."""
    kinds: dict[str, dict[str, Any]] = {}
    for note in notes:
        for name, given in note["kinds"].items():
            into = kinds.setdefault(name, new_kind())
            for key in COUNTED:
                into[key] += given[key]
            for layer, tasks in given["ratios"].items():
                for task, ratios in tasks.items():
                    at = into["ratios"].setdefault(layer, {}).setdefault(task, {side: [] for side in SIDES})
                    for side in SIDES:
                        at[side] += ratios[side]
    counts = ("questions", "pairs", "unusable", "broken_answers", "right_without_pair")
    found = {
        **{name: sum(note[name] for note in notes) for name in counts},
        "conversations": max((note.get("conversations", 0) for note in notes), default=0),  # earlier shards do not say
        "layer": next((note["layer"] for note in notes), None),
        "audit": {part: merged(note[part] for note in notes) for part in PARTS},
        **_aucs(list(kinds.values())),
        "target_not_first": _elsewhere(kinds.values()),
        "kinds": {name: _figures(kinds[name]) for name in sorted(kinds)},
    }
    words, words_of_pairs = (_words(notes, name) for name in ("words", "words_of_pairs"))
    drawn = selection(
        questions=found["questions"],
        right=sum(kind["right"] for kind in kinds.values()),
        pairs=found["pairs"],
        pairs_of_right=found["audit"]["balanced"]["kept"],
        words=words,
        words_of_pairs=words_of_pairs,
    )
    return {**found, "selection": drawn, "tables": tables_of_mia_dpo(found)}


def _words(notes: Sequence[Mapping[str, Any]], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for note in notes:
        total.update(note.get(name, {}))  # shards of earlier versions did not count them
    return total


def _figures(kind: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: kind[name] for name in ("questions", "right", "confused", "mistakes", "balanced")},
        "accuracy": _share(kind["right"], kind["questions"]),
        "target_not_first": _elsewhere([kind]),
        **_aucs([kind]),
    }


def _elsewhere(kinds: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The shares of right and of wrong answers whose target is not the image that was looked at most, of several images."""
    away, seen = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
    for kind in kinds:
        for side in SIDES:
            away[side] += kind[f"elsewhere_{side}"]
            layers = kind["ratios"].values()
            seen[side] += max((sum(len(ratios[side]) for ratios in tasks.values()) for tasks in layers), default=0)
    return {side: _share(away[side], seen[side]) for side in SIDES}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _aucs(kinds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By layer: ``auc`` within kinds, its standard error, and ``auc_within_tasks``. Between kinds the ratio differs by the
    number of images alone; between tasks too, since some are easier and some are looked at longer."""
    found: dict[str, dict[str, float | None]] = {"auc": {}, "auc_error": {}, "auc_within_tasks": {}}
    for layer in sorted({layer for kind in kinds for layer in kind["ratios"]}, key=int):
        by_task = [list(kind["ratios"].get(layer, {}).values()) for kind in kinds]
        whole = [{side: [ratio for one in tasks for ratio in one[side]] for side in SIDES} for tasks in by_task]
        found["auc"][layer], found["auc_error"][layer] = _auc(whole)
        found["auc_within_tasks"][layer], _ = _auc([one for tasks in by_task for one in tasks])
    return found


def _auc(strata: Iterable[Mapping[str, Sequence[float]]]) -> tuple[float | None, float | None]:
    """The AUC within strata, each weighted by its pairs of a right and a wrong answer, and its standard error (Hanley and
    McNeil 1982: A (1 - A) + (m - 1) (A / (2 - A) - A^2) + (n - 1) (2 A^2 / (1 + A) - A^2), over m n); None where no stratum has
    both."""
    total, variance, pairs = 0.0, 0.0, 0
    for ratios in strata:
        m, n = len(ratios["right"]), len(ratios["wrong"])
        if m * n:
            area = auc(ratios["right"], ratios["wrong"])
            squared = (
                area * (1 - area) + (m - 1) * (area / (2 - area) - area**2) + (n - 1) * (2 * area**2 / (1 + area) - area**2)
            )
            total, variance, pairs = total + m * n * area, variance + m * n * squared, pairs + m * n
    return (round(total / pairs, 4), round(math.sqrt(variance) / pairs, 4)) if pairs else (None, None)


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """A summary for the terminal."""
    found = [f"{summary['questions']} questions, {summary['pairs']} pairs"]
    if summary["conversations"]:
        found.append(
            f"{summary['conversations']} entries of the data are conversations of several turns: the first is asked, as "
            "published (by compare and search any)"
        )
    if summary["unusable"]:
        found.append(f"{summary['unusable']} questions with pictures that cannot be used")
    for part, words in zip(PARTS, ("the model's mistakes", "another image's answer where the model is right"), strict=True):
        given = summary["audit"][part]
        audit = Audit(given["pairs"], given["kept"], given["dropped"], given["refused_alone"])
        head, *every = audit.lines()
        shown = [line for line, count in zip(every, audit.alone.values(), strict=True) if count]
        found += [f"{words}: {head}", *(f"  {line}" for line in shown)] if given["pairs"] else []
    if summary["broken_answers"]:
        found.append(f"{summary['broken_answers']} answers with an image token in them, no pairs of these")
    if summary["right_without_pair"]:
        found.append(f"{summary['right_without_pair']} right answers without a pair")
    for name, kind in summary["kinds"].items():
        confused = f", another image's answer in {kind['confused']}" if name != "single" else ""
        found.append(f"{name}: {kind['accuracy']:.3f} right of {kind['questions']}{confused}")
    if any(value is not None for value in summary["auc"].values()):
        shown = ", ".join(_shown(summary, layer) for layer, value in summary["auc"].items() if value is not None)
        found.append(f"attention ratio of right against wrong answers, AUC (0.5 tells nothing): {shown}")
    away = summary["target_not_first"]
    if away["wrong"] is not None:
        right = "" if away["right"] is None else f", in {away['right']:.2f} of the right ones"
        found.append(
            f"another image looked at most in {away['wrong']:.2f} of the wrong answers{right} (layer {summary['layer']})"
        )
    return found


def _shown(summary: Mapping[str, Any], layer: str) -> str:
    within = summary["auc_within_tasks"][layer]
    inside = "" if within is None or within == summary["auc"][layer] else f", within tasks {within:.2f}"
    return f"layer {layer}: {summary['auc'][layer]:.2f} +- {1.96 * summary['auc_error'][layer]:.2f}{inside}"
