"""What makers of pairs found, as the tables that a report shows (:mod:`polyalign.evaluation.report.tables`): ``title``,
``note``, ``columns`` and ``rows`` of texts, numbers and null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyalign.modalities.vlm.negative_config import STEPS, ImageNegativeConfig, NegativesConfig

FILTERS = {
    "empty": "an empty answer",
    "same": "the right answer",
    "perplexity": "perplexity",
    "attention": "attention",
    "chosen_below": "chosen answer too long",
    "length_ratio": "ratio of lengths",
    "edit_distance": "edit distance",
}
"""What filters are called."""


def tables_of_mia_dpo(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The filters' audit, the model's answers by kind of question, and by layer how far the attention ratio tells."""
    return [_audit(summary["audit"]), _kinds(summary), *_ratio(summary)]


def _audit(audit: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    mistakes, balanced = audit["mistakes"], audit["balanced"]
    rows: list[list[Any]] = [
        ["before the filters", mistakes["pairs"], None, balanced["pairs"], None],
        *(
            [
                FILTERS.get(name, name),
                *(part[what].get(name) for part in (mistakes, balanced) for what in ("dropped", "refused_alone")),
            ]
            for name in dict.fromkeys([*mistakes["dropped"], *balanced["dropped"]])
        ),
        ["kept", mistakes["kept"], None, balanced["kept"], None],
    ]
    note = (
        "Mistakes: the rejected answer is the model's own. Balanced: the model was right, and the rejected answer is right of "
        "another image. A pair is dropped by the first filter that refuses it; alone: all that a filter would drop by itself."
    )
    if not balanced["pairs"]:
        note += " There are no balanced pairs: all are of questions that the model got wrong."
    columns = ["filter", "mistakes", "mistakes, alone", "balanced", "balanced, alone"]
    return {"title": "What the filters dropped", "note": note, "columns": columns, "rows": rows}


def _kinds(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for name, kind in summary["kinds"].items():
        away = kind["target_not_first"]
        counts = [kind[key] for key in ("questions", "accuracy")]
        confused = None if name == "single" else kind["confused"]
        rows.append([name, *counts, confused, kind["mistakes"], kind["balanced"], away["right"], away["wrong"]])
    away = summary["target_not_first"]
    if away["right"] is not None or away["wrong"] is not None:
        rows.append(["all of several images", *[None] * 5, away["right"], away["wrong"]])
    return {
        "title": "The model's answers by kind of question",
        "note": "Kinds are formats with their number of pictures. Another image's: wrong answers that are right of another "
        f"image. Elsewhere: of the right and of the wrong answers the share whose image was not looked at most, in layer "
        f"{summary['layer']}.",
        "columns": [
            "kind",
            "questions",
            "accuracy",
            "another image's",
            "pairs of mistakes",
            "balanced pairs",
            "right, elsewhere",
            "wrong, elsewhere",
        ],
        "rows": rows,
    }


def _ratio(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    if all(value is None for value in summary["auc"].values()):
        return []
    names = ("auc", "auc_error", "auc_within_tasks")
    rows = [
        [
            f"{layer}{', the one that counts' if layer == str(summary['layer']) else ''}",
            *(summary[name][layer] for name in names),
        ]
        for layer in summary["auc"]
    ]
    return [
        {
            "title": "Attention ratio of right against wrong answers",
            "note": "The area under the curve is the chance that a right answer looked at its image by a larger share than a "
            "wrong one of the same kind did: 0.5 tells nothing. Within tasks it compares answers to the same task alone.",
            "columns": ["layer", "area (AUC)", "standard error", "within tasks"],
            "rows": rows,
        }
    ]


def tables_of_re_align(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What became of the questions, what the rejected answers are like, and of which retrieved picture they came."""
    became = (
        ("kept", "a pair"),
        ("exhausted", "no similar picture gave another answer"),
        ("nothing_to_mask", "nothing to mask in the answer"),
        ("empty", "an empty answer"),
    )
    asked = summary["asked"]
    rows: list[list[Any]] = [["asked", asked, 1.0 if asked else None]]
    rows += [[words, summary[name], summary[name] / asked if asked else None] for name, words in became]
    found = [
        {
            "title": "What became of the questions",
            "note": f"{summary['tried']:,} completions were tried under similar pictures, and {summary['unfilled']:,} of them "
            "left a gap.",
            "columns": ["question", "how many", "share"],
            "rows": rows,
        }
    ]
    if not summary["kept"]:
        return found
    return [*found, _rejected(summary), _ranks(summary)]


def _rejected(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": "The rejected answers",
        "note": f"Answers were compared by: {summary['similarity']}. Pictures were retrieved by: {summary['encoder']}.",
        "columns": ["figure", "mean over pairs"],
        "rows": [
            ["similarity to the chosen answer", summary["mean_similarity"]],
            ["gaps filled in an answer", summary["gaps_of_a_pair"]],
            ["rank of the picture, 1 the most similar", summary["mean_rank"]],
        ],
    }


def _ranks(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows, so_far = [], 0
    for rank, count in summary["ranks"].items():
        so_far += count
        rows.append([f"{rank}", count, so_far / summary["kept"]])
    return {
        "title": "Which similar picture gave the rejected answer",
        "note": "Pictures are tried from the most similar on, until the model answers differently enough.",
        "columns": ["rank", "pairs", "share up to here"],
        "rows": rows,
    }


def table_of_losers(negatives: NegativesConfig, pairs: int) -> dict[str, Any]:
    """What was made to lose beside the rejected answers."""
    rows: list[list[Any]] = []
    if negatives.image is not None:
        rows.append(["picture", pairs, _made(negatives.image)])
    if negatives.context:
        rows.append(["context", pairs, "the whole question of another pair"])
    return {
        "title": "What was made to lose beside the rejected answers",
        "note": "Under these the chosen answer is to be less likely than under its own picture and context.",
        "columns": ["what", "pairs", "how it is made"],
        "rows": rows,
    }


def _made(image: ImageNegativeConfig) -> str:
    """A losing picture in words."""
    if image.kind == "diffused":
        return f"diffused, step {image.step} of {STEPS}"
    if image.kind == "cropped":
        return f"cropped to at most {image.crop[0]} x {image.crop[1]}" if image.area is None else f"cropped to {image.area:.0%}"
    if image.kind == "rotated":
        return f"rotated by {image.degrees[0]:g} to {image.degrees[1]:g} degrees"
    return {"blanked": "one colour, the processor's mean", "swapped": "another pair's picture"}[image.kind]
