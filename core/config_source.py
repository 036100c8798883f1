"""Reading recipes from YAML and the command line, with the place of every value kept.

YAML is read by the 1.2 core schema, not PyYAML's 1.1: ``no`` and ``off`` are words and not false (``mixed_precision: no``),
``1e-5`` is a number, ``010`` is ten, ``1:30`` and ``2026-01-01`` are text. What is written here reads the same back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.errors import UserError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was set: a line of a file, or the command line (``file`` is None)."""

    file: Path | None = None
    line: int = 0

    def __str__(self) -> str:
        return f"set in {shown(self.file)}:{self.line}" if self.file else "set on the command line"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe."""

    path: KeyPath
    message: str
    place: Place | None = None

    def __str__(self) -> str:
        where = f"; {self.place}" if self.place else ""
        return f"{dotted(self.path) or 'recipe'}: {self.message}{where}"


@dataclass
class Draft:
    """A recipe as read, before its schema has seen it."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place | None:
        """The place of the value at ``path``, or of the nearest section around it that was written down."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None


def dotted(path: KeyPath) -> str:
    """``("judges", 0, "name")`` as ``judges.0.name``, the way overrides write it."""
    return ".".join(str(part) for part in path)


def shown(file: Path | None) -> str:
    """A file's path, relative to the working directory where that is shorter."""
    if file is None:
        return "the command line"
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(file)


class _Replace(dict):
    """A mapping tagged ``!replace``: it takes the place of the parent's section instead of being merged into it."""


_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's own rules beside ours, so that text which either would take for something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(_pattern), [*_first, ""] if _tag.endswith("null") else list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value, 10))


def to_yaml(data: Any) -> str:
    """YAML text that :func:`parse` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML.

    Raises:
        UserError: it is not YAML.
    """
    places: dict[KeyPath, Place] = {}
    return _parse(text, None, places)


def read(file: Path, find: Callable[[str, Path], Path]) -> Draft:
    """Read ``file`` and everything it extends. A child's sections are merged into its parent's key by key; lists and values
    replace; a mapping tagged ``!replace`` replaces the parent's whole section.

    Args:
        find: turns the name after ``extends`` and the folder of the file that says so into a path.

    Raises:
        UserError: unreadable file, YAML syntax, duplicate keys, an unknown parent, files that extend one another in a circle.
    """
    chain: list[tuple[Path, dict[str, Any], dict[KeyPath, Place]]] = []
    current: Path | None = file
    while current is not None:
        seen = [entry[0].resolve() for entry in chain]
        if current.resolve() in seen:
            names = " -> ".join(shown(path) for path in [*(entry[0] for entry in chain), current])
            raise UserError(f"extends: these files extend one another in a circle: {names}. Remove one of the extends lines.")
        places: dict[KeyPath, Place] = {}
        data = _parse(_text(current), current, places)
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise UserError(f"{shown(current)}:1: a recipe is a mapping of keys to values, found {type(data).__name__}.")
        chain.append((current, data, places))
        current = _parent(current, data, places, find)
    draft = Draft(files=[entry[0] for entry in chain])
    for _, data, places in reversed(chain):
        _merge(draft, data, places, ())
    return draft


def _parent(file: Path, data: dict[str, Any], places: dict[KeyPath, Place], find: Callable[[str, Path], Path]) -> Path | None:
    if "extends" not in data:
        return None
    name, place = data.pop("extends"), places.pop(("extends",))
    if not isinstance(name, str) or not name:
        raise UserError(f"{shown(file)}:{place.line}: extends: must be one file or packaged recipe by name, found {name!r}.")
    try:
        return find(name, file.parent)
    except UserError as error:
        raise UserError(f"{shown(file)}:{place.line}: extends: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(file)}: is not UTF-8 text (byte {error.start}); a recipe is a YAML text file.") from error
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({error.strerror}).") from error


