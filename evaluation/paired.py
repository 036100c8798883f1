"""Base against aligned on the same prompts and seeds: everything that goes into ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from polyalign.core.adapter import Judge
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.evaluation.audio.sound import is_sound
from polyalign.evaluation.audio.statistics import SOUND_STATISTICS
from polyalign.evaluation.audio.temporal import summary
from polyalign.evaluation.diversity import compare_diversity, thumbnails
from polyalign.evaluation.image_statistics import IMAGE_STATISTICS
from polyalign.evaluation.judges import checked_scores, parts, refuse_unfit
from polyalign.evaluation.pictured import details, key_of
from polyalign.evaluation.statistics import bootstrap_mean, paired_win_rate

Statistics = Mapping[str, Callable[[Any], float]]


def evaluate_paired(
    base_outputs: Sequence[Any],
    aligned_outputs: Sequence[Any],
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    judges: Sequence[Judge],
    *,
    seed: int,
    base_images: Sequence[str] | None = None,
    aligned_images: Sequence[str] | None = None,
    arms: Mapping[str, Sequence[Any]] | None = None,
    artefacts: Statistics | None = None,
    tie_margin: float = 0.0,
) -> dict[str, Any]:
    """Judge both models' outputs and compare them pair by pair.

    Args:
        base_outputs, aligned_outputs: output i of both was made from ``conditions[i]`` with ``seeds[i]``.
        conditions: each has "prompt" and may have "task", which groups the per-task table, and "images", of which the same may
            be asked again.
        judges: the first decides the win rate and the items; the others are reported beside it, under ``other_judges``.
        seed: the run's seed; keys the bootstrap.
        base_images, aligned_images: paths of the outputs, relative to the run folder, for the report.
        arms: outputs of further models on the same prompts and seeds ("sft"), compared with the base and with the aligned.
        artefacts: statistics of one output that should not run away; None takes the picture statistics for pictures.
        tie_margin: first judge's scores that differ by no more are a tie.

    Returns:
        The content of evaluation.json. Beyond the plain blocks: ``artefacts`` (:func:`compare_statistics`), in each arm its
        ``scores`` and ``aligned_over_this``, ``parts`` of every judge (:func:`polyalign.evaluation.judges.parts`), and
        ``judge.broken_below`` and ``judge.right_from`` where the judge has those attributes; for pictures of which some share a
        prompt, ``diversity`` (:func:`~polyalign.evaluation.diversity.compare_diversity` of thumbnails). Items of texts have
        ``base_text`` and ``aligned_text`` in the place of ``base_image`` and ``aligned_image``, and ``lengths`` compares their
        numbers of words as ``artefacts`` does, without an alarm. Items of conditions with pictures say where these lie, and
        what every model answered (:func:`polyalign.evaluation.pictured.details`). Items of sounds have ``base_sound`` and
        ``aligned_sound``, and where a judge finds events ``temporal`` has each model's presence, order and strict match.

    Raises:
        UserError: nothing to compare, lengths that differ, two judges of one name, a judge that only compares outputs of one
            call, or one that returns something else than finite numbers.
    """
    arms = arms or {}
    _check_lengths(conditions, {"base": base_outputs, "aligned": aligned_outputs, "seeds": seeds, **arms})
    if not judges:
        raise UserError("an evaluation needs at least one judge. Name one in the recipe: evaluate: {judges: [{name: ...}]}")
    refuse_unfit(judges)
    first, *others = judges
    table = _Table(conditions, seed, tie_margin)
    base, aligned = checked_scores(first, conditions, base_outputs), checked_scores(first, conditions, aligned_outputs)
    of_arms = {name: checked_scores(first, conditions, arms[name]) for name in arms}
    identity = _identity(first)
    shown = _shown(base_outputs, aligned_outputs, base_images, aligned_images)
    more = details(conditions, identity, {"base": base, "aligned": aligned, **of_arms}, arms)
    report: dict[str, Any] = {
        "judge": identity,
        "prompts": len(set(table.prompts)),
        "win_rate": table.win_rate(base, aligned, "win_rate"),
        "scores": {"base": table.mean(base), "aligned": table.mean(aligned)},
        "tasks": by_task(conditions, base, aligned),
        "other_judges": {},
        "items": _items(conditions, seeds, base, aligned, [{**one, **other} for one, other in zip(shown, more, strict=True)]),
        "arms": {name: table.arm(name, of_arms[name], base, aligned) for name in arms},
    }
    for judge in others:
        scores = checked_scores(judge, conditions, base_outputs), checked_scores(judge, conditions, aligned_outputs)
        rate = replace(table, tie_margin=0.0).win_rate(*scores, judge.name)
        report["other_judges"][judge.name] = {**rate, "parts": parts(judge), "version": judge.version}
    pictures = _are(Image.Image, base_outputs, aligned_outputs)
    if artefacts is None:
        artefacts = IMAGE_STATISTICS if pictures else SOUND_STATISTICS if _sounds(base_outputs, aligned_outputs) else {}
    if pictures and len(set(table.prompts)) < len(table.prompts):
        small = thumbnails(base_outputs), thumbnails(aligned_outputs)
        report["diversity"] = compare_diversity(*small, table.prompts, metric="rms", seed=seed)
    if _are(str, base_outputs, aligned_outputs):
        words = {"words": words_of}
        report["lengths"] = compare_statistics(words, base_outputs, aligned_outputs, prompts=table.prompts, seed=seed)
    report |= _temporal(judges, conditions, {"base": base_outputs, "aligned": aligned_outputs, **arms})
    if artefacts:
        report["artefacts"] = compare_statistics(artefacts, base_outputs, aligned_outputs, prompts=table.prompts, seed=seed)
    return report


@dataclass(frozen=True)
class _Table:
    """What all comparisons of one evaluation share; ``seed`` keys each bootstrap together with what it is for."""

    conditions: Sequence[Mapping[str, Any]]
    seed: int
    tie_margin: float

    @cached_property
    def prompts(self) -> list[str]:
        return [key_of(condition) for condition in self.conditions]

    def win_rate(self, other: Sequence[float], better: Sequence[float], purpose: str) -> dict[str, Any]:
        keyed = seed_of(self.seed, "evaluation", purpose)
        return paired_win_rate(other, better, seed=keyed, prompts=self.prompts, tie_margin=self.tie_margin).as_json()

    def mean(self, scores: Sequence[float]) -> dict[str, Any]:
        mean, interval = bootstrap_mean(scores, seed=seed_of(self.seed, "evaluation", "scores"), clusters=self.prompts)
        return {"mean": mean, "interval": list(interval)}

    def arm(self, name: str, scores: Sequence[float], base: Sequence[float], aligned: Sequence[float]) -> dict[str, Any]:
        """The arm's win rate over the base, its scores, and the aligned model's win rate over the arm."""
        return {
            **self.win_rate(base, scores, f"arm {name}"),
            "scores": self.mean(scores),
            "aligned_over_this": self.win_rate(scores, aligned, f"aligned over {name}"),
        }


def task_of(condition: Mapping[str, Any]) -> str | None:
    """What a prompt is grouped by: its task, or its category in a benchmark (PartiPrompts, HPSv2)."""
    found = condition.get("task", condition.get("category"))
    return None if found is None else str(found)


def by_task(
    conditions: Sequence[Mapping[str, Any]], base: Sequence[float], aligned: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Mean score of each task, in order of first appearance; conditions without a task or category make none."""
    rows: dict[str, list[int]] = {}
    for index, condition in enumerate(conditions):
        if (task := task_of(condition)) is not None:
            rows.setdefault(task, []).append(index)
    return {
        task: {
            "base": float(np.mean([base[i] for i in indices])),
            "aligned": float(np.mean([aligned[i] for i in indices])),
            "n": len(indices),
        }
        for task, indices in rows.items()
    }


