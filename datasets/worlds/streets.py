"""The world `streets`: streets that never were, scanned by a LiDAR, in SemanticKITTI's layout.

A street runs along x: a road, kerbs and pavements, front gardens, houses with windows, hedges and fences, side streets, parked
cars, poles and signs, trees; and on it cars, cyclists and people that move. A car with the scanner drives along it. Every point
has its class, so what a map of the static world is, without what moved, is known exactly.

A street is drawn from (seed, split, number) alone, so the splits ``train`` and ``heldout`` have no street in common. Published
scans have no part in it; what they were used for is to choose its proportions (points a scan, how they lie by distance, share
of ground).

Files: sequences/SS/{velodyne/NNNNNN.bin, labels/NNNNNN.label, poses.txt, calib.txt, times.txt}, as
:func:`polyalign.datasets.lidar.layouts.semantic_kitti` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.files import write_labels, write_scan
from polyalign.datasets.lidar.filters import MAP_BUILDER
from polyalign.datasets.lidar.maps import MAP_VOXEL, SceneMap, VoxelMap, transform
from polyalign.datasets.worlds.street_rays import BUILDING, Sensor, Solid, cast, hdl64

SPLITS = ("train", "heldout")
CAR, PERSON, PAVEMENT, FENCE, VEGETATION, TRUNK, TERRAIN, POLE, SIGN = 10, 30, 48, 51, 70, 71, 72, 80, 81
MOVING_CAR, MOVING_CYCLIST, MOVING_PERSON = 252, 253, 254
BACKGROUND = -40.0
SECONDS = 0.1
"""From scan to scan."""

SENSOR_TO_CAMERA = np.array([[0.0, -1.0, 0.0, -0.01], [0.0, 0.0, -1.0, -0.07], [1.0, 0.0, 0.0, -0.28], [0.0, 0.0, 0.0, 1.0]])
"""``Tr`` of calib.txt: the camera looks along the sensor's x, a little below it and behind it."""
SMALL = hdl64(beams=32, columns=512, farthest=40.0)
"""For small models: an eighth of the rays."""


