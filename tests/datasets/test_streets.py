"""Streets: rays against geometry by hand, the layout read back, splits, what moves, and real scans when they are there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.lidar.files import read_labels, read_scan
from polyalign.datasets.lidar.layouts import semantic_kitti
from polyalign.datasets.lidar.maps import build_map
from polyalign.datasets.worlds import streets
from polyalign.datasets.worlds.street_rays import Sensor, Solid, cast, hdl64

PERFECT = Sensor((1.0, -1.0, -10.0), columns=360, noise=0.0, lost=0.0)
REAL = "POLYALIGN_LIDAR_SAMPLES"


def returns(*solids: Solid, sensor: Sensor = PERFECT, x: float = 0.0, y: float = 0.0, yaw: float = 0.0, time: float = 0.0):  # type: ignore[no-untyped-def]
    return cast(solids, sensor, x, y, yaw, time, np.random.default_rng(0))


def of_class(found, label: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    return found.points[found.semantic == label][:, :3]


class TestRays:
    def test_the_road_lies_at_the_height_of_the_sensor(self) -> None:
        road = of_class(returns(), 40)
        assert np.allclose(road[:, 2], -1.73, atol=1e-4)
        steep = road[np.hypot(road[:, 0], road[:, 1]) < 20]
        assert np.allclose(np.hypot(steep[:, 0], steep[:, 1]), 1.73 / np.tan(np.radians(10)), atol=1e-3)

    def test_a_wall_stands_where_it_is_and_hides_what_is_behind(self) -> None:
        wall = Solid("box", (10.0, 0.0), (2.0, 6.0), 0.0, 4.0, 51, instance=3)
        behind = Solid("box", (20.0, 0.0), (2.0, 4.0), 0.0, 4.0, 80)
        found = returns(behind, wall)
        points = of_class(found, 51)
        assert len(points) and np.allclose(points[:, 0], 9.0, atol=1e-3) and np.abs(points[:, 1]).max() <= 3.0 + 1e-3
        assert not len(of_class(found, 80)) and set(found.instance[found.semantic == 51]) == {3}

    def test_boxes_turn_with_their_yaw_and_the_sensor_with_its_own(self) -> None:
        wall = Solid("box", (10.0, 0.0), (6.0, 2.0), 0.0, 4.0, 51, yaw=np.pi / 2)
        assert np.allclose(of_class(returns(wall), 51)[:, 0], 9.0, atol=1e-3)
        turned = of_class(returns(wall, yaw=np.pi / 2), 51)
        assert np.allclose(turned[:, 1], -9.0, atol=1e-3)
        assert np.allclose(of_class(returns(wall, x=4.0), 51)[:, 0], 5.0, atol=1e-3)

    def test_round_things(self) -> None:
        pole = of_class(returns(Solid("cylinder", (5.0, 5.0), (1.0, 1.0), 0.0, 4.0, 80)), 80)
        assert len(pole) and np.allclose(np.hypot(pole[:, 0] - 5, pole[:, 1] - 5), 1.0, atol=1e-3)
        ball = of_class(returns(Solid("ellipsoid", (5.0, 0.0), (2.0, 2.0), 0.73, 2.73, 70)), 70)
        level = ((ball[:, 0] - 5) ** 2 + ball[:, 1] ** 2) / 4 + ball[:, 2] ** 2
        assert len(ball) and np.allclose(level, 1.0, atol=1e-3)

    def test_rays_pass_under_what_hangs_and_meet_the_top_of_what_is_low(self) -> None:
        hanging = returns(Solid("box", (6.0, 0.0), (2.0, 2.0), 3.0, 4.0, 81))
        assert not len(of_class(hanging, 81))
        low = of_class(returns(Solid("box", (7.0, 0.0), (6.0, 2.0), -0.2, 0.5, 48)), 48)
        assert len(low) and np.allclose(low[:, 2], 0.5 - 1.73, atol=1e-3)

    def test_what_moves_is_where_it_has_gone(self) -> None:
        car = Solid("box", (10.0, 0.0), (2.0, 2.0), 0.0, 4.0, 252, velocity=(5.0, 0.0))
        assert np.allclose(of_class(returns(car, time=2.0), 252)[:, 0], 19.0, atol=1e-3)

    def test_culling_loses_nothing(self) -> None:
        """All round the sensor: the same wall, seen at every bearing and across the start of the turn."""
        for bearing in np.radians([0, 1, 90, 179, 180, 270, 359]):
            place = (10 * np.cos(bearing), 10 * np.sin(bearing))
            wall = Solid("cylinder", place, (1.0, 1.0), 0.0, 4.0, 80)
            assert len(of_class(returns(wall), 80)) == pytest.approx(3 * 11, abs=3), bearing
        around = Solid("box", (0.0, 5.0), (100.0, 2.0), 0.0, 4.0, 50)
        assert len(of_class(returns(around), 50)) > 150

    def test_too_many_beams_are_refused(self) -> None:
        with pytest.raises(UserError, match="64 beams"):
            hdl64(beams=128)


class TestStreets:
    def test_a_street_is_its_split_number_and_seed(self) -> None:
        assert streets.street("train", 3) == streets.street("train", 3)
        different = [streets.street("heldout", 3), streets.street("train", 4), streets.street("train", 3, seed=1)]
        assert all(other.solids != streets.street("train", 3).solids for other in different)
        with pytest.raises(UserError, match="not 'test'"):
            streets.street("test", 0)

    def test_scans_do_not_depend_on_each_other(self) -> None:
        place = streets.street("train", 0)
        again = streets.scan_at(place, 0.1, streets.SMALL)
        assert np.array_equal(streets.drive(place, 2, streets.SMALL)[1].points, again.points)

    def test_the_layout_reads_back(self, tmp_path: Path) -> None:
        scans = streets.drive(streets.street("train", 1), 3, streets.SMALL, seconds=0.2)
        streets.write_sequence(tmp_path, "00", scans)
        found = semantic_kitti(tmp_path, "00")
        assert [scan.number for scan in found.scans] == [0, 1, 2]
        for scan, file in zip(scans, found.scans, strict=True):
            points = read_scan(file.points)
            semantic, instance = read_labels(file.labels, len(points))  # type: ignore[arg-type]
            assert np.array_equal(points, scan.points)
            assert np.array_equal(semantic, scan.semantic) and np.array_equal(instance, scan.instance)
            assert file.pose is not None
            np.testing.assert_allclose(file.pose, scan.pose, atol=1e-9)
            assert file.time == pytest.approx(scan.time)
        assert np.array_equal(build_map(found), streets.static_map(scans).points)
        with pytest.raises(UserError, match="there already"):
            streets.write_sequence(tmp_path, "00", scans)

    def test_poses_put_still_things_into_one_place_and_maps_leave_out_what_moves(self) -> None:
        """The wall of a house, seen from two places; and nothing that moves in the map."""
        place = streets.street("train", 2)
        near, far = (streets.scan_at(place, time, streets.SMALL) for time in (0.0, 1.0))
        assert np.allclose(near.pose, np.eye(4)) and np.linalg.norm(far.pose[:3, 3]) > 5
        from scipy.spatial import KDTree

        def still(scan: streets.StreetScan) -> np.ndarray:
            kept = (scan.semantic == 40) & (np.linalg.norm(scan.points[:, :3], axis=1) < 15)
            return scan.points[kept, :3].astype(np.float64) @ scan.pose[:3, :3].T + scan.pose[:3, 3]

        tree = KDTree(still(near)[:, [2]])
        plane = np.linalg.lstsq(np.c_[still(near)[:, :2], np.ones(tree.n)], still(near)[:, 2], rcond=None)[0]
        off = still(far) @ np.array([-plane[0], -plane[1], 1.0]) - plane[2]
        assert np.abs(off).mean() < 0.02  # one tilted road
        moving = np.concatenate([scan.semantic for scan in streets.drive(place, 4, streets.SMALL)])
        assert {int(label) for label in np.unique(moving)} >= {10, 40, 48, 50}

    def test_moving_things_are_not_in_the_map(self) -> None:
        for number in range(6):
            scans = streets.drive(streets.street("train", number), 2, streets.SMALL)
            moving = [scan for scan in scans if (scan.semantic >= 252).any()]
            if moving:
                break
        count = sum(int(((scan.semantic > 1) & (scan.semantic < 252)).sum()) for scan in scans)
        assert moving and len(streets.static_map(scans, voxel=0.001).points) <= count


def statistics(points: np.ndarray) -> dict[str, float]:
    distance, height = np.hypot(points[:, 0], points[:, 1]), points[:, 2]
    rings = {f"{low}-{high} m": (distance >= low) & (distance < high) for low, high in ((0, 5), (5, 10), (10, 20), (20, 80))}
    shares = {name: float(ring.mean()) for name, ring in rings.items()}
    return {"points": len(points), "ground": float((height < -1.4).mean()), "above": float((height > 0).mean()), **shares}


@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no folder of real scans")
def test_statistics_are_those_of_real_scans() -> None:
    """Means over streets against KITTI's scans (``kitti*.npz`` with ``xyz_cm``)."""
    files = sorted(Path(os.environ[REAL]).glob("kitti*.npz"))
    real = [statistics(np.load(file)["xyz_cm"].astype(np.float64) / 100) for file in files]
    ours = [statistics(streets.scan_at(streets.street("train", number), 1.0, hdl64()).points) for number in range(12)]
    means = [{name: float(np.mean([row[name] for row in rows])) for name in rows[0]} for rows in (real, ours)]
    assert means[1]["points"] == pytest.approx(means[0]["points"], rel=0.08)
    for name in set(means[0]) - {"points"}:
        assert means[1][name] == pytest.approx(means[0][name], abs=0.12), (name, means)
