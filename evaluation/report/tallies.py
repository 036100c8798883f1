"""The page's tables of how often models are right, group by group (:mod:`polyalign.evaluation.groups`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyalign.evaluation.report.markup import foreign, note, table, text

WORDS = (
    "How many answers the deciding judge calls right, with the 95 % Wilson interval. Below, in points, the difference to the "
    "base on the same questions, with its paired 95 % bootstrap interval."
)


def tallies(evaluation: Mapping[str, Any]) -> str:
    """A table for each kind of groups, and one of broken answers, as the judge calls them; empty without groups."""
    blocks = evaluation.get("groups") or {}
    if not blocks:
        return ""
    broken = str((evaluation.get("judge") or {}).get("broken_word") or "broken")
    parts = [f"<p>{WORDS}</p>"]
    for title, groups in blocks.items():
        parts.append(f"<h3>{foreign(title, 120)}</h3>{_table(groups, None, 'right answers')}")
        if any(found.get("broken") for models in groups.values() for found in models.values()):
            parts.append(_table(groups, "broken", f"{broken} answers"))
    return "".join(parts) + note("Green and red: the interval of the difference does not hold zero.")


def _table(groups: Mapping[str, Mapping[str, Any]], part: str | None, what: str) -> str:
    """``part`` is the block of a model that is shown; None the model's own. Fewer broken answers are better."""
    models = list(dict.fromkeys(model for block in groups.values() for model in block))
    rows = []
    for name, block in groups.items():
        found = [block.get(model) if part is None else (block.get(model) or {}).get(part) for model in models]
        asked = max(one["of"] for one in block.values())
        rows.append([foreign(name, 60), f"{asked:,}", *(_cell(one, more=part is None) if one else "\u2013" for one in found)])
    head = [text(what, 60), "questions", *(foreign(model, 40) for model in models)]
    return table(head, rows, numeric=range(1, len(head)))


def _cell(found: Mapping[str, Any], *, more: bool) -> str:
    low, high = found["interval"]
    shown = f"<b>{100 * found['share']:.1f} %</b> <span class='quiet'>[{100 * low:.0f}, {100 * high:.0f}]</span>"
    against = found.get("against_base")
    if not against:
        return shown
    by, least, most = (100 * against[key] for key in ("difference", "low", "high"))
    kind = "tie" if least <= 0 <= most else "good" if (least > 0) == more else "bad"
    return f'{shown}<br/><span class="badge {kind}">{by:+.1f} [{least:+.1f}, {most:+.1f}]</span>'
