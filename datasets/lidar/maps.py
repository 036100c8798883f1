"""Ground truth for completion: all static points of a sequence in one map, thinned to a point per voxel.

LiDiff's ``map_from_scans.py`` thins the whole map anew after every scan, which is quadratic in the length of the sequence, and
needs MinkowskiEngine for it. Here the voxels seen so far lie in sorted runs of geometrically growing length: a scan is looked
up in each, what is new becomes a run, and runs of like length are merged. Time is linear in the points but for a logarithm,
memory that of the finished map, at most twice.

Letters: M points of the map, N of a scan.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError
from polyalign.datasets.lidar.files import read_labels, read_scan
from polyalign.datasets.lidar.filters import MAP_BUILDER, PointFilter
from polyalign.datasets.lidar.layouts import ScanFile, ScanSequence

MAP_VOXEL = 0.1
MAP_FILE = "map_clean.npy"
"""The name the published training code looks for; the files are exchangeable both ways."""
TILE = 10.0
_REACH = 1 << 20


class VoxelMap:
    """A map that grows: of every voxel the first point that fell into it.

    The original keeps one point of each voxel too, whichever its hashing leaves, and not their mean.
    """

    def __init__(self, voxel: float = MAP_VOXEL):
        self.voxel = voxel
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def add(self, points: np.ndarray) -> int:
        """Add points (N, 3) in metres; how many were new.

        Raises:
            UserError: points farther from the origin than the map reaches.
        """
        cells = np.floor(np.asarray(points, dtype=np.float64) / self.voxel)
        if len(cells) and np.abs(cells).max() >= _REACH - 1:
            raise UserError(
                f"a point lies more than {_REACH * self.voxel:.0f} m from the origin of the map; are the poses right?"
            )
        keys, first = np.unique(_pack(cells.astype(np.int64)), return_index=True)
        new = np.ones(len(keys), dtype=bool)
        for known, _ in self._runs:
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            new &= known[place] != keys
        if new.any():
            self._runs.append((keys[new], np.asarray(points, dtype=np.float32)[first[new]]))
            self._merge()
        return int(new.sum())

    def _merge(self) -> None:
        while len(self._runs) > 1 and len(self._runs[-1][0]) * 2 >= len(self._runs[-2][0]):
            (keys, points), (other_keys, other_points) = self._runs.pop(), self._runs.pop()
            keys = np.concatenate([other_keys, keys])
            order = np.argsort(keys, kind="stable")
            self._runs.append((keys[order], np.concatenate([other_points, points])[order]))

    def points(self) -> np.ndarray:
        """(M, 3) float32, by tile and then by voxel, so that the same scans give the same file in any order of runs."""
        if not self._runs:
            return np.zeros((0, 3), dtype=np.float32)
        keys = np.concatenate([keys for keys, _ in self._runs])
        points = np.concatenate([points for _, points in self._runs])
        return points[np.lexsort((keys, _tiles(points)))]


def _pack(cells: np.ndarray) -> np.ndarray:
    shifted = cells + _REACH
    return (shifted[:, 0] << 42) + (shifted[:, 1] << 21) + shifted[:, 2]


def _tiles(points: np.ndarray) -> np.ndarray:
    cells = np.floor(points[:, :2].astype(np.float64) / TILE).astype(np.int64) + _REACH
    return (cells[:, 0] << 21) + cells[:, 1]


def transform(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Points (N, 3) by a (4, 4) pose, in double precision. The original multiplies in single precision, which kilometres from
    the origin is a matter of millimetres and moves points at the edge of a voxel into the next."""
    return points.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]


def build_map(
    sequence: ScanSequence,
    *,
    voxel: float = MAP_VOXEL,
    keep: PointFilter = MAP_BUILDER,
    progress: Callable[[ScanFile], None] | None = None,
) -> np.ndarray:
    """The map (M, 3) float32 of a sequence, in its world frame.

    Raises:
        UserError: a scan without pose, or without labels where only static points are kept; files that do not fit together; no
            point left at all.
    """
    grown = VoxelMap(voxel)
    for scan in sequence.scans:
        if scan.pose is None:
            raise UserError(f"{scan.points} has no pose; open the sequence with its poses")
        points = read_scan(scan.points)
        semantic = read_labels(scan.labels, len(points))[0] if scan.labels is not None else None
        grown.add(transform(points[keep.keep(points, semantic), :3], scan.pose))
        if progress is not None:
            progress(scan)
    if not len(grown):
        raise UserError(
            f"no point of the {len(sequence.scans)} scans of {sequence.name} is static and within range: an empty map"
        )
    return grown.points()


class SceneMap:
    """A map to look things up in: points by tiles of 10 m, so that what lies around a scan is read without going through all.

    A file that :func:`build_map` wrote is opened where it lies and shared by all processes; one of the original code is put in
    order first, in memory.
    """

    def __init__(self, points: np.ndarray):
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise UserError(f"a map is points (M, 3), found {points.shape}")
        tiles = _tiles(points)
        if (np.diff(tiles) < 0).any():
            order = np.argsort(tiles, kind="stable")
            points, tiles = points[order], tiles[order]
        self.points = points
        self._tiles, self._starts = np.unique(tiles, return_index=True)
        self._ends = np.append(self._starts[1:], len(points))

    @classmethod
    def load(cls, path: Path) -> SceneMap:
        """Open a ``map_clean.npy``.

        Raises:
            UserError: no such file, or one that is no array of points.
        """
        if not path.is_file():
            raise UserError(f"there is no map {path}; build it from the scans first")
        try:
            return cls(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is not a readable array ({error}); it may be cut short") from error

    def around(self, pose: np.ndarray, radius: float) -> np.ndarray:
        """(n, 3) float64 points nearer than ``radius`` to the sensor, in the sensor's frame."""
        centre = pose[:3, 3]
        low, high = (np.floor((centre[:2] + side * radius) / TILE).astype(np.int64) + _REACH for side in (-1, 1))
        parts = [np.zeros((0, 3), dtype=self.points.dtype)]
        for x in range(int(low[0]), int(high[0]) + 1):
            first, last = np.searchsorted(self._tiles, [(x << 21) + int(low[1]), (x << 21) + int(high[1]) + 1])
            if first < last:  # the tiles of one column lie beside each other
                parts.append(self.points[self._starts[first] : self._ends[last - 1]])
        near = np.concatenate(parts).astype(np.float64)
        near = near[np.linalg.norm(near - centre, axis=1) < radius]
        return transform(near, np.linalg.inv(pose))
