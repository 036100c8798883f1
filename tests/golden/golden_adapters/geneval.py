"""geneval.json: the scoring rules of djghosh13/geneval; colours are given in place of its classifier's answers."""

from __future__ import annotations

from collections.abc import Callable

from golden_adapters.cases import Case, agree

from polyalign.evaluation.geneval import Detection, iou, judge, relations


def _position(case: Case) -> None:
    a, b = case.inputs["box_a"], case.inputs["box_b"]
    found = relations(a, b, shrink=case.params["position_threshold"])
    assert sorted(found) == sorted(case.outputs["relations"])
    agree("iou", iou(a, b), case.outputs["iou"])


def _evaluate(case: Case) -> None:
    objects = {name: [Detection(tuple(box)) for box in boxes] for name, boxes in case.inputs["objects"].items()}
    colours = case.inputs["color_predictions"]
    verdict = judge(objects, case.inputs["metadata"], lambda name, found: colours[name][: len(found)])
    assert verdict.correct == case.outputs["correct"]
    assert "\n".join(verdict.reasons) == case.outputs["reason"]


METHODS: dict[str, Callable[[Case], None]] = {"relative_position": _position, "evaluate": _evaluate}
NOT_IN_PLACE: dict[str, str] = {}
