"""Rows of the pair store: the schema, a row to its stored form and back, and what can be wrong with one.

A row in memory is a mapping::

    pair_id          str, unique in the store
    condition        {"prompt": str, "task": str (optional), anything JSON can hold}
    chosen, rejected outputs of the store's kind (datasets/outputs.py): PIL pictures, or the bytes of a picture file, which
                     are kept as they are; texts
    chosen_scores, rejected_scores   {judge name: float}
    provenance       {"model", "model_hash": str or None, "chosen_seed", "rejected_seed": int or None,
                      "sampler", "judges": anything JSON can hold}

Conditions with pictures have further columns (:mod:`polyalign.datasets.pictured_rows`).

In the file ``condition`` is a struct of ``prompt``, ``task`` and ``metadata`` (JSON text of the rest) and ``sampler`` and
``judges`` are JSON text, so that every shard has the same schema whatever the rows hold: parquet files whose structs differ do
not open as one data set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from polyalign.datasets import pictured_rows
from polyalign.datasets.outputs import KINDS, OutputKind, kind_of

SIDES = ("chosen", "rejected")
PICTURE = KINDS["picture"]
SCORES = ("chosen_scores", "rejected_scores")
_CONDITION = {"prompt": "string", "task": "string", "metadata": "string"}
_PROVENANCE = {
    "model": "string",
    "model_hash": "string",
    "chosen_seed": "int64",
    "rejected_seed": "int64",
    "sampler": "string",
    "judges": "string",
}
_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}


def schema_of(judges: Sequence[str], kind: OutputKind = PICTURE, *, pictured: bool = False) -> pa.Schema:
    """The arrow schema with ``judges`` as score columns, and the note by which Hugging Face ``datasets`` knows the outputs.
    ``pictured``: conditions have pictures."""
    structs = {
        "condition": _CONDITION,
        **dict.fromkeys(SCORES, dict.fromkeys(judges, "float64")),
        "provenance": _PROVENANCE,
    }
    order = ("pair_id", "condition", *SIDES, *SCORES, "provenance")
    fields, features = [], {}
    for name in order:
        if name in structs:
            parts = structs[name]
            fields.append(pa.field(name, pa.struct([pa.field(key, _TYPES[part]) for key, part in parts.items()])))
            features[name] = {key: {"dtype": part, "_type": "Value"} for key, part in parts.items()}
        elif name in SIDES:
            fields.append(pa.field(name, kind.arrow))
            features[name] = kind.feature
        else:
            fields.append(pa.field(name, pa.string()))
            features[name] = {"dtype": "string", "_type": "Value"}
    for name, (column, feature) in pictured_rows.COLUMNS.items() if pictured else ():
        fields.append(pa.field(name, column))
        features[name] = feature
    note = json.dumps({"info": {"features": features}}, sort_keys=True)
    return pa.schema(fields, metadata={"huggingface": note})


def to_stored(
    row: Mapping[str, Any], judges: Sequence[str], kind: OutputKind = PICTURE, *, pictured: bool = False
) -> dict[str, Any]:
    """One row as the file holds it.

    Raises:
        ValueError: the row's judges are not the store's, so the shards would not open as one data set.
        TypeError: an output of another kind, or something in the condition or provenance that JSON cannot hold.
    """
    for side in SCORES:
        if set(row[side]) != set(judges):
            raise ValueError(
                f"pair {row['pair_id']!r}: {side} of {sorted(row[side])}, but this store's judges are {sorted(judges)}"
            )
    condition = dict(row["condition"])
    if pictured:
        condition.pop(pictured_rows.IMAGES, None)
    prompt, task = condition.pop("prompt"), condition.pop("task", None)
    if task is not None and not isinstance(task, str):  # the column is of text; metadata hold whatever JSON can
        condition["task"], task = task, None
    provenance = {name: row["provenance"].get(name) for name in _PROVENANCE}
    return {
        "pair_id": row["pair_id"],
        "condition": {"prompt": prompt, "task": task, "metadata": _json(condition)},
        **{side: kind.encode(row[side]) for side in SIDES},
        **{side: {name: float(row[side][name]) for name in judges} for side in SCORES},
        "provenance": {
            **provenance,
            "sampler": _json(provenance["sampler"] or {}),
            "judges": _json(provenance["judges"] or {}),
        },
        **(pictured_rows.to_cells(row) if pictured else {}),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def condition_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored condition as a plain mapping."""
    task = {} if stored.get("task") is None else {"task": stored["task"]}
    return {"prompt": stored["prompt"], **task, **json.loads(stored.get("metadata") or "{}")}


