"""A point cloud as a cell of a pair store: x, y, z in metres, little-endian float32, one point after another.

Letters: N points.
"""

from __future__ import annotations

import hashlib

import numpy as np

POINT_BYTES = 12


def encode(cloud: np.ndarray) -> bytes:
    """The cell of points (N, 3).

    Raises:
        TypeError: something else.
    """
    if np.ndim(cloud) != 2 or np.shape(cloud)[1] != 3:
        raise TypeError(f"expected points (N, 3), found {np.shape(cloud)}")
    return np.ascontiguousarray(cloud, dtype="<f4").tobytes()


def decode(stored: bytes) -> np.ndarray:
    """Points (N, 3) float32 of a cell.

    Raises:
        ValueError: a number of bytes that is no cloud's.
    """
    if stored is None or not stored or len(stored) % POINT_BYTES:
        raise ValueError(f"holds {len(stored or b'')} bytes; a cloud has {POINT_BYTES} for each point")
    return np.frombuffer(stored, dtype="<f4").reshape(-1, 3).copy()


def decoded(cloud: np.ndarray) -> np.ndarray:
    """A cloud as it is: it needs no second decoding."""
    return cloud


def problem(stored: bytes | None) -> str | None:
    """What is wrong with a cell, or None."""
    try:
        check(decode(stored or b""))
    except ValueError as error:
        return str(error)
    return None


def check(cloud: np.ndarray) -> str:
    """The fingerprint of a cloud that can be used.

    Raises:
        ValueError: no points, or some that are not finite.
    """
    if np.ndim(cloud) != 2 or np.shape(cloud)[1] != 3 or not len(cloud):
        raise ValueError(f"expected points (N, 3), found {np.shape(cloud)}")
    if not np.isfinite(cloud).all():
        raise ValueError("holds points that are NaN or infinite")
    return hashlib.sha256(encode(cloud)).hexdigest()
