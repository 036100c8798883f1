"""How often models are right, group by group: by the number of pictures of a question, its format, its task.

A judge's score says which answers are right (``right_from``) and which are broken (``broken_below``; the judge of scenes calls
so an answer that tells of what is not in the picture). Every model answered the same questions, so differences to the base are
paired, and their intervals draw the questions, or whole clusters of them, again for both models at once.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from polyalign.core.randomness import seed_of
from polyalign.evaluation.statistics import bootstrap_mean, wilson_interval

ALL = "all"
BASE = "base"

Grouped = dict[str, dict[str, dict[str, Any]]]


def grouped(
    base_scores: Sequence[float],
    other_scores: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    seed: int,
    *,
    right_from: float = 1.0,
    broken_below: float | None = None,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
) -> Grouped:
    """Shares of right and of broken answers in each group.

    Args:
        base_scores: the judge's score of the base model's answer to each question.
        other_scores: the same of the other models, by name ("aligned", then the arms), question by question.
        groups: the group of each question; :data:`ALL` is added for all of them where there is more than one.
        seed: the run's; keys the bootstrap, which draws the same for every model of a group.
        right_from: an answer is right from this score on (``judge.right_from``).
        broken_below: an answer is broken under this score (``judge.broken_below``); None: not counted.
        clusters: what is drawn together, such as the picture that several questions are about.

    Returns:
        ``{group: {model: {"right", "of", "share", "interval", "broken"?, "against_base"?}}}``, groups in natural order, the
        base first in each. ``interval`` is Wilson's; ``broken`` has ``count``, ``of``, ``share`` and ``interval``, and
        ``against_base`` of ``{"difference", "low", "high"}`` stands in both, for every model but the base: share less that of
        the base, with its paired 95 % interval.

    Raises:
        ValueError: no questions, sequences of different length, a group called as :data:`ALL` beside others, or another
            model called as the base.
    """
    lengths = {len(groups), len(base_scores), *(len(scores) for scores in other_scores.values())}
    if clusters is not None:
        lengths.add(len(clusters))
    if len(lengths) != 1 or not groups:
        raise ValueError(f"every model needs a score, and every score a group, found lengths {sorted(lengths)}")
    names = sorted(set(groups), key=_natural)
    if BASE in other_scores or (ALL in names and len(names) > 1):
        raise ValueError(f"'{BASE}' is the base model and '{ALL}' all groups together; call it otherwise")
    members = {name: [place for place, group in enumerate(groups) if group == name] for name in names}
    if len(names) > 1:
        members[ALL] = list(range(len(groups)))
    everyone = {BASE: base_scores, **other_scores}
    made: Grouped = {}
    for name, places in members.items():
        drawn: dict[str, Any] = {"seed": seed_of(seed, "groups", name), "resamples": resamples}
        drawn["clusters"] = None if clusters is None else [clusters[place] for place in places]
        right = {model: [float(scores[place] >= right_from) for place in places] for model, scores in everyone.items()}
        made[name] = {model: _shares(right, model, "right", drawn) for model in everyone}
        if broken_below is not None:
            broken = {model: [float(scores[place] < broken_below) for place in places] for model, scores in everyone.items()}
            for model in everyone:
                made[name][model]["broken"] = _shares(broken, model, "count", drawn)
    return made


def as_text(groups: Grouped, *, broken: str = "broken") -> str:
    """The table for a terminal, a line a group and model; ``broken`` is what a broken answer is called there."""
    width = max(len(name) for name in [*groups, "group"])
    models = max(len(model) for block in groups.values() for model in [*block, "model"])
    lines = [f"{'group':<{width}}  {'model':<{models}}  right"]
    for name, block in groups.items():
        for model, found in block.items():
            words = [in_words(found)]
            if "broken" in found:
                words.append(f"{broken} {in_words(found['broken'])}")
            lines.append(f"{name:<{width}}  {model:<{models}}  {'; '.join(words)}")
    return "\n".join(lines)


def in_words(found: Mapping[str, Any]) -> str:
    """``62.5 % of 48 (+12.5 [+2.1, +22.9])``: a share in per cent, and its difference to the base in points."""
    said = f"{100 * found['share']:.1f} % of {found['of']}"
    against = found.get("against_base")
    if not against:
        return said
    by, low, high = (100 * against[key] for key in ("difference", "low", "high"))
    return f"{said} ({by:+.1f} [{low:+.1f}, {high:+.1f}])"


def _shares(marks: Mapping[str, Sequence[float]], model: str, count: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """How many of a model's answers are marked, and the difference to the base's share."""
    own, base = marks[model], marks[BASE]
    marked = int(sum(own))
    found: dict[str, Any] = {count: marked, "of": len(own), "share": marked / len(own)}
    found["interval"] = list(wilson_interval(marked, len(own)))
    if model != BASE:
        difference, (low, high) = bootstrap_mean([a - b for a, b in zip(own, base, strict=True)], **drawn)
        found["against_base"] = {"difference": difference, "low": low, "high": high}
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers in a name are compared as numbers: 2 pictures before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
