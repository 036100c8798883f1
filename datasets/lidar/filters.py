"""Which points of a scan or a map are kept, and farthest-point sampling.

The published code filters in five places, each in its own way (LiDiff 570e73c, Distillation-DPO 7a11213). They stand here as
data, so that a published number can be made again; a row that says ``remission`` measures the distance over all four columns,
remission among them, which was hardly meant and
lets points in from 3.35 m on.

| where | labels | range (m) | height (m) | remission |
| --- | --- | --- | --- | --- |
| scan, training | 1 < l < 252 | 3.5 to 50 | above -4 | no |
| map around a scan, training | from the map | to 50 | above -4 | no |
| map builder | 1 < l < 252 | from 3.5 | all | yes |
| scan, completion | none: moving objects stay in | 3.5 to 50 | all | yes |
| map around a scan, evaluation | from the map | to 50 | -4 to 4.4 | no |

Letters: N points, n of them chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from polyalign.core.errors import UserError

FIRST_STATIC, FIRST_MOVING = 2, 252
"""SemanticKITTI's classes: 0 unlabelled, 1 outlier, from 252 on moving."""
VIEW_VOXEL = 10.0


@dataclass(frozen=True)
class PointFilter:
    """Strict bounds in metres; None is no bound."""

    nearest: float | None = 3.5
    farthest: float | None = 50.0
    lowest: float | None = None
    highest: float | None = None
    static: bool = False
    remission: bool = False

    def keep(self, points: np.ndarray, semantic: np.ndarray | None = None) -> np.ndarray:
        """(N,) whether each of the points (N, 3 or 4) stays.

        Raises:
            UserError: only static points are wanted and there are no labels.
        """
        distance = np.linalg.norm(points if self.remission else points[:, :3], axis=1)
        height = points[:, 2]
        kept = np.ones(len(points), dtype=bool)
        bounds = ((distance, self.nearest, self.farthest), (height, self.lowest, self.highest))
        for value, low, high in bounds:
            kept &= (low is None or value > low) & (high is None or value < high)
        if self.static:
            if semantic is None:
                raise UserError("moving objects can only be left out of scans with labels, and these have none")
            kept &= (semantic >= FIRST_STATIC) & (semantic < FIRST_MOVING)
        return kept


TRAINING_SCAN = PointFilter(lowest=-4.0, static=True)
TRAINING_MAP = PointFilter(nearest=None, lowest=-4.0)
MAP_BUILDER = PointFilter(farthest=None, static=True)
OFFICIAL_MAP_BUILDER = PointFilter(farthest=None, static=True, remission=True)
COMPLETION_SCAN = PointFilter()
OFFICIAL_COMPLETION_SCAN = PointFilter(remission=True)
EVALUATION_MAP = PointFilter(nearest=None, lowest=-4.0, highest=4.4)


def in_view(points: np.ndarray, scan: np.ndarray, voxel: float = VIEW_VOXEL) -> np.ndarray:
    """(N,) whether each point lies in a voxel of ``voxel`` metres that the scan touches. The grid begins half a voxel below the
    scan's lowest corner, as Open3D's VoxelGrid does, so it moves with the scan."""
    origin = scan[:, :3].min(axis=0) - voxel / 2
    touched = np.unique(_cells(scan[:, :3], origin, voxel))
    return np.isin(_cells(points[:, :3], origin, voxel), touched)


def _cells(points: np.ndarray, origin: np.ndarray, voxel: float) -> np.ndarray:
    cells = np.floor((points - origin) / voxel).astype(np.int64) + (1 << 20)
    return (cells[:, 0] << 42) + (cells[:, 1] << 21) + cells[:, 2]


def farthest_points(points: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """(n,) indices by farthest-point sampling: starting from ``first``, always the point farthest from all chosen so far, the
    first of several. Exact, and Open3D's choice, except that no point is chosen twice: where only copies of chosen points are
    left, Open3D goes on with the last one.

    A new point can only come nearer to points within the largest distance that is left, and those are looked up in a kd-tree as
    soon as they are few: 18,000 of 120,000 points take 3 s, where updating all distances takes
    about 45.

    Raises:
        UserError: more points are wanted than there are, or none.
    """
    cloud = np.ascontiguousarray(points[:, :3], dtype=np.float64)
    if not 0 < count <= len(cloud):
        raise UserError(f"{count} points are to be chosen of {len(cloud)}; repeat the cloud first, or choose fewer")
    chosen = np.empty(count, dtype=np.int64)
    nearest = np.full(len(cloud), np.inf)
    tree = KDTree(cloud)
    place = first
    for number in range(count):
        chosen[number] = place
        if number < 64:
            near = slice(None)
        else:
            near = np.asarray(
                tree.query_ball_point(cloud[place], float(np.sqrt(nearest[place])), return_sorted=False), dtype=np.int64
            )
        squared = ((cloud[near] - cloud[place]) ** 2).sum(axis=1)
        nearest[near] = np.minimum(nearest[near], squared)
        nearest[place] = -1.0  # chosen; its copies stay at 0 and come last
        place = int(nearest.argmax())
    return chosen
