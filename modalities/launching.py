"""What a modality's ``train`` script does under a launcher of several processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polyalign.core import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the verb does; returns its exit code."""
    from torch import distributed

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return cli.main(["train", *arguments])
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
