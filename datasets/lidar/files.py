"""The files of the KITTI family, one reader each. What does not hold together is refused, by file and place.

Letters: N points of a scan, F scans of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError

POINT_BYTES = 16
LABEL_BYTES = 4
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def read_scan(path: Path) -> np.ndarray:
    """(N, 4) float32 from a velodyne ``.bin``: x forward, y left, z up in metres from the sensor, remission in [0, 1].

    Raises:
        UserError: no such file, no points, a size that is no multiple of 16 bytes, or numbers that are not finite.
    """
    points = _numbers(path, "scan", "<f4", POINT_BYTES).reshape(-1, 4)
    if not len(points):
        raise UserError(f"{path} has no points: the file is empty")
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise UserError(
            f"{path}: {int((~finite).sum())} of {len(points)} points are NaN or infinite, the first is number {first}"
        )
    return points


def write_scan(path: Path, points: np.ndarray) -> None:
    """Write (N, 4) as :func:`read_scan` reads it."""
    np.ascontiguousarray(points, dtype="<f4").tofile(path)


def read_labels(path: Path, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Semantic class and instance (N,), (N,) uint16 of a SemanticKITTI ``.label``: the low and the high half of a uint32 a
    point.

    Raises:
        UserError: no such file, a size that is no multiple of 4 bytes, or another number of labels than ``points``.
    """
    packed = _numbers(path, "label file", "<u4", LABEL_BYTES)
    if len(packed) != points:
        raise UserError(f"{path} has {len(packed)} labels and its scan {points} points; they have to be of the same scan")
    return (packed & 0xFFFF).astype(np.uint16), (packed >> 16).astype(np.uint16)


def write_labels(path: Path, semantic: np.ndarray, instance: np.ndarray) -> None:
    """Write labels as :func:`read_labels` reads them."""
    (semantic.astype("<u4") | (instance.astype("<u4") << 16)).tofile(path)


def _numbers(path: Path, what: str, dtype: str, size: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"there is no {what} {path}")
    found = path.stat().st_size
    if found % size:
        raise UserError(f"{path} has {found} bytes, no multiple of the {size} of one point: it is cut short, or no {what}")
    return np.fromfile(path, dtype=dtype)


def read_matrices(path: Path, *, numbered: bool = False) -> dict[int, np.ndarray]:
    """Poses (4, 4) float64 by number from lines of 12 (3 x 4) or 16 numbers, as ``poses.txt`` of SemanticKITTI and of
    KITTI-360.

    Args:
        numbered: each line begins with its frame's number (KITTI-360); otherwise frames count from 0.

    Raises:
        UserError: no such file, or a line of another kind.
    """
    if not path.is_file():
        raise UserError(f"there are no poses at {path}; without them scans cannot be put into one map")
    found: dict[int, np.ndarray] = {}
    for place, line in enumerate(_lines(path)):
        values = _floats(path, place, line)
        number = int(values.pop(0)) if numbered and values else place
        found[number] = _matrix(path, place, values)
    return found


def read_calibration(path: Path) -> Mapping[str, np.ndarray]:
    """Matrices (4, 4) of a calibration file, lines of ``name: 12 numbers``. A line of 12 bare numbers has the name "".

    Raises:
        UserError: no such file, or a line of another kind.
    """
    if not path.is_file():
        raise UserError(f"there is no calibration {path}")
    found = {}
    for place, line in enumerate(_lines(path)):
        name, _, numbers = line.rpartition(":")
        values = _floats(path, place, numbers)
        if len(values) in (12, 16):  # cameras have further lines, of sizes and distortions
            found[name.strip()] = _matrix(path, place, values)
    return found


def read_times(path: Path) -> list[float]:
    """Seconds from the first scan. Lines are seconds (``times.txt``) or dates with the time (KITTI-360's ``timestamps.txt``).

    Raises:
        UserError: no such file, or a line that is neither.
    """
    if not path.is_file():
        raise UserError(f"there are no times at {path}")
    times: list[float] = []
    for place, line in enumerate(_lines(path)):
        try:
            dated = _DATE.match(line) is not None
            times.append(np.datetime64(line.replace(" ", "T"), "ns").astype(np.int64) / 1e9 if dated else float(line))
        except ValueError as error:
            raise UserError(f"{path}, line {place + 1}: {line[:40]!r} is neither seconds nor a date with a time") from error
    return [float(time - times[0]) for time in times]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _floats(path: Path, place: int, text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split()]
    except ValueError as error:
        raise UserError(f"{path}, line {place + 1}: numbers are expected, found {text[:60]!r}") from error
    if not np.isfinite(values).all():
        raise UserError(f"{path}, line {place + 1}: a number is NaN or infinite")
    return values


def _matrix(path: Path, place: int, values: list[float]) -> np.ndarray:
    if len(values) not in (12, 16):
        raise UserError(f"{path}, line {place + 1}: a pose is 12 numbers (3 x 4) or 16, found {len(values)}")
    matrix = np.eye(4)
    matrix[: len(values) // 4] = np.reshape(values, (-1, 4))
    return matrix
