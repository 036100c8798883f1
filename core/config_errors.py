"""Turning pydantic's errors into sentences for the person who wrote the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from polyalign.core.config_source import Draft, KeyPath, Problem, dotted
from polyalign.core.schema_walk import Shape, all_paths, completed, inside, narrowed, without_tags

EXPECTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section (keys with values)",
    "string_too_short": "must not be empty",
}
SECTION_EXPECTED = ("model_type", "model_attributes_type", "dataclass_type", "dict_type")
LONGEST_VALUE = 60


def problems_of(error: ValidationError, schema: type[BaseModel], draft: Draft) -> list[Problem]:
    """One problem for each error, in the order of the schema."""
    problems: dict[KeyPath, Problem] = {}
    data = completed(draft.data, Shape(sections=(schema,)))
    for details in error.errors(include_url=False):
        path, shape, outer = without_tags(details["loc"], schema, data)
        problem = _problem(details, path, shape, outer, schema, draft)
        before = problems.get(problem.path)
        problems[problem.path] = _either(before, problem) if before else problem
    return list(problems.values())


def _either(first: Problem, second: Problem) -> Problem:
    """Two problems of one value: what each type of a union says against it."""
    head, found, tail = first.message.rpartition(" (found ")
    other = second.message.rpartition(" (found ")[0].removeprefix("must ").removeprefix("be ")
    if not found or not other or other in head:
        return first
    return replace(first, message=f"{head} or {other}{found}{tail}")


def booleans_for_numbers(schema: type[BaseModel], draft: Draft) -> list[Problem]:
    """``steps: true`` would pass as one step: pydantic reads true as 1 and false as 0."""
    problems: list[Problem] = []

    def visit(value: Any, shape: Shape, path: KeyPath) -> None:
        if isinstance(value, bool):
            kinds = {other for other in shape.others if isinstance(other, type)}
            if kinds & {int, float} and bool not in kinds:
                message = f"must be a number, not true or false (found {short(value)})"
                problems.append(Problem(path, message, draft.place(path)))
        elif isinstance(value, (dict, list)):
            shape = narrowed(shape, value)
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                visit(child, inside(shape, key), (*path, key))

    visit(draft.data, Shape(sections=(schema,)), ())
    return problems


def _problem(
    details: ErrorDetails, path: KeyPath, shape: Shape, outer: Shape, schema: type[BaseModel], draft: Draft
) -> Problem:
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        message = f"unknown key (found {short(value)}){_key_hint(path, outer, schema)}"
    elif kind == "missing":
        message = "missing, and it has no default"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, shape.tag or "name")
        message = _tag_message(kind, value, shape)
    elif kind == "literal_error":
        message = _choice_message(_allowed(shape, details), value)
    elif kind in SECTION_EXPECTED:
        message = f"must be a section (keys with values) (found {short(value)}){_section_hint(path, shape)}"
    elif kind in ("too_short", "too_long"):
        message = f"{details['msg'].replace('List should', 'must').replace('Tuple should', 'must')} (found {short(value)})"
    else:
        message = f"{_plain_message(details)} (found {short(value)})"
    return Problem(path, message, draft.place(path))


def _plain_message(details: ErrorDetails) -> str:
    message = EXPECTED.get(details["type"], details["msg"])
    for ours, theirs in (("must ", "Input should "), ("", "Value error, "), ("", "Assertion failed, ")):
        message = message.replace(theirs, ours)
    return message


def _tag_message(kind: str, value: Any, shape: Shape) -> str:
    allowed = list(shape.tagged())
    if kind == "union_tag_not_found":
        return f"missing, and it has no default; allowed: {', '.join(allowed)}"
    found = value.get(shape.tag) if isinstance(value, dict) else value
    return _choice_message(allowed, found)


def _choice_message(allowed: Sequence[Any], value: Any) -> str:
    names = [str(choice) for choice in allowed]
    return f"must be one of {', '.join(names)} (found {short(value)}){_did_you_mean(str(value), names)}"


def _allowed(shape: Shape, details: ErrorDetails) -> list[Any]:
    choices = [choice for other in shape.others if get_origin(other) is Literal for choice in get_args(other)]
    return choices or [details.get("ctx", {}).get("expected", "")]


def _key_hint(path: KeyPath, outer: Shape, schema: type[BaseModel]) -> str:
    """The nearest valid key of the same section, else the place elsewhere in the recipe where a key of that name belongs."""
    wrong, here = str(path[-1]), path[:-1]
    keys = list(outer.fields())
    near = difflib.get_close_matches(wrong.lower(), keys, n=1)
    if near:
        return f", did you mean {dotted((*here, near[0]))}"
    everywhere = [other for other in all_paths(schema) if other[:-1] != here]
    by_leaf: dict[str, list[KeyPath]] = {}
    for other in everywhere:
        by_leaf.setdefault(str(other[-1]), []).append(other)
    leaf = [wrong] if wrong in by_leaf else difflib.get_close_matches(wrong.lower(), by_leaf, n=1, cutoff=0.8)
    if leaf:
        return f", did you mean {' or '.join(dotted(other) for other in by_leaf[leaf[0]][:3])}"
    return f"; keys here: {', '.join(keys)}" if keys else ""


def _section_hint(path: KeyPath, shape: Shape) -> str:
    """``objective.beta: 2000`` was meant as ``objective.beta.value: 2000``."""
    keys = list(shape.fields())
    for likely in ("value", "name"):
        if likely in keys:
            return f", did you mean {dotted((*path, likely))}"
    return f"; its keys: {', '.join(keys)}" if keys else ""


def _did_you_mean(wrong: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong.lower(), valid, n=1)
    return f", did you mean {near[0]}" if near else ""


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
