"""Recipes: the base class of their schemas, the loader, and the way back to YAML.

``load("image/quickstart", ["seed=3"], Recipe)`` finds the file (a path first, then the packaged recipes), reads it with
everything it ``extends``, applies the dotted overrides, validates the whole against the schema and either returns the frozen
recipe with the place of each of its values, or raises one :class:`UserError` that lists *all* that is wrong.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from polyalign.core.config_errors import booleans_for_numbers, problems_of
from polyalign.core.config_source import Draft, KeyPath, apply_overrides, read, shown, to_yaml
from polyalign.core.errors import UserError
from polyalign.core.schema_walk import Shape, completed

SUFFIXES = (".yaml", ".yml")
NOT_RECIPES = ("accelerate",)
"""Folders of packaged YAML files that are for another program."""


class Section(BaseModel):
    """Base class of everything in a recipe: frozen, no unknown keys; attribute docstrings are the documentation of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Provenance:
    """Where each value of a recipe was set."""

    draft: Draft

    @property
    def files(self) -> tuple[Path, ...]:
        """The recipe's file, then what it extends, in order."""
        return tuple(self.draft.files)

    def of(self, path: str) -> str:
        """``set in FILE:LINE``, ``set on the command line`` or ``default`` for a dotted path."""
        keys: KeyPath = tuple(int(part) if part.isdigit() else part for part in path.split("."))
        place = self.draft.places.get(keys)
        return str(place) if place else "default"


def load(source: str | Path, overrides: Sequence[str], schema: type[R]) -> tuple[R, Provenance]:
    """Read, override and validate a recipe.

    Raises:
        UserError: no such file, not YAML, or any number of wrong keys and values, all of them in one message.
    """
    return validate(open_draft(source, overrides), schema)


def open_draft(source: str | Path, overrides: Sequence[str] = ()) -> Draft:
    """The recipe as written and overridden, not yet validated; the command line reads the key ``modality`` from it."""
    draft = read(find_config(source), lambda name, folder: find_config(name, folder))
    apply_overrides(draft, overrides)
    return draft


def validate(draft: Draft, schema: type[R]) -> tuple[R, Provenance]:
    """The draft as a recipe.

    Raises:
        UserError: lists every problem as ``path: problem (found value), did you mean X; set in FILE:LINE``.
    """
    problems = [*draft.problems, *booleans_for_numbers(schema, draft)]
    try:
        recipe = schema.model_validate(completed(draft.data, Shape(sections=(schema,))))
    except ValidationError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in problems_of(error, schema, draft) if problem.path not in known]
        recipe = None
    if problems or recipe is None:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{shown(draft.files[0])}: {count}\n{lines}")
    return recipe, Provenance(draft)


def dump(recipe: BaseModel) -> str:
    """YAML of the whole recipe, defaults written out, that :func:`load` reads back to an equal recipe."""
    return to_yaml(_names_first(recipe.model_dump(mode="json")))


def _names_first(value: Any) -> Any:
    """The key that chooses a section's type before the keys of that type, as one would write it."""
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0] != "name")
        return {key: _names_first(child) for key, child in ordered}
    return [_names_first(child) for child in value] if isinstance(value, list) else value


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of recipe files, for editors that complete and check while one types."""
    document = schema.model_json_schema()
    extends = {"type": "string", "description": "Another recipe, by file or packaged name, that this one changes."}
    document["properties"] = {"extends": extends, **document.get("properties", {})}
    document["required"] = []  # what a file leaves out may stand in the recipe that it extends
    return document


def packaged() -> dict[str, Path]:
    """The recipes that come with polyalign: ``image/quickstart`` -> file."""
    root = Path(str(files("polyalign.configs")))
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if path.suffix in SUFFIXES and name.split("/")[0] not in NOT_RECIPES:
            found[name] = path
    return found


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """The file that ``name`` means: a path (relative to ``folder``, which is the working directory if not given), or else a
    packaged recipe, written ``image/quickstart``, ``image/quickstart.yaml`` or ``configs/image/quickstart.yaml``.

    Raises:
        UserError: there is no such file; the message lists the packaged recipes.
    """
    base = folder or Path()
    for suffix in ("", *SUFFIXES):
        path = Path(os.path.normpath(base / f"{Path(name).expanduser()}{suffix}"))
        if path.is_file():
            return path
    text = Path(name).as_posix()
    wanted = text.removeprefix("./").removeprefix("configs/")
    for suffix in SUFFIXES:
        wanted = wanted.removesuffix(suffix)
    known = packaged()
    if wanted in known:
        return known[wanted]
    if Path(text).suffix in SUFFIXES or not known:
        kind = "is a folder" if (base / text).is_dir() else "does not exist"
        reason = f"the file {text!r} {kind}"
    else:
        reason = f"no file and no packaged recipe is called {text!r}"
    raise UserError(f"{reason} (looked in {base.resolve()}).{_nearest(wanted, known)} {_listing(known)}")


def _nearest(wanted: str, known: dict[str, Path]) -> str:
    near = difflib.get_close_matches(wanted, known, n=1) if "/" in wanted else []
    if not near:  # by the last part, which several modalities may have
        lasts = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], {name.rsplit("/", 1)[-1] for name in known}, n=1)
        near = [name for name in known if name.rsplit("/", 1)[-1] in lasts]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _listing(known: dict[str, Path]) -> str:
    return f"Packaged recipes: {', '.join(known)}." if known else "No recipes are packaged with this installation."
