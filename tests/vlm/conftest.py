"""What the tests of the vision-language modality share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers lie beside the tests, which are no package

from colour_questions import write_colours  # noqa: E402

from polyalign.datasets.multi_image.sources import Questions, read_questions  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    return read_questions(write_colours(tmp_path_factory.mktemp("colours")))
