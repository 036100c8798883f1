"""A scan and its ground truth as LiDiff trains and evaluates on them.

Letters: P points of the scan (a tenth of F in LiDiff), F points of the ground truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.files import read_labels, read_scan
from polyalign.datasets.lidar.filters import EVALUATION_MAP, TRAINING_MAP, TRAINING_SCAN, PointFilter, farthest_points, in_view
from polyalign.datasets.lidar.layouts import ScanFile
from polyalign.datasets.lidar.maps import SceneMap


@dataclass(frozen=True)
class SampleSettings:
    """Defaults are LiDiff's: 18,000 points to complete to 180,000 within 50 m."""

    full_points: int = 180_000
    scan_points: int = 18_000
    max_range: float = 50.0
    augment: bool = True
    scan_filter: PointFilter = TRAINING_SCAN
    map_filter: PointFilter = TRAINING_MAP


@dataclass(frozen=True)
class SceneSample:
    """``scan`` (P, 3) and ``full`` (F, 3) float32 in metres, in the sensor's frame; ``name`` is the scan's file."""

    name: str
    scan: np.ndarray
    full: np.ndarray


def augmentation(generator: np.random.Generator) -> np.ndarray:
    """A (3, 3) matrix A, for points as p A^T: a turn about the vertical by any angle, small turns about all axes (sigma 0.06
    rad, clipped at 0.18), a scale in 0.95 to 1.05, and for half of the samples a mirror in y; in this order, all of
    LiDiff's."""
    yaw = _rotation(2, generator.uniform(0, 2 * np.pi))
    x, y, z = np.clip(0.06 * generator.standard_normal(3), -0.18, 0.18)
    small = _rotation(2, z) @ _rotation(1, y) @ _rotation(0, x)
    scale = generator.uniform(0.95, 1.05)
    mirror = np.diag([1.0, -1.0 if generator.random() > 0.5 else 1.0, 1.0])
    return scale * mirror @ small @ yaw


def _rotation(axis: int, angle: float) -> np.ndarray:
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[[first, first, second, second], [first, second, first, second]] = (
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
        np.cos(angle),
    )
    return matrix


def resampled(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """``count`` points in random order; where there are fewer, all of them, again and again.

    The original repeats each point of a too small cloud and cuts the end off, so that with 100,000 points for 180,000 a tenth
    of them is never seen and the others come twice.
    """
    order = [generator.permutation(len(points)) for _ in range(-(-count // len(points)))]
    return points[np.concatenate(order)[:count]]


def training_sample(scan: ScanFile, scene: SceneMap, settings: SampleSettings, *, seed: int, epoch: int) -> SceneSample:
    """The sample of one scan in one epoch; random draws depend on nothing else.

    Raises:
        UserError: the scan has no pose, its files do not fit together, or filters leave nothing of it or of the map around it.
    """
    generator = np.random.default_rng(seed_of(seed, "lidar sample", scan.points.name, scan.number, epoch))
    points = read_scan(scan.points)
    semantic = read_labels(scan.labels, len(points))[0] if scan.labels is not None else None
    partial = points[settings.scan_filter.keep(points, semantic), :3].astype(np.float64)
    full = _surroundings(scan, scene, settings.max_range, settings.map_filter)
    _refuse_empty(scan, partial, "scan")
    if settings.augment:
        matrix = augmentation(generator)
        partial, full = partial @ matrix.T, full @ matrix.T
    full = full[in_view(full, partial)]
    _refuse_empty(scan, full, "map")
    partial = _thinned(partial, settings.scan_points, generator)
    full = resampled(full, settings.full_points, generator)
    return SceneSample(scan.points.name, partial.astype(np.float32), full.astype(np.float32))


def _thinned(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Farthest points, or, of a scan that has too few, all of them over again. The original repeats such a scan before it takes
    farthest points, and fills up with copies of a single point."""
    return points[farthest_points(points, count)] if len(points) >= count else resampled(points, count, generator)


def evaluation_ground_truth(
    scan: ScanFile, scene: SceneMap, *, max_range: float = 50.0, keep: PointFilter = EVALUATION_MAP
) -> np.ndarray:
    """(n, 3) ground truth of a scan by the papers' protocol: the map within 50 m and -4 to 4.4 m of height, in the 10 m voxels
    that the scan touches. The scan is not filtered by labels for this, so moving objects open voxels.

    Raises:
        UserError: the scan has no pose, or nothing of the map lies around it.
    """
    points = read_scan(scan.points)[:, :3].astype(np.float64)
    points = points[np.linalg.norm(points, axis=1) < max_range]
    _refuse_empty(scan, points, "scan")
    full = _surroundings(scan, scene, max_range, keep)
    full = full[in_view(full, points)]
    _refuse_empty(scan, full, "map")
    return full


def _surroundings(scan: ScanFile, scene: SceneMap, max_range: float, keep: PointFilter) -> np.ndarray:
    if scan.pose is None:
        raise UserError(f"{scan.points} has no pose; open the sequence with its poses")
    full = scene.around(scan.pose, max_range)
    return full[keep.keep(full)]


def _refuse_empty(scan: ScanFile, points: np.ndarray, what: str) -> None:
    if not len(points):
        raise UserError(f"{scan.points}: no point of the {what} is left after the filters (labels, range, height, view)")
