"""Writing files so that a kill, a full disk or a second process loses nothing: atomic writes, manifests, locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from polyalign.core.errors import UserError

DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}
SET_ASIDE = re.compile(r"\.stale-\d+$|^\..*\.tmp$")
LOCK_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
BLOCK_BYTES = 1 << 20


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to a temporary name in the same folder, flush it to the disk, rename it: the file is whole or as before.

    Raises:
        UserError: the disk is full; the file that was there is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_explained(f"{path}, which is as it was before"):
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be opened at all."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not sync folders, and then there is nothing more to do
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_full_explained(what: str) -> Iterator[None]:
    """Turn the operating system's "no space left" into a message that says what was being written and what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _disk_full(error)
        if number is None:
            raise
        raise UserError(
            f"{DISK_FULL[number]}: could not write {getattr(error, 'filename', None) or what} (while writing {what}). What was "
            "finished before is kept. Free some space, or take another run folder with --run, and run the same command again "
            "to go on."
        ) from error


def _disk_full(error: BaseException | None) -> int | None:
    """The number of ``DISK_FULL`` behind an error, in each of the three forms in which libraries report it."""
    if isinstance(error, OSError):
        return error.errno if error.errno in DISK_FULL else None
    if isinstance(error, SafetensorError):  # carries the number in its text only
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found and int(found[1]) in DISK_FULL else None
    if isinstance(error, RuntimeError):  # torch.save hides the OSError behind its own
        return _disk_full(error.__context__)
    return None


def set_aside(folder: Path, items: Sequence[str]) -> list[str]:
    """Rename those of ``items`` that are there below ``folder`` to ``NAME.stale-N``, with the first N that is free for all of
    them, so that starting anew loses nothing. Returns the new names."""
    present = [item for item in items if (folder / item).exists()]
    number = 1
    while any((folder / f"{item}.stale-{number}").exists() for item in present):
        number += 1
    for item in present:
        (folder / item).rename(folder / f"{item}.stale-{number}")
    return [f"{item}.stale-{number}" for item in present]


def sha256_of(content: bytes | Path) -> str:
    """SHA-256 of bytes or of a file."""
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with open(content, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Files by their path below a folder: ``{path: {"bytes": n, "sha256": hex}}``."""

    entries: Mapping[str, Mapping[str, Any]]

    def digest(self) -> str:
        """SHA-256 over the names and contents."""
        pairs = sorted((name, entry["sha256"]) for name, entry in self.entries.items())
        return sha256_of(json.dumps(pairs, separators=(",", ":")).encode())

    def damage(self, folder: Path) -> dict[str, str]:
        """The files that are missing below ``folder`` or do not have their recorded size any more, and which of the two."""
        found = {}
        for name, entry in self.entries.items():
            path = folder / name
            if not path.is_file():
                found[name] = "is missing"
            elif path.stat().st_size != entry["bytes"]:
                found[name] = "has changed"
        return found


def manifest_of(folder: Path, items: Sequence[str]) -> Manifest:
    """The manifest of files and whole folders below ``folder``; temporary files and those set aside do not belong to it."""
    paths = sorted({path for item in items for path in _files(folder / item) if not SET_ASIDE.search(path.name)})
    entries = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    return Manifest(entries)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``. The lock belongs to the process, not to the file: when its owner is dead, however it died,
    the next one gets it. The file says who holds it.

    Raises:
        UserError: another process holds it.
    """
    with open(path, "a+b") as file:
        if not _take(file):
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{what} is in use by {owner}. Wait for it, stop it, or give this run a folder of its own with --run FOLDER."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield


def _take(file: IO[bytes]) -> bool:
    """Try to lock an open file for this process; True also where the file system has no locks at all."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # a byte beyond the text, which others may then still read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCK_TAKEN:
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
