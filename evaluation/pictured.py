"""Evaluated conditions with pictures: where their files lie in a run folder, and what the items of evaluation.json say of them.

A stage that evaluates such conditions writes each one's pictures to :func:`picture_file`, and may write to
:func:`attention_file` how models looked at them::

    {"layer": 8, "models": {"base": {"images": [{"map": [[0.01, 0.02], [0.0, 0.03]]}, ...]}, "aligned": ...}}

with one map (rows, columns) of shares for each picture, as far as pictures go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

Condition = Mapping[str, Any]


def picture_file(index: int, number: int) -> str:
    """The path in the run folder of picture ``number`` (from 0) of the condition ``index`` of an evaluation."""
    return f"samples/conditions/{index:05d}-{number}.png"


def attention_file(index: int) -> str:
    """The path in the run folder of what models looked at under the condition ``index``."""
    return f"samples/attention/{index:05d}.json"


def key_of(condition: Condition) -> str:
    """What makes a condition the same as another: its prompt, and its pictures, of which the same may be asked."""
    pictures = [_digest(picture) for picture in condition.get("images") or ()]
    return "\n".join([str(condition["prompt"]), *pictures])


def verdict(score: float, judge: Mapping[str, Any]) -> str | None:
    """``right``, ``wrong``, or what the judge calls an answer below ``broken_below``; None where it knows no right ones.
    ``judge`` is its block in evaluation.json."""
    limit, broken = judge.get("right_from"), judge.get("broken_below")
    if limit is None:
        return None
    if broken is not None and score < broken:
        return str(judge.get("broken_word", "broken"))
    return "right" if score >= limit else "wrong"


def details(
    conditions: Sequence[Condition],
    judge: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    arms: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """What the item of each condition has besides. Nothing without pictures; else ``images`` and ``attention`` (paths in the
    run folder), ``layout``, ``verdicts`` of every model where the judge knows right answers, and ``arms``, the answers of the
    arms with their scores.

    Args:
        judge: its block in evaluation.json.
        scores: of every model by name.
        arms: outputs by name.
    """
    return [_detail(index, condition, judge, scores, arms) for index, condition in enumerate(conditions)]


def _detail(
    index: int,
    condition: Condition,
    judge: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    arms: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    pictures = condition.get("images") or ()
    if not pictures:
        return {}
    found: dict[str, Any] = {
        "images": [one if isinstance(one, str) else picture_file(index, number) for number, one in enumerate(pictures)],
        "attention": attention_file(index),
    }
    if isinstance(condition.get("layout"), Mapping):
        found["layout"] = condition["layout"]
    verdicts = {name: verdict(column[index], judge) for name, column in scores.items()}
    if None not in verdicts.values():
        found["verdicts"] = verdicts
    texts = {name: outputs for name, outputs in arms.items() if isinstance(outputs[index], str)}
    if texts:
        found["arms"] = {name: {"text": one[index], "score": scores[name][index]} for name, one in texts.items()}
    return found


def _digest(picture: Any) -> str:
    content = picture.get("bytes") or picture.get("path") if isinstance(picture, Mapping) else picture
    if isinstance(content, Image.Image):
        content = repr((content.mode, content.size)).encode() + content.tobytes()
    return hashlib.sha256(content if isinstance(content, bytes) else str(content).encode()).hexdigest()
