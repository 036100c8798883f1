"""``python -m polyalign`` is the command ``polyalign``."""

import sys

from polyalign.core.cli import main

if __name__ == "__main__":
    sys.exit(main())