def _parse(text: str, file: Path | None, places: dict[KeyPath, Place]) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _construct(loader, node, (), file, places, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{_at(file, mark)}: not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{shown(file)}: not valid YAML: {error}.") from error


def _at(file: Path | None, mark: Any) -> str:
    if file is None or mark is None:
        return shown(file)
    return f"{shown(file)}:{mark.line + 1}"


def _construct(
    loader: _Loader, node: Any, path: KeyPath, file: Path | None, places: dict[KeyPath, Place], above: tuple[int, ...]
) -> Any:
    """The value of ``node``; notes the line of every key and list entry below it."""
    if id(node) in above:
        raise UserError(f"{_at(file, node.start_mark)}: {dotted(path)}: an anchor that contains itself cannot be a setting.")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        for index, child in enumerate(node.value):
            places[(*path, index)] = Place(file, child.start_mark.line + 1)
        return [_construct(loader, child, (*path, i), file, places, above) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag in ("tag:yaml.org,2002:map", "!replace"):
        mapping: dict[str, Any] = _Replace() if node.tag == "!replace" else {}
        for key_node, child in node.value:
            key = _key(key_node, file)
            here = (*path, key)
            if key in mapping:
                first = f"first in line {places[here].line}" if file else "given twice"
                raise UserError(f"{_at(file, key_node.start_mark)}: {dotted(here)}: duplicate key, {first}. Keep one of them.")
            places[here] = Place(file, key_node.start_mark.line + 1)
            mapping[key] = _construct(loader, child, here, file, places, above)
        return mapping
    return loader.construct_object(node, deep=True)


def _key(node: Any, file: Path | None) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{_at(file, node.start_mark)}: a key must be a plain word, not a list or mapping.")
    if node.value == "<<":
        raise UserError(f"{_at(file, node.start_mark)}: the YAML merge key '<<' is not supported; use 'extends: FILE'.")
    return node.value


def _merge(draft: Draft, data: Mapping[str, Any], places: Mapping[KeyPath, Place], path: KeyPath) -> None:
    target: Any = draft.data
    for part in path:
        target = target[part]
    for key, value in data.items():
        here = (*path, key)
        if isinstance(value, dict) and not isinstance(value, _Replace) and isinstance(target.get(key), dict):
            draft.places[here] = places[here]
            _merge(draft, value, places, here)
            continue
        _forget(draft, here)
        target[key] = _plain(value)
        draft.places.update({other: place for other, place in places.items() if other[: len(here)] == here})


def _plain(value: Any) -> Any:
    """Without the mark of ``!replace``, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else value


def _forget(draft: Draft, path: KeyPath) -> None:
    for other in [other for other in draft.places if other[: len(path)] == path]:
        del draft.places[other]


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Set ``a.b.0.c=VALUE`` in ``draft``, one after another; a value replaces what was there, a mapping too. Overrides that
    cannot be applied are noted in ``draft.problems``, to be shown together with all others."""
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip().removeprefix("--")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", name):
            problem = f"not an override: write it as key=value, for example seed=3 (found {override!r})"
            draft.problems.append(Problem((override.split("=")[0],), problem, Place()))
            continue
        path = tuple(name.split("."))
        try:
            value = parse_value(text)
        except UserError as error:
            draft.problems.append(Problem(path, str(error).split(": ", 1)[-1].rstrip(".") + f" (found {text!r})", Place()))
            continue
        _set(draft, path, _plain(value))


def _set(draft: Draft, keys: tuple[str, ...], value: Any) -> None:
    target: Any = draft.data
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        step = _step(target, key, may_append=last)
        if step is None:
            message = f"is not an entry of the list {dotted(path)}, which has {len(target)} entries, counted from 0"
            draft.problems.append(Problem((*path, key), message, Place()))
            return
        path = (*path, step)
        if last:
            _forget(draft, path)
            target[step] = value
            draft.places[path] = Place()
            return
        if target[step] is None:
            target[step] = {}
            draft.places[path] = Place()
        if not isinstance(target[step], (dict, list)):
            message = f"cannot be set, since {dotted(path)} is the single value {target[step]!r} and not a section"
            draft.problems.append(Problem((*path, *keys[depth + 1 :]), message, Place()))
            return
        target = target[step]


def _step(target: Any, key: str, *, may_append: bool) -> Any:
    """The key or index that ``key`` means in ``target``, where it then exists; None for a list that has no such entry."""
    if isinstance(target, dict):
        target.setdefault(key, None)
        return key
    if not key.isdigit() or int(key) >= len(target) + may_append:
        return None
    if int(key) == len(target):
        target.append(None)
    return int(key)
