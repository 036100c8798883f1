"""Small scenes of the world `streets`, for the embedded base: what it is trained, distilled and measured on.

Letters: P points of a scan, F = ``copies`` * P points of the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyalign.datasets.lidar.filters import PointFilter, farthest_points, in_view
from polyalign.datasets.lidar.maps import SceneMap
from polyalign.datasets.lidar.samples import resampled
from polyalign.datasets.worlds import streets
from polyalign.datasets.worlds.streets import StreetScan


@dataclass(frozen=True)
class SceneSettings:
    """How scenes are cut from streets.

    Args:
        drives: scans of a drive, from which the map is made, ``seconds`` apart; ``every`` how many of them, those at the ends
            left out, one becomes a scene.
        farthest: radius of a scene in metres.
    """

    scan_points: int = 200
    copies: int = 10
    farthest: float = 16.0
    drives: int = 16
    seconds: float = 0.2
    every: int = 2
    ends: int = 4

    @property
    def full_points(self) -> int:
        return self.scan_points * self.copies


@dataclass(frozen=True)
class Scene:
    """``scan`` (P, 3) float32, farthest points of a scan without what moves; ``surroundings`` (n, 3) float32, all of the map
    that is in view of it; both from the sensor, in metres."""

    name: str
    scan: np.ndarray
    surroundings: np.ndarray

    def full(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """(count, 3) of the surroundings, drawn anew."""
        return resampled(self.surroundings, count, generator)


def scenes(split: str, numbers: Sequence[int], settings: SceneSettings, *, seed: int = 0) -> list[Scene]:
    """Scenes of some streets of a split. Those that show fewer points than a scene needs are left out."""
    found: list[Scene] = []
    for number in numbers:
        place = streets.street(split, number, seed)
        drive = streets.drive(place, settings.drives, streets.SMALL, seconds=settings.seconds)
        known = streets.static_map(drive)
        for order in range(settings.ends, settings.drives - settings.ends, settings.every):
            scene = _scene(f"{split}-{number:04d}-{order:02d}", drive[order], known, settings)
            if scene is not None:
                found.append(scene)
    return found


def _scene(name: str, scan: StreetScan, known: SceneMap, settings: SceneSettings) -> Scene | None:
    near = PointFilter(farthest=settings.farthest, lowest=-4.0, static=True)
    points = scan.points[near.keep(scan.points, scan.semantic), :3].astype(np.float64)
    if len(points) < settings.scan_points:
        return None
    around = known.around(scan.pose, settings.farthest)
    around = around[(around[:, 2] > -4.0) & (around[:, 2] < 4.4)]
    around = around[in_view(around, points)]
    chosen = points[farthest_points(points, settings.scan_points)]
    return Scene(name, chosen.astype(np.float32), around.astype(np.float32))
