"""Arrows point one way: modalities -> datasets, evaluation -> core; optional packages only inside functions."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyalign.core.environment import REQUIRED

PARTS = ("core", "datasets", "evaluation", "modalities")
SHARED = {path.stem for path in (Path(__file__).parents[2] / "modalities").glob("*.py")}
"""Modules that the rooms under modalities share; they are no room, and import none."""

MODULE_OF = {"pillow": "PIL", "pyyaml": "yaml"}
BROUGHT_ALONG = {
    "huggingface_hub",
    "jinja2",
    "psutil",
    "pyarrow",
    "pydantic_core",
    "tokenizers",
}  # hard dependencies of our hard dependencies
EVERYWHERE = {MODULE_OF.get(name, name) for name in REQUIRED} | BROUGHT_ALONG | set(sys.stdlib_module_names) | {"polyalign"}


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, at any depth; 'from a import b' counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def forbidden(importer: str, name: str) -> bool:
    """Whether the module ``importer`` (a dotted name below polyalign) may not import ``name``."""
    if not name.startswith("polyalign."):
        return False
    here, there = importer.split("."), name.split(".")[1:]
    if there[0] not in PARTS:
        return False
    if here[0] in ("core", "datasets", "evaluation"):
        return there[0] not in ("core", here[0])
    return there[0] == "modalities" and len(there) > 1 and there[1] not in SHARED and here[1:2] != there[1:2]


def python_files(root: Path) -> list[tuple[str, str, ast.Module]]:
    """(dotted module name, package it lies in, syntax tree) of every file of the four parts."""
    found = []
    for part in PARTS:
        for path in sorted((root / part).rglob("*.py")):
            names = path.relative_to(root).with_suffix("").parts
            names = names[:-1] if names[-1] == "__init__" else names
            package = names if path.name == "__init__.py" else names[:-1]
            found.append((".".join(names), ".".join(("polyalign", *package)), ast.parse(path.read_text(encoding="utf-8"))))
    return found


@pytest.mark.parametrize(
    ("importer", "name", "expected"),
    [
        ("core.trainer", "polyalign.core.scores.Scores", False),
        ("core.trainer", "polyalign.datasets.pairs", True),
        ("core.cli", "polyalign.modalities.image", True),
        ("datasets.pairs", "datasets.load_dataset", False),
        ("datasets.pairs", "polyalign.evaluation.statistics", True),
        ("evaluation.report", "polyalign.core.errors", False),
        ("evaluation.report", "polyalign.modalities.image.adapter", True),
        ("modalities.image.stages", "polyalign.evaluation.report", False),
        ("modalities.image.stages", "polyalign.modalities.image.adapter", False),
        ("modalities.image.stages", "polyalign.modalities.audio.adapter", True),
        ("modalities.image.stages", "polyalign.modalities.arms.Room", False),
        ("modalities.verbs", "polyalign.modalities.arms.Room", False),
        ("modalities.verbs", "polyalign.modalities.image.adapter", True),
    ],
)
def test_the_rule_itself(importer: str, name: str, expected: bool) -> None:
    assert forbidden(importer, name) is expected


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from ..audio import adapter\nfrom . import stages")
    names = [name for _, name in imported(tree, "polyalign.modalities.image")]
    assert names == ["polyalign.modalities.audio.adapter", "polyalign.modalities.image.stages"]


def test_imports_point_one_way(root: Path) -> None:
    files = python_files(root)
    assert len(files) > 20
    wrong = [
        f"{importer}:{line} imports {name}"
        for importer, package, tree in files
        for line, name in imported(tree, package)
        if forbidden(importer, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_names_other_parts_in_strings(root: Path) -> None:
    path = re.compile(r"polyalign\.(modalities|datasets|evaluation)[\w.:]*")
    wrong = [
        f"{importer}:{node.lineno} names {node.value}"
        for importer, _, tree in python_files(root)
        if importer.startswith("core.") and importer not in ("core.cli", "core.verbs")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.fullmatch(node.value)
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_where_they_are_used(root: Path) -> None:
    wrong = [
        f"{importer}:{line} imports {name} for every user"
        for importer, package, tree in python_files(root)
        for statement in tree.body
        if isinstance(statement, (ast.Import, ast.ImportFrom))
        for line, name in imported(statement, package)
        if name.split(".")[0] not in EVERYWHERE
    ]
    assert not wrong, "\n".join(wrong)
