"""A rotating LiDAR in a world of simple solids, by analytic ray casting.

Every solid stands upright, so a ray is followed along the ground: at horizontal distance d from the sensor, in the direction a,
it is at height h + d tan(e). Where it enters and leaves a solid's outline depends on the column (a) alone, and what remains for
each beam (e) is a comparison of heights. Solids only look at the columns and beams they can be seen in.

Letters: E beams, A columns (azimuths) of a turn, N points that came back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyalign.core.errors import UserError

Shape = Literal["box", "cylinder", "ellipsoid"]
TOP, LONG_SIDE, SHORT_SIDE, ROUND = 0, 1, 2, 3
"""What was hit: something level; a box's side along its length, or across it; something round."""
ROUND_INCIDENCE = 0.6
ROAD = 40
BUILDING = 50
STOREY, WINDOW_PITCH, WINDOW_DEPTH = 3.0, 2.6, 0.2


@dataclass(frozen=True)
class Solid:
    """Something that rays come back from. Lengths in metres, angles in radians, velocity in metres a second.

    Args:
        size: a box's length and width; a round thing's radius, twice.
        low, high: heights of its lower and its upper end above the road.
        label: SemanticKITTI's class; a moving thing has a moving class.
        remission: mean strength of what comes back, in [0, 1].
        rough: standard deviation of a range on it, beyond the sensor's own: leaves are no wall.
        gaps: share of the rays that go through.
    """

    shape: Shape
    centre: tuple[float, float]
    size: tuple[float, float]
    low: float
    high: float
    label: int
    yaw: float = 0.0
    instance: int = 0
    velocity: tuple[float, float] = (0.0, 0.0)
    remission: float = 0.3
    rough: float = 0.0
    gaps: float = 0.0

    @property
    def reach(self) -> float:
        """Radius of the circle around its outline."""
        return float(np.hypot(*self.size) / 2) if self.shape == "box" else self.size[0]


@dataclass(frozen=True)
class Sensor:
    """The scanner: its geometry and its faults.

    Args:
        elevations: of the beams, in degrees, from the highest; points come out beam by beam.
        noise: standard deviation of a range in metres.
        lost: share of the rays that never come back, whatever they hit. More are lost with distance and at grazing angles.
    """

    elevations: tuple[float, ...]
    columns: int = 2083
    height: float = 1.73
    nearest: float = 0.9
    farthest: float = 80.0
    noise: float = 0.02
    lost: float = 0.005


def hdl64(*, beams: int = 64, columns: int = 2083, farthest: float = 80.0) -> Sensor:
    """KITTI's Velodyne HDL-64E: 32 beams a third of a degree apart and 32 half a degree apart. The angles are those of its
    published scans, which lie a little above the maker's +2 to -24.8 degrees. With fewer ``beams``, equally many between two
    of them are left out.

    Raises:
        UserError: more than 64 beams, or fewer than 2.
    """
    if not 2 <= beams <= 64:
        raise UserError(f"the scanner has 64 beams, of which 2 or more can be kept; found {beams}")
    every = np.concatenate([2.57 - np.arange(32) / 3, -8.4 - np.arange(32) / 2])
    kept = every[np.linspace(0, 63, beams).round().astype(int)]
    return Sensor(tuple(kept.tolist()), columns, farthest=farthest)


@dataclass(frozen=True)
class Returns:
    """``points`` (N, 4) float32: x, y, z from the sensor and remission; ``semantic`` and ``instance`` (N,) uint16."""

    points: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray


@dataclass
class _Image:
    """What each ray (E, A) has hit so far: at which horizontal distance, which solid (-1: the road), and where on it."""

    distance: np.ndarray
    solid: np.ndarray
    face: np.ndarray


def cast(
    solids: Sequence[Solid], sensor: Sensor, x: float, y: float, yaw: float, time: float, draws: np.random.Generator
) -> Returns:
    """One turn of the scanner at (x, y), looking along ``yaw``, among solids as they stand at ``time`` (seconds)."""
    azimuths = (np.arange(sensor.columns) * (2 * np.pi / sensor.columns)).astype(np.float32)
    slopes = np.tan(np.radians(np.asarray(sensor.elevations, dtype=np.float32)))[:, None]
    with np.errstate(divide="ignore"):
        road = np.where(slopes < 0, -sensor.height / slopes, np.inf).astype(np.float32)
    image = _Image(
        np.repeat(road, sensor.columns, axis=1),
        np.full((len(slopes), sensor.columns), -1, dtype=np.int32),
        np.zeros((len(slopes), sensor.columns), dtype=np.uint8),
    )
    for number, solid in enumerate(solids):
        at = (solid.centre[0] + time * solid.velocity[0] - x, solid.centre[1] + time * solid.velocity[1] - y)
        away = float(np.hypot(*at))
        if away - solid.reach < sensor.farthest:
            for columns in _columns_of(solid, at, away, yaw, sensor.columns):
                _hit(image, solid, number, at, yaw + azimuths[columns], columns, slopes, sensor.height, draws)
    return _returns(image, solids, sensor, (x, y, yaw, time), azimuths, slopes, draws)


