"""The layout in every way it is started: from the root, under torchrun, and as an installed wheel from elsewhere."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

Run = Callable[..., str]

FROM_A_WHEEL = """
import json, sys
import datasets
import polyalign
from importlib.resources import files
import polyalign.datasets as ours
from polyalign.core import environment
configs = [
    f"{folder.name}/{item.name}"
    for folder in files("polyalign.configs").iterdir() if folder.is_dir()
    for item in folder.iterdir() if item.name.endswith(".yaml") and item.read_text(encoding="utf-8")
]
print(json.dumps({
    "path": list(polyalign.__path__), "ours": list(ours.__path__), "configs": sorted(configs),
    "hugging_face": hasattr(datasets, "load_dataset"), "checkout": environment.checkout() is not None,
    "git": environment.git_commit(),
}))
"""


def test_command_line_from_the_root(run_python: Run) -> None:
    assert "align" in run_python("-m", "polyalign.core.cli", "--help")


def test_python_m_pytest_and_pytest_from_the_root(run_python: Run, root: Path) -> None:
    """``python -m pytest`` puts the root first on the path, ``pytest`` does not; both have to find both names."""
    arguments = ("-q", "-p", "no:cacheprovider", "tests/house/test_both_names.py")
    assert "2 passed" in run_python("-m", "pytest", *arguments)
    script = Path(sys.executable).with_name("pytest")
    if script.exists():
        assert "2 passed" in run_python(str(script), *arguments)


def test_torchrun_really_starts_two_processes(run_python: Run) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    printed = run_python(*launcher, "-m", "polyalign.core.processes")
    found = json.loads(printed.strip().splitlines()[-1])
    assert found["processes"] == 2
    assert found["ranks"] == [0, 1]
    assert found["distributed_type"] == "MULTI_CPU"


@pytest.fixture(scope="module")
def wheel(root: Path, run_python: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (extra 'dev')")
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    (built,) = folder.glob("polyalign-*.whl")
    return built


def test_wheel_carries_code_and_data(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    expected = {"polyalign/__init__.py"} | {
        f"polyalign/{path.relative_to(root).as_posix()}"
        for part in ("core", "datasets", "evaluation", "modalities", "configs")
        for path in (root / part).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".json", ".txt", ".safetensors")
    }
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "polyalign/tests"))]
    assert "polyalign = polyalign.core.cli:main" in entry_points


def test_wheel_works_from_another_folder(wheel: Path, root: Path, run_python: Run, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    printed = run_python("-c", FROM_A_WHEEL, folder=Path(tmp_path.anchor), path=installed)
    found = json.loads(printed.strip().splitlines()[-1])
    assert found["path"] == [str(installed / "polyalign")]
    assert found["ours"] == [str(installed / "polyalign" / "datasets")]
    assert found["hugging_face"]
    assert not found["checkout"] and found["git"] is None
    configs = sorted(f"{path.parent.name}/{path.name}" for path in (root / "configs").glob("*/*.yaml"))
    assert found["configs"] == configs
    assert "align" in run_python("-m", "polyalign.core.cli", "--help", folder=Path(tmp_path.anchor), path=installed)
