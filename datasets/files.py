"""What a run that was killed leaves behind, and how a list of problems is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete the temporary files of ``core.files.atomic_write`` that a killed run left in ``folder`` and say which."""
    left = sorted(folder.glob(".*.tmp"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def listed(problems: Sequence[str], *, limit: int = 20) -> str:
    """Problems as an indented list, at most ``limit`` of them and a count of the rest."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
