"""What this run changed against the packaged recipe it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyalign.core.config import find_config, open_draft, packaged
from polyalign.core.config_source import to_yaml
from polyalign.core.environment import without_folders
from polyalign.core.errors import UserError

ABSENT = "(not set)"

How = Literal["stored", "named", "nearest"]


@dataclass(frozen=True)
class RecipeDifference:
    """``changes`` holds (dotted key, the recipe's value, this run's value).

    ``how`` tells how the recipe was found: ``stored`` in the run folder as ``recipe.yaml``, ``named`` by the run's
    environment.json or config.yaml, or ``nearest``: of the packaged recipes the one this run differs from least, a guess.
    ``unstated``: keys of the run that the recipe leaves to the defaults, which cannot be told from additions here.
    """

    name: str
    how: How
    changes: tuple[tuple[str, str, str], ...]
    unstated: int


def compare_with_recipe(folder: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> RecipeDifference | None:
    """The difference from the recipe, or None where none can be found."""
    stored = folder / "recipe.yaml"
    if stored.is_file() and (content := _read(stored)) is not None:
        return _difference("recipe.yaml", "stored", content, config)
    known = packaged()
    for name in _names(environment):
        path = known.get(name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml"))
        if path is not None and (content := _read(path)) is not None:
            return _difference(name, "named", content, config)
    return _nearest(known, config)


def _names(environment: Mapping[str, Any]) -> list[str]:
    """What may name the recipe: the key ``recipe``, and the words of the recorded command."""
    argv = environment.get("argv")
    words = [environment.get("recipe"), *(argv[1:] if isinstance(argv, list) else [])]
    return [word for word in words if isinstance(word, str)]


def _read(path: Path) -> dict[str, Any] | None:
    """The recipe with everything it extends; None if it or one of those cannot be read."""
    try:
        return dict(open_draft(find_config(path)).data)
    except UserError:
        return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values; lists are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _difference(name: str, how: How, recipe: Mapping[str, Any], config: Mapping[str, Any]) -> RecipeDifference:
    ours = {key: value for key, value in flatten(config) if key not in ("extends", "run", "run.folder")}
    theirs = {key: value for key, value in flatten(recipe) if key not in ("extends", "run", "run.folder")}
    changes = [
        (key, _text(value), _text(ours[key]) if key in ours else ABSENT)
        for key, value in theirs.items()
        if key not in ours or not _same(ours[key], value)
    ]
    new = [key for key in ours if key not in theirs]
    if how == "stored":
        changes += [(key, ABSENT, _text(ours[key])) for key in new]
        new = []
    return RecipeDifference(name=name, how=how, changes=tuple(changes), unstated=len(new))


def _nearest(known: Mapping[str, Path], config: Mapping[str, Any]) -> RecipeDifference | None:
    """Among the recipes of the run's modality, the one with the fewest changed keys (of equals, the one that says most)."""
    modality = config.get("modality")
    best: tuple[tuple[int, int], RecipeDifference] | None = None
    for name, path in known.items():
        content = _read(path) if name.startswith(f"{modality}/") else None
        if content is None:
            continue
        found = _difference(name, "nearest", content, config)
        rank = (len(found.changes), found.unstated)
        if best is None or rank < best[0]:
            best = (rank, found)
    return best[1] if best else None


def _same(ours: Any, theirs: Any) -> bool:
    """Equal as configuration: 1 and 1.0 are, and so is a section in a list that states only some of its keys."""
    if ours == theirs:
        return True
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return all(key in ours and _same(ours[key], value) for key, value in theirs.items())
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return all(map(_same, ours, theirs))
    if isinstance(ours, Mapping | list) or isinstance(theirs, Mapping | list):
        return False
    try:
        return not isinstance(ours, bool) and not isinstance(theirs, bool) and float(ours) == float(theirs)
    except (TypeError, ValueError):
        return False


def _text(value: Any) -> str:
    """On one line, without the folders of absolute paths: the report is made to be sent around."""
    shown = " ".join(to_yaml(value).removesuffix("\n").removesuffix("\n...").split())
    return without_folders(shown)
