"""``pytest tests/golden --vectors DIR``: golden vectors of another folder than our copies; all that is not checked is
listed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the adapters lie beside the tests, which are no package

from golden_adapters.cases import Case, load_cases, unknown_files  # noqa: E402

CASES_KEY = pytest.StashKey[list[Case]]()
UNKNOWN_KEY = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vectors", default=None, metavar="DIR", help="folder of golden vector files (default: our copies)")


def _folder(config: pytest.Config) -> Path:
    # The default stands here too: in a run from another folder this file is loaded after the options have been read.
    given = config.getoption("--vectors", default=None)
    return HERE / "vectors" if given is None else Path(given)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
    folder = _folder(metafunc.config)
    if not folder.is_dir():
        raise pytest.UsageError(f"--vectors {folder}: no such folder")
    cases = load_cases(folder)
    metafunc.config.stash[CASES_KEY] = cases
    metafunc.config.stash[UNKNOWN_KEY] = unknown_files(folder)
    parameters = [
        pytest.param(case, id=case.id, marks=[] if case.missing is None else pytest.mark.skip(reason=case.missing))
        for case in cases
    ]
    metafunc.parametrize("golden_case", parameters)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    waiting = [case for case in config.stash.get(CASES_KEY, []) if case.missing is not None]
    unknown = config.stash.get(UNKNOWN_KEY, [])
    if not waiting and not unknown:
        return
    terminalreporter.section("golden vectors not checked")
    for reason in dict.fromkeys(case.missing for case in waiting):
        ids = [case.id for case in waiting if case.missing == reason]
        terminalreporter.write_line(f"{reason}: {len(ids)}")
        for name in ids:
            terminalreporter.write_line(f"    {name}")
    for name in unknown:
        terminalreporter.write_line(f"{name}: no adapter for this file")
