"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from polyalign.core.errors import UserError

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file-size limit is reached"}


def atomic_write(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, fsync, rename: a reader or a later run sees the old file or the new one.

    Raises:
        UserError: no room on the disk; the half-written temporary file is removed and everything written before is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{path}: could not be written ({len(content):,} bytes): {_NO_ROOM[error.errno]}. "
            f"Files finished before it in {path.parent} are kept; make room and run the same command again to go on."
        ) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system lets a folder be synced, and then there is nothing more to do."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete the temporary files that a killed run left in ``folder`` and say which."""
    left = sorted(folder.glob(".*.tmp"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def listed(problems: list[str], *, limit: int = 20) -> str:
    """Problems as an indented list, at most ``limit`` of them and a count of the rest."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
