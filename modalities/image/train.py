"""Training alone, under a launcher of several processes::

    torchrun --nproc_per_node 2 -m polyalign.modalities.image.train CONFIG [KEY=VALUE ...]
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m polyalign.modalities.image.train CONFIG [KEY=VALUE ...]

The same as ``polyalign train CONFIG``, so the pairs have to be there: ``polyalign generate CONFIG`` makes them, in one process.
Name the run folder with ``run=FOLDER``: torchrun takes ``--run`` for an option of its own.
"""

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


if __name__ == "__main__":
    sys.exit(main())
