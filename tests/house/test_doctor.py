"""``polyalign doctor`` and the environment snapshot of a run folder."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from polyalign.core import environment
from polyalign.core.doctor import EXTRAS, Extra, _extra, doctor, report
from polyalign.core.errors import UserError
from polyalign.core.optional import require


def test_report_of_this_environment() -> None:
    found = report()
    assert found["healthy"] and found["broken"] == {}
    assert set(found["packages"]) == set(environment.REQUIRED)
    assert found["devices"][-1]["kind"] == "cpu"
    assert set(found["extras"]) == set(EXTRAS)
    assert "pytest" in found["extras"]["dev"]["installed"]


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report()


def test_printed_page_names_every_package_and_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor([]) == 0
    page = capsys.readouterr().out
    for name in (*environment.REQUIRED, *EXTRAS):
        assert name in page
    for package in report()["repaired"]:
        assert f"repaired  {package}" in page


def test_unknown_option_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor(["--jsno"])
    assert stopped.value.code == 2


def test_one_of_several_packages_is_enough() -> None:
    assert _extra(Extra("x", ("no-such-package|torch",)))["missing"] == []
    assert _extra(Extra("x", ("no-such-package|nor-this", "torch")))["missing"] == ["no-such-package"]


def test_missing_package_names_its_extra() -> None:
    with pytest.raises(UserError, match=r"reading a film needs.*no_such_module.*polyalign\[video\]"):
        require("no_such_module", extra="video", purpose="reading a film")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("configs/image/quickstart.yaml", "configs/image/quickstart.yaml"),
        ("image/quickstart", "image/quickstart"),
        ("/home/me/recipe.yaml", "recipe.yaml"),
        ("prompts=/home/me/prompts.txt", "prompts=prompts.txt"),
        ("files=[/home/me/a.txt,b/c.txt]", "files=[a.txt,b/c.txt]"),
        ("run.folder=~/runs/one", "run.folder=one"),
        ("C:\\Users\\me\\recipe.yaml", "recipe.yaml"),
        ("train.rate=1e-4", "train.rate=1e-4"),
    ],
)
def test_arguments_lose_the_folders_of_absolute_paths(argument: str, expected: str) -> None:
    assert environment.without_folders(argument) == expected


def test_snapshot_is_json_and_names_no_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", [str(tmp_path / "polyalign"), "align", str(tmp_path / "recipe.yaml"), "seed=1"])
    snapshot = environment.snapshot()
    assert snapshot["argv"] == ["polyalign", "align", "recipe.yaml", "seed=1"]
    assert snapshot["packages"]["torch"] is not None
    assert snapshot["cpu_count"] >= 1
    assert snapshot["git"] is None or len(snapshot["git"]["commit"]) == 40
    text = json.dumps(snapshot)
    assert str(tmp_path) not in text and json.dumps(socket.gethostname()) not in text