def from_stored(stored: Mapping[str, Any], kind: OutputKind = PICTURE, *, decoded: bool = True) -> dict[str, Any]:
    """A stored row in memory: JSON text opened, outputs decoded (pictures to RGB) or left as the bytes of their files."""
    provenance = stored["provenance"]
    opened = {name: json.loads(provenance[name] or "{}") for name in ("sampler", "judges")}
    more = pictured_rows.from_cells(stored) if pictured_rows.IMAGES in stored else {}
    images = {pictured_rows.IMAGES: more.pop(pictured_rows.IMAGES)} if more else {}
    plain = {name: cell for name, cell in stored.items() if name not in pictured_rows.COLUMNS}
    return {
        **plain,
        **more,
        "condition": condition_of(stored["condition"]) | images,
        **{side: (kind.decode if decoded else kind.kept)(stored[side]) for side in SIDES},
        "provenance": {**provenance, **opened},
    }


def schema_problems(schema: pa.Schema) -> list[str]:
    """Columns that are missing or of another type than :func:`schema_of` gives; extra columns are allowed."""
    problems, kind = [], kind_of(schema) or PICTURE
    for field in schema_of((), kind):
        if field.name not in schema.names:
            problems.append(f"column '{field.name}' is missing; columns: {', '.join(schema.names)}")
            continue
        found = schema.field(field.name).type
        if field.name in SCORES:
            if not pa.types.is_struct(found) or any(not pa.types.is_floating(part.type) for part in found):
                problems.append(f"column '{field.name}' must be a struct with a number for each judge, found {found}")
        elif field.name in SIDES:
            if not kind.fits(found):
                problems.append(f"column '{field.name}' must be {_types_of_outputs(field.name, kind)}, found {found}")
        elif pa.types.is_struct(field.type):
            parts = {part.name: part.type for part in found} if pa.types.is_struct(found) else None
            needed = ["prompt"] if field.name == "condition" else list(_PROVENANCE)
            if parts is None or any(parts.get(name) != field.type.field(name).type for name in needed):
                problems.append(f"column '{field.name}' must be {field.type}, found {found}")
        elif found != field.type:
            problems.append(f"column '{field.name}' must be {field.type}, found {found}")
    return [*problems, *(pictured_rows.column_problems(schema) if pictured_rows.is_pictured(schema) else ())]


def _types_of_outputs(side: str, kind: OutputKind) -> str:
    """What a column of outputs may be: any kind's type for the first, and that of the first for the second."""
    return str(kind.arrow) if side == "rejected" else " or ".join(f"{one.arrow} ({one.words})" for one in KINDS.values())


def row_problems(stored: Mapping[str, Any], kind: OutputKind = PICTURE) -> list[tuple[str, str]]:
    """(column, what is wrong) of one stored row whose columns have the right types."""
    problems: list[tuple[str, str]] = []
    if not stored["pair_id"]:
        problems.append(("pair_id", "is empty"))
    condition = stored["condition"] or {}
    if not (condition.get("prompt") or "").strip():
        problems.append(("condition", "the caption (prompt) is missing or empty"))
    problems += _json_problems("condition", condition, ("metadata",), must_be_object=True)
    problems += _json_problems("provenance", stored["provenance"] or {}, ("sampler", "judges"))
    problems += [(side, problem) for side in SIDES if (problem := kind.problem(stored[side])) is not None]
    for side in SCORES:
        for judge, score in (stored[side] or {}).items():
            if score is None or not math.isfinite(score):
                problems.append((side, f"judge '{judge}' gave {score}, expected a finite number"))
    return [*problems, *(pictured_rows.cell_problems(stored) if pictured_rows.IMAGES in stored and not problems else ())]


def _json_problems(
    column: str, part: Mapping[str, Any], names: Sequence[str], *, must_be_object: bool = False
) -> list[tuple[str, str]]:
    problems = []
    for name in names:
        text = part.get(name)
        if not text:
            continue
        try:
            opened = json.loads(text)
        except json.JSONDecodeError as error:
            problems.append((column, f"'{name}' is not JSON: {error.msg} at character {error.pos}"))
            continue
        if must_be_object and not isinstance(opened, dict):
            problems.append((column, f"'{name}' must be a JSON object, found {type(opened).__name__}"))
    return problems
