"""Training alone, under a launcher of several processes::

    torchrun --nproc_per_node 2 -m polyalign.modalities.vlm.train CONFIG [KEY=VALUE ...]
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m polyalign.modalities.vlm.train CONFIG [KEY=VALUE ...]

The same as ``polyalign train CONFIG``, so the pairs have to be there: ``polyalign generate CONFIG`` makes them, in one process.
Name the run folder with ``run=FOLDER``: torchrun takes ``--run`` for an option of its own.
"""

from __future__ import annotations

import sys

from polyalign.modalities.launching import main

if __name__ == "__main__":
    sys.exit(main())
