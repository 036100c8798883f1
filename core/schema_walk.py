"""Walking through a recipe's schema by key path: which section, list or union a path leads to.

Used for error messages, for ``polyalign explain`` and for the list of all keys. A *tagged union* is a union of sections that a
key (``name``) tells apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polyalign.core.config_source import KeyPath


@dataclass(frozen=True)
class Shape:
    """What may stand at a path: one of several section types, told apart by ``tag`` where there are several; the rest of the
    types are in ``others`` (lists, dicts, plain values), ``None`` left out."""

    sections: tuple[type[BaseModel], ...] = ()
    others: tuple[Any, ...] = ()
    tag: str | None = None

    def tagged(self) -> dict[str, type[BaseModel]]:
        """Tag value -> section."""
        if self.tag is None:
            return {}
        return {str(value): section for section in self.sections for value in literals(section, self.tag)}

    def fields(self) -> dict[str, list[tuple[type[BaseModel], FieldInfo]]]:
        """Key -> the sections that have it, with its definition there."""
        found: dict[str, list[tuple[type[BaseModel], FieldInfo]]] = {}
        for section in self.sections:
            for name, info in section.model_fields.items():
                found.setdefault(name, []).append((section, info))
        return found


def literals(section: type[BaseModel], key: str) -> tuple[Any, ...]:
    """The values that a ``Literal`` key allows."""
    info = section.model_fields.get(key)
    return get_args(info.annotation) if info and get_origin(info.annotation) is Literal else ()


def shape_of(annotation: Any, metadata: Sequence[Any] = ()) -> Shape:
    """The shape of a type annotation; ``metadata`` is what stands around it in ``Annotated``."""
    tag = next((item.discriminator for item in metadata if isinstance(getattr(item, "discriminator", None), str)), None)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return shape_of(inner, [*more, *metadata])
    if hasattr(annotation, "__value__"):  # a type alias statement
        return shape_of(annotation.__value__, metadata)
    if get_origin(annotation) in (Union, UnionType):
        parts = [shape_of(member) for member in get_args(annotation) if member is not NoneType]
        return Shape(
            sections=tuple(section for part in parts for section in part.sections),
            others=tuple(other for part in parts for other in part.others),
            tag=tag or next((part.tag for part in parts if part.tag), None),
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Shape(sections=(annotation,), tag=tag)
    return Shape(others=(annotation,), tag=tag)


def shape_of_field(info: FieldInfo) -> Shape:
    """The shape of a section's key."""
    shape = shape_of(info.annotation, info.metadata)
    tag = info.discriminator if isinstance(info.discriminator, str) else shape.tag
    return Shape(shape.sections, shape.others, tag)


def inside(shape: Shape, key: str | int) -> Shape:
    """The shape one step further in: a key of a section, an entry of a list, a value of a dict. Empty if there is none."""
    parts = [shape_of_field(info) for _, info in shape.fields().get(str(key), [])]
    for other in shape.others:
        arguments = [argument for argument in get_args(other) if argument is not Ellipsis]
        if get_origin(other) in (list, set, tuple, Sequence) and arguments:
            chosen = int(key) if get_origin(other) is tuple and str(key).isdigit() and int(key) < len(arguments) else 0
            parts.append(shape_of(arguments[chosen]))
        elif get_origin(other) in (dict, Mapping) and len(arguments) == 2:
            parts.append(shape_of(arguments[1]))
    return Shape(
        sections=tuple(dict.fromkeys(section for part in parts for section in part.sections)),
        others=tuple(dict.fromkeys(other for part in parts for other in part.others)),
        tag=next((part.tag for part in parts if part.tag), None),
    )


def through_lists(shape: Shape) -> Shape:
    """The shape of a list's entries; any other shape itself."""
    while not shape.sections and any(get_origin(other) in (list, tuple) for other in shape.others):
        shape = inside(shape, 0)
    return shape


def narrowed(shape: Shape, value: Any) -> Shape:
    """The one section of a tagged union that ``value`` (a mapping with the tag) chooses; otherwise ``shape`` itself."""
    if shape.tag and isinstance(value, Mapping):
        section = shape.tagged().get(str(value.get(shape.tag)))
        if section is not None:
            return Shape((section,), shape.others, None)
    return shape


def completed(value: Any, shape: Shape) -> Any:
    """``value`` with what the defaults of its sections say beyond their types' own defaults.

    A schema may give a key the default ``TrainSettings(steps=2)``, or one member of a tagged union; setting one key in that
    section must not make its others fall back to something else.
    """
    if isinstance(value, list):
        return [completed(child, inside(shape, index)) for index, child in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    shape = narrowed(shape, value)
    found = dict(value)
    for key, child in value.items():
        for _, info in shape.fields().get(key, [])[:1]:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            if isinstance(child, Mapping) and isinstance(default, BaseModel):
                found[key] = child = _under(child, default, shape_of_field(info).tag)
        found[key] = completed(child, inside(shape, key))
    return found


def _under(value: Mapping[str, Any], default: BaseModel, tag: str | None) -> dict[str, Any]:
    """``value`` laid over what ``default`` was made with, unless it chooses another member of the union."""
    chosen = getattr(default, tag) if tag else None
    if tag and value.get(tag, chosen) != chosen:
        return dict(value)
    return _laid_over(({tag: chosen} if tag else {}) | default.model_dump(exclude_unset=True), value)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _laid_over(below[key], above[key]) for key in above if _are_mappings(below.get(key), above[key])}
    return {**below, **above, **both}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def without_tags(location: Sequence[str | int], schema: type[BaseModel], data: Any) -> tuple[KeyPath, Shape, Shape]:
    """A pydantic error location as a key path: pydantic puts the chosen member of a union into it, which no user wrote.

    Returns:
        The path, the shape at the path, and the shape of what is around it.
    """
    shape = outer = Shape(sections=(schema,))
    path: list[str | int] = []
    value = data
    for part in location:
        if _is_member_label(shape, part, value):
            if part in shape.tagged():
                shape = Shape((shape.tagged()[str(part)],), (), None)
            continue
        outer = narrowed(shape, value)
        shape = inside(outer, part)
        path.append(part)
        value = _entry(value, part)
    return tuple(path), shape, outer


def _is_member_label(shape: Shape, part: str | int, value: Any) -> bool:
    if part in shape.tagged():
        return True
    if len(shape.sections) + len(shape.others) < 2 or isinstance(part, int):
        return False
    return not (isinstance(value, Mapping) and part in value) and part not in shape.fields()


def _entry(value: Any, part: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def all_paths(schema: type[BaseModel]) -> Iterator[KeyPath]:
    """Every key path of a recipe, without list indices, sections before their keys; a path common to the members of a union
    comes once."""
    seen: set[KeyPath] = set()
    yield from _paths(Shape(sections=(schema,)), (), seen, ())


def _paths(shape: Shape, path: KeyPath, seen: set[KeyPath], above: tuple[type[BaseModel], ...]) -> Iterator[KeyPath]:
    for section in shape.sections:
        if section in above:
            continue
        for name, info in section.model_fields.items():
            here = (*path, name)
            if here not in seen:
                seen.add(here)
                yield here
            yield from _paths(through_lists(shape_of_field(info)), here, seen, (*above, section))