def _columns_of(solid: Solid, at: tuple[float, float], away: float, yaw: float, count: int) -> Iterator[slice]:
    """The columns that may see a solid: one run, or two where it lies across the start of the turn."""
    if away <= solid.reach:
        yield slice(0, count)
        return
    bearing, half = np.arctan2(at[1], at[0]) - yaw, np.arcsin(min(1.0, solid.reach / away))
    if solid.shape == "box":
        corners = _outline(solid, at)
        offsets = np.angle(np.exp(1j * (np.arctan2(corners[:, 1], corners[:, 0]) - yaw - bearing)))
        low, high = float(offsets.min()), float(offsets.max())
        if high - low > np.pi:  # the outline surrounds the sensor
            yield slice(0, count)
            return
    else:
        low, high = -half, half
    pitch = 2 * np.pi / count
    first = int(np.floor((bearing + low) / pitch)) % count
    width = int(np.ceil((high - low) / pitch)) + 2
    if width >= count:
        yield slice(0, count)
        return
    yield slice(first, min(first + width, count))
    if first + width > count:
        yield slice(0, first + width - count)


def _outline(solid: Solid, at: tuple[float, float]) -> np.ndarray:
    """(4, 2) corners of a box, from the sensor."""
    cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
    along, across = np.array([cos, sin]) * solid.size[0] / 2, np.array([-sin, cos]) * solid.size[1] / 2
    return np.array(at) + np.array([along + across, along - across, -along - across, -along + across])


def _hit(
    image: _Image,
    solid: Solid,
    number: int,
    at: tuple[float, float],
    angles: np.ndarray,
    columns: slice,
    slopes: np.ndarray,
    height: float,
    draws: np.random.Generator,
) -> None:
    """Put a solid into the image where it is the nearest so far."""
    if solid.shape == "box":
        entry, leave, side = _through_box(solid, at, angles)
    else:
        entry, leave, side = _through_circle(solid.size[0], at, angles)
    met = leave > np.maximum(entry, 0)
    if not met.any():
        return
    near, far = max(float(entry[met].min()), 1e-3), float(leave[met].max())
    low, high = solid.low - height, solid.high - height
    steepest, highest = min(low / near, low / far), max(high / near, high / far)
    rows = np.nonzero((slopes[:, 0] >= steepest) & (slopes[:, 0] <= highest))[0]
    if not len(rows):
        return
    beams = slice(int(rows[0]), int(rows[-1]) + 1)  # elevations fall from beam to beam
    if solid.shape == "ellipsoid":
        found, face = _ellipsoid(solid, at, angles, slopes[beams], height), np.uint8(ROUND)
    else:
        found, face = _prism(np.where(met, entry, np.inf), leave, side, low, high, slopes[beams])
    if solid.gaps > 0:
        found = np.where(draws.random(found.shape, dtype=np.float32) < solid.gaps, np.inf, found)
    place = (beams, columns)
    nearer = found < image.distance[place]
    image.distance[place] = np.where(nearer, found, image.distance[place])
    image.solid[place] = np.where(nearer, number, image.solid[place])
    image.face[place] = np.where(nearer, face, image.face[place])