@dataclass(frozen=True)
class Street:
    """What stands and moves in a street, and how the scanner drives through it: from x = 0 at ``speed`` in the lane at ``lane``
    (y, metres), swaying a little. ``slope`` is the rise of the whole street, as an angle."""

    split: str
    number: int
    seed: int
    solids: tuple[Solid, ...]
    speed: float
    lane: float
    slope: float

    def position(self, time: float) -> tuple[float, float, float]:
        """x, y and heading of the scanner on the flat street."""
        x = self.speed * time
        return x, self.lane + 0.25 * np.sin(x / 17), float(np.arctan(0.25 / 17 * np.cos(x / 17)))

    def pose(self, time: float, height: float) -> np.ndarray:
        """(4, 4) sensor to world."""
        x, y, yaw = self.position(time)
        flat, tilt = np.eye(4), np.eye(4)
        flat[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
        flat[:3, 3] = x, y, height
        cos, sin = np.cos(self.slope), np.sin(self.slope)
        tilt[[0, 0, 2, 2], [0, 2, 0, 2]] = cos, -sin, sin, cos
        return tilt @ flat


@dataclass(frozen=True)
class StreetScan:
    """Points (N, 4), classes and instances (N,), the sensor's pose (4, 4) relative to the first scan's, seconds from it."""

    points: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray
    pose: np.ndarray
    time: float


def street(split: str, number: int, seed: int = 0, *, length: float = 160.0) -> Street:
    """A street of a split, by number.

    Args:
        length: metres that are built, from 40 m behind the start.

    Raises:
        UserError: another split.
    """
    if split not in SPLITS:
        raise UserError(f"the world 'streets' has the splits {' and '.join(SPLITS)}, not {split!r}")
    draws = np.random.default_rng(seed_of(seed, "street", split, number))
    road = draws.uniform(3.6, 6.0)
    builder = _Builder(draws, road, BACKGROUND + length)
    for side in (-1, 1):
        builder.side(side)
    builder.traffic()
    return Street(
        split, number, seed, tuple(builder.solids), draws.uniform(6, 11), -road / 2 + draws.uniform(-0.3, 0.6),
        draws.uniform(-0.04, 0.04),
    )  # fmt: skip


class _Builder:
    """Draws what is in a street. ``road`` is half the road's width."""

    def __init__(self, draws: np.random.Generator, road: float, end: float):
        self.draws, self.road, self.end = draws, road, end
        self.solids: list[Solid] = []
        self.instances = 0

    def _box(self, x: float, y: float, size: tuple[float, float], low: float, high: float, label: int, **rest: Any) -> None:
        self.solids.append(Solid("box", (x, y), size, low, high, label, **rest))

    def side(self, side: int) -> None:
        """Blocks of houses on one side (1: left), with side streets between."""
        draws, start = self.draws, BACKGROUND - self.draws.uniform(0, 30)
        while start < self.end:
            length = draws.uniform(35, 80)
            self._block(side, start, start + length)
            start += length + draws.uniform(7, 11)

    def _block(self, side: int, start: float, end: float) -> None:
        draws, middle = self.draws, (start + end) / 2
        pavement, garden = draws.uniform(1.8, 3.4), draws.uniform(0.5, 7.5)
        edge = self.road + pavement
        kerb = draws.uniform(0.08, 0.15)
        self._box(middle, side * (self.road + pavement / 2), (end - start, pavement), -0.3, kerb, PAVEMENT, remission=0.35)
        ground = draws.uniform(0.05, 0.25)
        self._box(middle, side * (edge + 20), (end - start, 40), -0.3, ground, TERRAIN, remission=0.45, rough=0.03)
        if garden > 1.5:
            self._enclosure(side, start, end, edge)
        self._houses(side, start, end, edge + garden)
        self._houses(side, start, end, edge + garden + draws.uniform(24, 32))
        self._kerbside(side, start, end, edge)

    def _enclosure(self, side: int, start: float, end: float, edge: float) -> None:
        """Hedges and fences along the front gardens, with gates."""
        x = start
        while x < end - 4:
            length = min(self.draws.uniform(6, 14), end - x)
            kind = self.draws.random()
            place, y = x + length / 2, side * (edge + 0.3)
            if kind < 0.4:
                self._box(place, y, (length, 0.6), 0, self.draws.uniform(0.8, 1.9), VEGETATION, rough=0.1, gaps=0.05)
            elif kind < 0.7:
                self._box(place, y, (length, 0.1), 0, self.draws.uniform(0.7, 1.4), FENCE, gaps=0.3)
            x += length + 1.2

    def _houses(self, side: int, start: float, end: float, front: float) -> None:
        draws, x = self.draws, start
        while x < end - 6:
            width, depth = min(draws.uniform(8, 18), end - x), draws.uniform(8, 13)
            back = front + draws.uniform(0, 1.5)
            self._box(
                x + width / 2, side * (back + depth / 2), (width, depth), 0, draws.uniform(5, 14), BUILDING, remission=0.4
            )
            x += width + (draws.uniform(2, 6) if draws.random() < 0.4 else 0)

    def _kerbside(self, side: int, start: float, end: float, edge: float) -> None:
        """Parked cars, poles, signs, trees, bins' worth of people standing about."""
        draws, x = self.draws, start + self.draws.uniform(2, 8)
        density = draws.uniform(0.1, 0.8)
        while x < end - 4:
            if draws.random() < density:
                self._car(x, side * (self.road - 0.95), draws.normal(0, 0.02) + (np.pi if draws.random() < 0.5 else 0), CAR)
            x += draws.uniform(5.2, 7.5)
        for x in np.arange(start + draws.uniform(0, 12), end, draws.uniform(14, 26)):
            self._tree(x, side * (edge - 0.5)) if draws.random() < 0.5 else self._pole(x, side * (self.road + 0.4))
        for x in draws.uniform(start, end, draws.integers(0, 3)):
            self._tree(x, side * (edge + draws.uniform(1.0, 6.0)))
        for x in draws.uniform(start, end, draws.integers(0, 3)):
            self._person((x, side * (edge - 0.8)), (0.0, 0.0), PERSON)

    def _car(self, x: float, y: float, yaw: float, label: int, velocity: tuple[float, float] = (0.0, 0.0)) -> None:
        draws = self.draws
        self.instances += 1
        length, width, roof = draws.uniform(3.7, 4.8), draws.uniform(1.65, 1.9), draws.uniform(1.4, 1.75)
        shine = draws.uniform(0.15, 0.5)
        common = {"yaw": yaw, "instance": self.instances, "velocity": velocity}
        body, cabin = 0.55 * roof, draws.uniform(0.5, 0.65) * length
        self._box(x, y, (length, width), 0.22, body, label, remission=shine, **common)
        self._box(
            x - 0.2 * np.cos(yaw), y - 0.2 * np.sin(yaw), (cabin, 0.85 * width), body, roof, label, remission=0.1, **common
        )
        for along in (-0.3 * length, 0.3 * length):  # both wheels of an axle
            place = x + along * np.cos(yaw), y + along * np.sin(yaw)
            self._box(*place, (0.55, width - 0.1), 0.0, 0.3, label, remission=0.08, **common)

    def _pole(self, x: float, y: float) -> None:
        high = self.draws.uniform(2.4, 7)
        self.solids.append(Solid("cylinder", (x, y), (0.08, 0.08), 0, high, POLE, remission=0.5))
        if high < 4:
            self._box(x, y, (0.06, 0.6), high - 0.6, high, SIGN, remission=0.9)

    def _tree(self, x: float, y: float) -> None:
        draws = self.draws
        trunk, crown = draws.uniform(1.6, 2.8), draws.uniform(1.0, 2.2)
        radius = draws.uniform(0.1, 0.25)
        self.solids.append(Solid("cylinder", (x, y), (radius, radius), 0, trunk + crown, TRUNK, remission=0.25))
        shape = (crown, crown)
        self.solids.append(
            Solid("ellipsoid", (x, y), shape, trunk, trunk + 2.2 * crown, VEGETATION, remission=0.3, rough=0.2, gaps=0.3)
        )

    def _person(self, place: tuple[float, float], velocity: tuple[float, float], label: int) -> None:
        self.instances += 1
        high = self.draws.uniform(1.5, 1.95)
        self.solids.append(
            Solid("cylinder", place, (0.25, 0.25), 0, high, label, instance=self.instances, velocity=velocity, rough=0.03)
        )

    def traffic(self) -> None:
        """What moves: cars in both lanes, not at the scanner's place; cyclists and people."""
        draws = self.draws
        for _ in range(draws.integers(0, 3)):
            speed = draws.uniform(6, 12)
            self._car(draws.uniform(25, 90), self.road / 2, np.pi, MOVING_CAR, (-speed, 0.0))
        for ahead in (1, -1):
            if draws.random() < 0.5:
                self._car(ahead * draws.uniform(12, 30), -self.road / 2, 0.0, MOVING_CAR, (draws.uniform(7, 10), 0.0))
        for _ in range(draws.integers(0, 3)):
            side = draws.choice((-1, 1))
            place = draws.uniform(-20, 60), side * (self.road + 1.0)
            self._person(place, (draws.choice((-1.0, 1.0)) * draws.uniform(0.8, 1.6), 0.0), MOVING_PERSON)
        if draws.random() < 0.4:
            place, pace = (draws.uniform(5, 50), self.road - 2.4), -draws.uniform(3, 6)
            self._person(place, (pace, 0.0), MOVING_CYCLIST)
            self._box(*place, (1.7, 0.12), 0.1, 0.9, MOVING_CYCLIST, instance=self.instances, velocity=(pace, 0.0), gaps=0.4)


def scan_at(place: Street, time: float, sensor: Sensor) -> StreetScan:
    """The scan at ``time`` (seconds). What the sensor loses depends on street and time alone."""
    draws = np.random.default_rng(seed_of(place.seed, "street scan", place.split, place.number, round(time * 1e6)))
    found = cast(place.solids, sensor, *place.position(time), time, draws)
    pose = np.linalg.inv(place.pose(0.0, sensor.height)) @ place.pose(time, sensor.height)
    return StreetScan(found.points, found.semantic, found.instance, pose, time)


def drive(place: Street, scans: int, sensor: Sensor | None = None, *, seconds: float = SECONDS) -> list[StreetScan]:
    """Consecutive scans of a street, ``seconds`` apart, as KITTI's sensor by default."""
    return [scan_at(place, number * seconds, sensor or hdl64()) for number in range(scans)]


def static_map(scans: Sequence[StreetScan], *, voxel: float = MAP_VOXEL) -> SceneMap:
    """The map that :func:`polyalign.datasets.lidar.maps.build_map` makes of the written scans, without the way over the
    disk."""
    grown = VoxelMap(voxel)
    for scan in scans:
        grown.add(transform(scan.points[MAP_BUILDER.keep(scan.points, scan.semantic), :3], scan.pose))
    return SceneMap(grown.points())


def write_sequence(root: Path, name: str, scans: Sequence[StreetScan]) -> Path:
    """Write scans as sequence ``name`` of ``root``, and return its folder.

    Raises:
        UserError: there is such a sequence already.
    """
    folder = root / "sequences" / name
    if folder.exists():
        raise UserError(f"{folder} is there already; give another name, or move it away")
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True)
    for number, scan in enumerate(scans):
        write_scan(folder / "velodyne" / f"{number:06d}.bin", scan.points)
        write_labels(folder / "labels" / f"{number:06d}.label", scan.semantic, scan.instance)
    camera = [SENSOR_TO_CAMERA @ scan.pose @ np.linalg.inv(SENSOR_TO_CAMERA) for scan in scans]
    projection = np.array([[707.0, 0, 602, 0], [0, 707, 183, 0], [0, 0, 1, 0]])  # of the cameras that are not there
    lines = [f"P{number}: {_twelve(projection)}" for number in range(4)] + [f"Tr: {_twelve(SENSOR_TO_CAMERA)}"]
    atomic_write(folder / "calib.txt", "\n".join(lines) + "\n")
    atomic_write(folder / "times.txt", "".join(f"{scan.time:.6e}\n" for scan in scans))
    atomic_write(folder / "poses.txt", "".join(_twelve(pose) + "\n" for pose in camera))
    return folder


def _twelve(matrix: np.ndarray) -> str:
    return " ".join(f"{value:.12e}" for value in matrix[:3].ravel())
