"""Open3D where it is wanted: aligning one cloud with another (ICP), and looking at clouds in a window. No metric needs it.

Letters: N, M points of the clouds, in metres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.evaluation.lidar_metrics.distances import checked_cloud

SYSTEM_LIBRARIES = "libusb-1.0-0 libgl1 libegl1 libgomp1 libx11-6"
COLOURS = ((0.3, 0.3, 0.3), (0.1, 0.4, 0.9), (0.9, 0.4, 0.1), (0.2, 0.7, 0.3), (0.7, 0.2, 0.7))


@dataclass(frozen=True)
class Alignment:
    """``pose`` (4, 4) takes the source onto the target; ``fitness`` is the share of source points that have a target point
    within the distance looked at, ``rmse`` the root mean square of those distances in metres."""

    pose: np.ndarray
    fitness: float
    rmse: float


def open3d(purpose: str) -> ModuleType:
    """Open3D, imported now.

    Raises:
        UserError: it is not installed, or a system library that it needs is missing, as in most small containers.
    """
    try:
        return require("open3d", extra="lidar", purpose=purpose)
    except OSError as error:  # its loader opens libraries one by one
        raise UserError(
            f"{purpose} needs Open3D, which is installed and does not load: {error}. It needs system libraries that pip does "
            f"not bring; on Debian and Ubuntu: apt-get install {SYSTEM_LIBRARIES}"
        ) from error


def aligned(source: np.ndarray, target: np.ndarray, *, within: float = 1.0, start: np.ndarray | None = None) -> Alignment:
    """Point-to-point ICP (Besl and McKay, 1992) of clouds (N, 3) and (M, 3), from the pose ``start`` or from where they are.

    Args:
        within: metres up to which points are taken for the same.

    Raises:
        UserError: see :func:`checked_cloud` and :func:`open3d`.
    """
    clouds = [checked_cloud(source, "source"), checked_cloud(target, "target")]
    package = open3d("ICP")
    moved, fixed = (_cloud(package, points) for points in clouds)
    found = package.pipelines.registration.registration_icp(moved, fixed, within, np.eye(4) if start is None else start)
    return Alignment(np.asarray(found.transformation), float(found.fitness), float(found.inlier_rmse))


def show(clouds: Mapping[str, np.ndarray]) -> None:
    """Clouds (N, 3) together in a window, each in a colour of its own; returns when it is closed. For pages that need neither
    window nor Open3D see ``evaluation.report.clouds``.

    Raises:
        UserError: see :func:`checked_cloud` and :func:`open3d`.
    """
    checked = [checked_cloud(points, name) for name, points in clouds.items()]
    package = open3d("a window of point clouds")
    drawn = []
    for place, points in enumerate(checked):
        drawn.append(_cloud(package, points).paint_uniform_color(COLOURS[place % len(COLOURS)]))
    package.visualization.draw_geometries(drawn, window_name=", ".join(clouds))


def _cloud(package: ModuleType, points: np.ndarray):  # noqa: ANN202  (a class of a package that is imported late)
    return package.geometry.PointCloud(package.utility.Vector3dVector(points))
