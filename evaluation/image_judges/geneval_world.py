"""GenEval's rules on a world whose objects are found exactly: no detector's mistakes, no weights, no waiting.

The judge ``geneval`` with ``detector: shapes`` is this one; with any other detector it is
:class:`~polyalign.evaluation.image_judges.geneval.GenEvalJudge`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation import geneval
from polyalign.evaluation.geneval import Detection

WORLDS: Mapping[str, str] = {"shapes": "polyalign.datasets.worlds.shapes"}
"""Worlds by name, as modules with ``geneval_metadata`` and ``geneval_objects``."""


class World(Protocol):
    """What a world's module gives."""

    def geneval_metadata(self, prompt: str) -> dict[str, Any]: ...

    def geneval_objects(self, picture: Image.Image) -> list[tuple[str, str, tuple[float, float, float, float]]]: ...


def geneval_judge(*, detector: str | None = None, **options: Any) -> Any:
    """The judge ``geneval``: a world's exact detector by name, or a network by folder or hub id; null is the published one's
    counterpart.

    Raises:
        UserError: an option is none of the allowed.
    """
    if detector is not None and detector in WORLDS:
        return WorldGenEvalJudge(detector=detector, **options)
    from polyalign.evaluation.image_judges.geneval import GenEvalJudge

    return GenEvalJudge(**({} if detector is None else {"detector": detector}), **options)


class WorldGenEvalJudge:
    """1 if the picture holds what the prompt asks for by GenEval's rules, else 0.

    Extra objects are forgiven as GenEval forgives them, where the world's own judge wants exactly what was asked. Conditions
    may be GenEval's lines (``tag``, ``include``); a prompt without them is read by the world.

    Args:
        detector: the world's name.
        label: the judge's name in scores and reports; null is ``geneval``.
    """

    right_from = 1.0

    def __init__(self, *, detector: str, label: str | None = None):
        self.name, self.version = label or "geneval", f"1 {detector}"
        self.detector = detector
        self.world: World = importlib.import_module(WORLDS[detector])  # pyright: ignore[reportAttributeAccessIssue]

    def verdict(self, condition: Mapping[str, Any], picture: Image.Image) -> geneval.Verdict:
        """What was found, held against what was asked for.

        Raises:
            UserError: the world does not know the prompt, or sees no pictures of this size.
        """
        metadata = condition if "tag" in condition and "include" in condition else self._read(str(condition["prompt"]))
        found: dict[str, list[Detection]] = {}
        colours: dict[int, str] = {}
        for name, colour, box in self.world.geneval_objects(picture):
            one = Detection((*box, 1.0))
            colours[id(one)] = colour
            found.setdefault(name, []).append(one)
        objects = geneval.kept(found, str(metadata["tag"]))
        return geneval.judge(objects, metadata, lambda _, seen: [colours[id(one)] for one in seen])

    def _read(self, prompt: str) -> dict[str, Any]:
        try:
            return self.world.geneval_metadata(prompt)
        except ValueError as error:
            raise UserError(f"the judge 'geneval' with detector: {self.detector}: {error}") from error

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Image.Image]) -> list[float]:
        return [float(self.verdict(condition, picture).correct) for condition, picture in zip(conditions, outputs, strict=True)]
