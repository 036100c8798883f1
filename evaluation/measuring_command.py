"""What the commands that measure folders share: figures as JSON, or an error in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write


def tell(measure: Callable[[], Mapping[str, Any]], out: Path | None) -> int:
    """Print what ``measure`` finds, or write it to ``out`` and print that path. The exit code."""
    try:
        text = json.dumps(measure(), indent=1) + "\n"
        if out is not None:
            atomic_write(out, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(text if out is None else out)
    return 0