def _through_box(solid: Solid, at: tuple[float, float], angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each column's line enters and leaves a box's outline, and by which side it enters."""
    cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
    own = (at[0] * cos + at[1] * sin, at[1] * cos - at[0] * sin)
    spans = []
    for axis, direction in enumerate((np.cos(angles - solid.yaw), np.sin(angles - solid.yaw))):
        safe = np.where(np.abs(direction) < 1e-7, 1e-7, direction)
        ends = (own[axis] - solid.size[axis] / 2) / safe, (own[axis] + solid.size[axis] / 2) / safe
        spans.append((np.minimum(*ends), np.maximum(*ends)))
    entry, leave = np.maximum(spans[0][0], spans[1][0]), np.minimum(spans[0][1], spans[1][1])
    side = np.where(spans[0][0] > spans[1][0], SHORT_SIDE, LONG_SIDE).astype(np.uint8)
    return entry, np.where(leave > entry, leave, -1.0), side


def _through_circle(radius: float, at: tuple[float, float], angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    along = at[0] * np.cos(angles) + at[1] * np.sin(angles)
    inside = radius**2 - (at[0] ** 2 + at[1] ** 2 - along**2)
    half = np.sqrt(np.maximum(inside, 0))
    return along - half, np.where(inside > 0, along + half, -1.0), np.full(len(angles), ROUND, dtype=np.uint8)


def _prism(
    entry: np.ndarray, leave: np.ndarray, side: np.ndarray, low: float, high: float, slopes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (E', A') at which rays meet an upright solid between two heights (from the sensor): at its side, or else,
    above or below it at first, at its level end."""
    with np.errstate(invalid="ignore", divide="ignore"):
        first = entry * slopes
        level = np.where(first > high, high, low) / slopes
    beside = (first >= low) & (first <= high) & (entry > 0)
    end = (level > np.maximum(entry, 0)) & (level < leave)
    return np.where(beside, entry, np.where(end, level, np.inf)), np.where(beside, side, np.uint8(TOP))


def _ellipsoid(solid: Solid, at: tuple[float, float], angles: np.ndarray, slopes: np.ndarray, height: float) -> np.ndarray:
    """Distances (E', A') at which rays meet an ellipsoid of revolution about the vertical."""
    radius, half = solid.size[0], (solid.high - solid.low) / 2
    centre = (solid.high + solid.low) / 2 - height
    along = at[0] * np.cos(angles) + at[1] * np.sin(angles)
    a = 1 / radius**2 + slopes**2 / half**2
    b = along / radius**2 + slopes * centre / half**2
    c = (at[0] ** 2 + at[1] ** 2) / radius**2 + centre**2 / half**2 - 1
    inside = b**2 - a * c
    distance = (b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (distance > 0), distance, np.inf)


def _returns(
    image: _Image,
    solids: Sequence[Solid],
    sensor: Sensor,
    pose: tuple[float, float, float, float],
    azimuths: np.ndarray,
    slopes: np.ndarray,
    draws: np.random.Generator,
) -> Returns:
    """Rays that come back, with all that the sensor does wrong."""
    table = _Table.of(solids)
    beam, column = np.nonzero(np.isfinite(image.distance))
    distance, number, face = (each[beam, column] for each in (image.distance, image.solid, image.face))
    rise = np.sqrt(1 + slopes[:, 0] ** 2)[beam]
    angle = azimuths[column]
    incidence = _incidence(face, table.yaw[number], angle + pose[2], slopes[:, 0][beam] / rise)
    glass = _windows(table, number, face, distance, angle, slopes[:, 0][beam], sensor, pose)
    reach = (distance + np.where(glass, WINDOW_DEPTH, 0)) * rise
    reach = reach + draws.standard_normal(len(reach)) * np.hypot(sensor.noise, table.rough[number])
    lost = sensor.lost + 0.25 * (reach / 80.0) ** 2 + 0.6 * np.exp(-incidence / 0.03) + 0.5 * glass
    steep = slopes[:, 0][beam]  # the lowest beams of the published scans come back less often
    lost = lost + 0.1 * (steep < -0.31) + 0.15 * (steep < -0.36)
    kept = (draws.random(len(reach)) >= lost) & (reach < sensor.farthest) & (reach > sensor.nearest)
    level = (reach / rise)[kept]
    remission = table.remission[number] * (0.5 + 0.5 * incidence) + 0.06 * draws.standard_normal(len(reach))
    points = np.empty((int(kept.sum()), 4), dtype=np.float32)
    points[:, 0], points[:, 1] = level * np.cos(angle[kept]), level * np.sin(angle[kept])
    points[:, 2], points[:, 3] = level * slopes[:, 0][beam[kept]], np.clip(remission[kept], 0, 0.99)
    return Returns(points, table.label[number[kept]], table.instance[number[kept]])


@dataclass(frozen=True)
class _Table:
    """Properties of solids by number; the last row is the road, which number -1 is."""

    label: np.ndarray
    instance: np.ndarray
    remission: np.ndarray
    rough: np.ndarray
    yaw: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, solids: Sequence[Solid]) -> _Table:
        return cls(
            np.array([solid.label for solid in solids] + [ROAD], dtype=np.uint16),
            np.array([solid.instance for solid in solids] + [0], dtype=np.uint16),
            np.array([solid.remission for solid in solids] + [0.28]),
            np.array([solid.rough for solid in solids] + [0.0]),
            np.array([solid.yaw for solid in solids] + [0.0]),
            np.array([solid.centre for solid in solids] + [(0.0, 0.0)]),
        )


def _incidence(face: np.ndarray, yaw: np.ndarray, angle: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Cosine of the angle between a ray and the normal of what it meets."""
    level = np.sqrt(1 - sine**2)
    cosines = (np.abs(sine), np.abs(np.sin(angle - yaw)) * level, np.abs(np.cos(angle - yaw)) * level)
    return np.select([face == kind for kind in (TOP, LONG_SIDE, SHORT_SIDE)], cosines, ROUND_INCIDENCE)


def _windows(
    table: _Table,
    number: np.ndarray,
    face: np.ndarray,
    distance: np.ndarray,
    angle: np.ndarray,
    slope: np.ndarray,
    sensor: Sensor,
    pose: tuple[float, float, float, float],
) -> np.ndarray:
    """Which hits are on a window of a building: set back a little, and half of them go through the glass."""
    wall = (table.label[number] == BUILDING) & ((face == LONG_SIDE) | (face == SHORT_SIDE))
    x = pose[0] + distance * np.cos(angle + pose[2]) - table.place[number, 0]
    y = pose[1] + distance * np.sin(angle + pose[2]) - table.place[number, 1]
    cos, sin = np.cos(table.yaw[number]), np.sin(table.yaw[number])
    along = np.where(face == LONG_SIDE, x * cos + y * sin, y * cos - x * sin) / WINDOW_PITCH
    up = (sensor.height + distance * slope) / STOREY
    framed = (np.abs(along - np.floor(along) - 0.5) < 0.2) & (np.abs(up - np.floor(up) - 0.55) < 0.22)
    return wall & framed