def compare_statistics(
    statistics: Statistics, base: Sequence[Any], aligned: Sequence[Any], *, prompts: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Each statistic's mean on both sides, the mean paired change with its interval, and the base's spread over outputs."""
    blocks: dict[str, dict[str, Any]] = {}
    for name, statistic in statistics.items():
        before = np.array([statistic(output) for output in base])
        after = np.array([statistic(output) for output in aligned])
        change, interval = bootstrap_mean((after - before).tolist(), seed=seed_of(seed, "artefact", name), clusters=prompts)
        blocks[name] = {
            "base": float(before.mean()),
            "aligned": float(after.mean()),
            "change": change,
            "interval": list(interval),
            "base_spread": float(before.std()),
        }
    return blocks


def _check_lengths(conditions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    if not conditions:
        raise UserError("there is nothing to evaluate: no prompts were given")
    for name, column in columns.items():
        if len(column) != len(conditions):
            raise UserError(
                f"a paired evaluation needs one of each for every prompt: {len(conditions)} prompts, {len(column)} {name}"
            )


def _identity(judge: Judge) -> dict[str, Any]:
    """Name, version, ``parts`` (the unweighted names of all that have a say), and two scores where the judge knows them:
    ``broken_below``, under which it calls an output broken (or ``broken_word``), and ``right_from``, from which it calls one
    right."""
    identity: dict[str, Any] = {"name": judge.name, "version": judge.version, "parts": parts(judge)}
    for limit in ("broken_below", "right_from"):
        value = getattr(judge, limit, None)
        if value is not None:
            identity[limit] = float(value)
    word = getattr(judge, "broken_word", None)
    return identity | ({} if word is None else {"broken_word": str(word)})


def _shown(
    base: Sequence[Any], aligned: Sequence[Any], base_images: Sequence[str] | None, aligned_images: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What the report shows of each two outputs: texts themselves, of others the paths of their pictures."""
    if _are(str, base, aligned):
        return [{"base_text": one, "aligned_text": other} for one, other in zip(base, aligned, strict=True)]
    none = [None] * len(base)
    paths = zip(base_images or none, aligned_images or none, strict=True)
    kind = "sound" if _sounds(base, aligned) else "image"
    return [{f"base_{kind}": one, f"aligned_{kind}": other} for one, other in paths]


def _are(kind: type, *columns: Sequence[Any]) -> bool:
    return all(isinstance(output, kind) for column in columns for output in column)


def _sounds(*columns: Sequence[Any]) -> bool:
    return all(is_sound(output) for column in columns for output in column)


def _temporal(
    judges: Sequence[Judge], conditions: Sequence[Mapping[str, Any]], outputs: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """``temporal``: presence, order and strict match of each model's sounds by the first judge that finds events (it has
    ``outcomes``); nothing without such a judge."""
    finder: Any = next((judge for judge in judges if hasattr(judge, "outcomes")), None)
    if finder is None:
        return {}
    found = {name: summary(finder.outcomes(conditions, column)) for name, column in outputs.items()}
    return {"temporal": {"judge": finder.name, "version": finder.version, **found}}


def words_of(text: str) -> float:
    """How many words an answer has: what judges and objectives most often prefer without being asked to."""
    return float(len(text.split()))


def _items(
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    base: Sequence[float],
    aligned: Sequence[float],
    shown: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": str(condition["prompt"]),
            "seed": int(seeds[index]),
            "task": task_of(condition),
            "base_score": base[index],
            "aligned_score": aligned[index],
            **shown[index],
        }
        for index, condition in enumerate(conditions)
    ]
