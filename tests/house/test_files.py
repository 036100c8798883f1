"""Sizes of files, what must not exist, and the tables that have to agree with pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polyalign.core.doctor import EXTRAS
from polyalign.core.environment import REQUIRED

FOLDERS = ("src", "core", "datasets", "evaluation", "modalities", "configs", "tests")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def test_no_file_is_longer_than_500_lines(root: Path) -> None:
    lengths = {
        path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines())
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }
    assert len(lengths) > 40
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_the_root_datasets_folder_does_not_shadow_hugging_face(root: Path) -> None:
    assert not (root / "datasets" / "__init__.py").exists()


def test_test_folders_are_no_packages(root: Path) -> None:
    packages = [path.parent for path in (root / "tests").rglob("__init__.py") if list(path.parent.glob("test_*.py"))]
    assert packages == []


def test_extras_agree_with_doctor(project: dict[str, Any]) -> None:
    declared = {name: {name_of(item) for item in items} for name, items in project["optional-dependencies"].items()}
    told = {name: {part for item in extra.packages for part in item.split("|")} for name, extra in EXTRAS.items()}
    assert declared == told


def test_required_packages_agree_with_the_snapshot(project: dict[str, Any]) -> None:
    assert [name_of(item) for item in project["dependencies"]] == sorted(
        REQUIRED, key=[name_of(item) for item in project["dependencies"]].index
    )


def test_nothing_is_pinned_in_pyproject(project: dict[str, Any]) -> None:
    requirements = [*project["dependencies"], *(item for items in project["optional-dependencies"].values() for item in items)]
    pinned = [item for item in requirements if re.search(r"==|<|~=", item.split(";")[0])]
    assert pinned == []


def test_accelerate_configs_load(root: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((root / "configs" / "accelerate").glob("*.yaml"))
    if not files:
        pytest.skip("configs/accelerate holds no YAML file")
    for path in files:
        config = load_config_from_file(str(path))
        assert config.compute_environment.value == "LOCAL_MACHINE", path.name
