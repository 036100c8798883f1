"""What the tests of the vision-language modality share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers lie beside the tests, which are no package

from colour_questions import write_colours  # noqa: E402
from tiny_vlms import save_model  # noqa: E402

from polyalign.datasets.multi_image.sources import Questions, read_questions  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    return read_questions(write_colours(tmp_path_factory.mktemp("colours")))


@pytest.fixture(scope="session")
def tiny_vlms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_vlms(family)``: the folder of a tiny random model, made once a session."""
    root = tmp_path_factory.mktemp("vlm_models")

    def folder(family: str) -> Path:
        return root / family if (root / family).is_dir() else save_model(family, root / family)

    return folder
