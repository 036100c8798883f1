"""What an exported pair takes along besides its pictures and caption, so that nothing is lost on the way there and back.

Every format of ours has one place for it, called ``polyalign``: the pair's id, the rest of its condition, scores, provenance,
and the hashes of the two pictures. Other programs ignore it. If the pictures are not those it speaks of (someone replaced or
swapped them), its scores would be false, so the row is refused until the key is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyalign.core.files import sha256_of
from polyalign.datasets.formats.source import Pair
from polyalign.datasets.formats.text_lines import as_object
from polyalign.datasets.pair_rows import SCORES
from polyalign.datasets.prompts import as_condition

KEY = "polyalign"
_LARGEST = 1e300  # of a score; also false for infinities, numbers that are none, and integers that no float can hold
_TEXTS = ("model", "model_hash")
_NUMBERS = ("chosen_seed", "rejected_seed")
_OPEN = ("sampler", "judges")


def carried(row: Mapping[str, Any], chosen: bytes, rejected: bytes) -> dict[str, Any]:
    """What to write under ``KEY`` for a row of the store whose pictures are exported as these bytes."""
    return {
        "pair_id": row["pair_id"],
        "condition": {name: value for name, value in row["condition"].items() if name != "prompt"},
        **{side: row[side] for side in SCORES},
        "provenance": {name: row["provenance"][name] for name in (*_TEXTS, *_NUMBERS, *_OPEN)},
        "sha256": [sha256_of(chosen), sha256_of(rejected)],
    }


def pair_of(pair_id: str, given: Mapping[str, Any], chosen: bytes, rejected: bytes, origin: Mapping[str, Any]) -> Pair:
    """The pair that a row of data means. ``given`` has the prompt (or caption, or text), whatever else belongs to the
    condition, and under ``KEY`` what an export of ours took along, as a mapping or as JSON text.

    Raises:
        ValueError: no caption, or what stands under ``KEY`` is damaged or speaks of other pictures.
    """
    condition = as_condition({name: value for name, value in given.items() if name != KEY})
    if given.get(KEY) is None:
        return Pair(pair_id, condition, chosen, rejected, origin)
    known = as_object(given[KEY])
    problem = _problem(known)
    if problem:
        raise ValueError(f"'{KEY}', which an export wrote, is damaged: {problem}. Remove it to import the pair as your own")
    if known["sha256"] != [sha256_of(chosen), sha256_of(rejected)]:
        raise ValueError(
            f"'{KEY}' beside this pair speaks of other pictures (replaced or swapped?), so its scores may be false. Remove "
            f"'{KEY}' from all rows to import them as your own preferences"
        )
    scores = tuple({name: float(score) for name, score in known[side].items()} for side in SCORES)
    return Pair(
        known["pair_id"],
        {**condition, **known["condition"]},
        chosen,
        rejected,
        scores=scores,  # pyright: ignore[reportArgumentType]  (two of them)
        provenance={name: known["provenance"].get(name) for name in (*_TEXTS, *_NUMBERS, *_OPEN)},
    )


def _problem(known: Mapping[str, Any]) -> str | None:
    """What is wrong with what an export wrote."""
    wanted = {"pair_id": str, "condition": dict, **dict.fromkeys(SCORES, dict), "provenance": dict, "sha256": list}
    for name, kind in wanted.items():
        if not isinstance(known.get(name), kind) or not known[name] and name not in ("condition",):
            return f"'{name}' is {known.get(name)!r}"
    if "prompt" in known["condition"]:  # it stands in the row itself, where people see and change it
        return f"'condition' holds a prompt, {known['condition']['prompt']!r}"
    for name, kinds in (*dict.fromkeys(_TEXTS, str).items(), *dict.fromkeys(_NUMBERS, int).items()):
        value = known["provenance"].get(name)
        small = not isinstance(value, int) or abs(value) < 1 << 63
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not small):
            return f"provenance '{name}' is {value!r}"
    for side in SCORES:
        for judge, score in known[side].items():
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < _LARGEST:
                return f"{side} of '{judge}' is {score!r}"
    return None
