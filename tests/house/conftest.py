"""The repository's root and a way to run Python in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run this interpreter, or a launcher with it, and return its standard output; a failure shows both streams."""

    def run(*arguments: str, folder: Path = ROOT, path: Path = ROOT / "src") -> str:
        surroundings = {
            **os.environ,
            "PYTHONPATH": str(path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{arguments} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
