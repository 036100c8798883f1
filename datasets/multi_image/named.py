"""What rows of sequences and collages have in common: the question names its image, ``In Image2, what ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image.drawing import Plan
from polyalign.datasets.multi_image.rows import Arrangement, asked, said
from polyalign.datasets.multi_image.sources import Questions, plain


def lowered(question: str) -> str:
    """The question with its first letter in lower case, as published."""
    return question[:1].lower() + question[1:]


def named_row(questions: Questions, plan: Plan, arrangement: Arrangement, turns: int = 1) -> dict[str, Any]:
    """Condition, chosen and confusions of a question about one named image. Later turns begin with a lower ``image``, as the
    published conversations do.

    Raises:
        UserError: no turn is asked for.
    """
    if turns < 1:
        raise UserError(f"turns: at least one is needed, found {turns}")
    name, kept = plan.slot + 1, plan.item.turns[:turns]
    messages = [asked(arrangement, f"In Image{name}, {lowered(kept[0].question)}")]
    for before, turn in zip(kept, kept[1:], strict=False):
        messages += [said("assistant", before.answer), said("user", f"In image{name}, {lowered(turn.question)}")]
    return finished(messages, arrangement, (plan.slot,), 1, kept[-1].answer, confusions(questions, plan, kept[-1].question))


def finished(
    messages: list[dict[str, Any]],
    arrangement: Arrangement,
    targets: Sequence[int],
    level: int,
    chosen: str,
    wrong: Sequence[str],
) -> dict[str, Any]:
    """The row of a conversation; wrong answers that are the right one are left out."""
    layout = arrangement.layout(targets, level)
    kept = [answer for answer in dict.fromkeys(wrong) if plain(answer) != plain(chosen)]
    condition = {"messages": messages, "images": list(arrangement.images), "layout": layout}
    return {"condition": condition, "chosen": chosen, "confusions": kept}


def confusions(questions: Questions, plan: Plan, question: str) -> list[str]:
    """The answers to the same question that are right of the images beside, as far as the data have them."""
    known, key = questions.answers, plain(question)
    found = (known.get((name, key)) for place, name in enumerate(plan.pictures) if place != plan.slot)
    return [answer for answer in found if answer is not None]
