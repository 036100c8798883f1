"""Prompts that tell a general model what to do with a stay. The embedded tiny base needs none of it: it only knows stays."""

from __future__ import annotations

from collections.abc import Mapping

from polyalign.core.errors import UserError
from polyalign.datasets.clinical.stay import CLOSING, Stay, prompt_of

PLAIN = "plain"
FAITHFUL = (
    "Copy every number, unit and date exactly as it stands in the record: do not round, convert or correct any of them. "
    "State nothing that the record does not say, and do not guess at causes. Where the record has no date for something, give "
    "none."
)
INSTRUCTIONS: Mapping[str, str] = {
    "physician": (
        "You are the physician responsible for the patient below and write the discharge summary of this hospital stay. Tell "
        "what happened in the order of time, in whole sentences: why the patient came, the findings that were out of the "
        "ordinary, what was done and given, and how the stay ended. " + FAITHFUL
    ),
    "brief": "Summarise the hospital stay below in one paragraph for the doctor who takes over. Leave no event out. "
    + FAITHFUL,
    "timeline": (
        "Rewrite the hospital stay below as a summary with one sentence for each day on which something happened, and a last "
        "sentence for how it ended. " + FAITHFUL
    ),
}
"""What is said before the record; none of them holds a figure, so that a judge of numbers finds only those of the record."""


def styles() -> list[str]:
    return [PLAIN, *INSTRUCTIONS]


def instruction_prompt(stay: Stay, style: str = "physician") -> str:
    """The prompt for a stay in one of :func:`styles`; ``plain`` is the stay alone, as the embedded base reads it.

    Raises:
        UserError: another style.
    """
    record = prompt_of(stay)
    if style == PLAIN:
        return record
    if style not in INSTRUCTIONS:
        raise UserError(f"there is no style {style!r} of prompts; choose one of: {', '.join(styles())}")
    record = record.removesuffix(CLOSING).rstrip("\n")
    return f"{INSTRUCTIONS[style]}\n\nRecord:\n{record}\n\nDischarge summary:"
