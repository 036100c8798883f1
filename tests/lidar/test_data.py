"""LiDAR data: both layouts written and read back, the map against the world it was scanned from, samples, and broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from polyalign.core.errors import UserError
from polyalign.datasets.lidar import files, filters, layouts, maps, samples

MOVING_CAR, BUILDING, UNLABELLED = 252, 50, 0
CAMERA = np.array([[0.0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
"""Sensor to camera: x forward to z forward, and a lever arm."""


def world() -> np.ndarray:
    """Ground of 60 x 30 m and a wall, points 0.25 m apart, none near the edge of a voxel of 0.1 m."""
    x, y = np.meshgrid(np.arange(-20, 40, 0.25) + 0.04, np.arange(-15, 15, 0.25) + 0.04)
    ground = np.stack([x.ravel(), y.ravel(), np.full(x.size, -1.66)], axis=1)
    x, z = np.meshgrid(np.arange(-20, 40, 0.25) + 0.04, np.arange(-1.41, 3, 0.25))
    return np.concatenate([ground, np.stack([x.ravel(), np.full(x.size, 12.04), z.ravel()], axis=1)])


def poses(count: int) -> list[np.ndarray]:
    """Forward by 2 m and a turn of 3 degrees a scan."""
    found = []
    for number in range(count):
        angle = np.radians(3 * number)
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[:3, 3] = [2.0 * number, 0.3 * number, 0.0]
        found.append(pose)
    return found


def scan_of(pose: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of the world within 30 m in the sensor's frame, a moving car and a few unlabelled points; (N, 4), (N,)."""
    static = maps.transform(world(), np.linalg.inv(pose))
    static = static[np.linalg.norm(static, axis=1) < 30]
    car = np.array([[8.0 + number, 3, -1]]) + np.random.default_rng(number).uniform(-1, 1, (50, 3))
    dust = np.random.default_rng(100 + number).uniform(5, 9, (5, 3))
    points = np.concatenate([static, car, dust])
    labels = np.repeat([BUILDING, MOVING_CAR, UNLABELLED], [len(static), 50, 5])
    return np.concatenate([points, np.full((len(points), 1), 0.5)], axis=1), labels


def row(matrix: np.ndarray) -> str:
    return " ".join(repr(float(value)) for value in matrix[:3].ravel())


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset" / "sequences" / "08"
    (folder / "velodyne").mkdir(parents=True)
    (folder / "labels").mkdir()
    lines = []
    for number, pose in enumerate(poses(4)):
        points, labels = scan_of(pose, number)
        files.write_scan(folder / "velodyne" / f"{number:06d}.bin", points)
        files.write_labels(folder / "labels" / f"{number:06d}.label", labels, np.full(len(labels), 7))
        lines.append(row(CAMERA @ pose @ np.linalg.inv(CAMERA)))
    (folder / "poses.txt").write_text("\n".join(lines) + "\n")
    (folder / "calib.txt").write_text(f"P0: {row(np.eye(4))}\nTr: {row(CAMERA)}\n")
    (folder / "times.txt").write_text("0.000000e+00\n1.036224e-01\n2.1e-01\n0.31\n")
    return tmp_path


@pytest.fixture
def sequence(kitti: Path) -> layouts.ScanSequence:
    return layouts.semantic_kitti(kitti, "08")


class TestLayouts:
    def test_semantic_kitti(self, kitti: Path, sequence: layouts.ScanSequence) -> None:
        assert [scan.number for scan in sequence.scans] == [0, 1, 2, 3] and sequence.name == "08"
        for scan, pose in zip(sequence.scans, poses(4), strict=True):
            assert scan.pose is not None and scan.labels is not None
            np.testing.assert_allclose(scan.pose, pose, atol=1e-9)
            points = files.read_scan(scan.points)
            semantic, instance = files.read_labels(scan.labels, len(points))
            assert points.dtype == np.float32 and set(semantic) == {0, 50, 252} and set(instance) == {7}
        assert sequence.scans[1].time == pytest.approx(0.1036224)
        for root in (kitti / "dataset", kitti / "dataset" / "sequences"):
            assert layouts.semantic_kitti(root, "08").folder == sequence.folder

    def test_a_missing_scan_keeps_the_poses_of_the_others(self, kitti: Path, sequence: layouts.ScanSequence) -> None:
        sequence.scans[1].points.unlink()
        left = layouts.semantic_kitti(kitti, "08")
        assert [scan.number for scan in left.scans] == [0, 2, 3]
        assert left.scans[1].pose is not None
        np.testing.assert_allclose(left.scans[1].pose, poses(4)[2], atol=1e-9)

    def test_what_a_scan_to_complete_needs(self, kitti: Path, sequence: layouts.ScanSequence) -> None:
        for name in ("poses.txt", "calib.txt", "times.txt"):
            (sequence.folder / name).unlink()
        bare = layouts.semantic_kitti(kitti, "08", poses=False, labels=False).scans[0]
        assert bare.pose is None and bare.labels is None and bare.time is None

    def test_poses_of_the_sensor(self, kitti: Path, sequence: layouts.ScanSequence) -> None:
        (sequence.folder / "poses.txt").write_text("\n".join(row(pose) for pose in poses(4)))
        (sequence.folder / "calib.txt").unlink()
        with pytest.raises(UserError, match="there is no calibration"):
            layouts.semantic_kitti(kitti, "08")
        found = layouts.semantic_kitti(kitti, "08", sensor_poses=True).scans[3].pose
        assert found is not None
        np.testing.assert_allclose(found, poses(4)[3])

    def test_kitti_360(self, tmp_path: Path) -> None:
        """Numbered poses of the body, some missing, and far from the origin; dates for times."""
        name = "2013_05_28_drive_0003_sync"
        raw, body = tmp_path / "data_3d_raw" / name / "velodyne_points", tmp_path / "data_poses" / name
        for folder in (raw / "data", body, tmp_path / "calibration"):
            folder.mkdir(parents=True)
        mount = poses(3)[2]  # body from sensor
        far = np.eye(4)
        far[:3, 3] = [4000, -900, 110]
        lines = []
        for number, pose in enumerate(poses(4)):
            files.write_scan(raw / "data" / f"{number:010d}.bin", scan_of(pose, number)[0])
            if number != 0:
                lines.append(f"{number} {row(far @ pose @ np.linalg.inv(mount))}")
        (body / "poses.txt").write_text("\n".join(lines))
        stamps = [f"2013-05-28 08:46:0{number}.904285953" for number in range(4)]
        (raw / "timestamps.txt").write_text("\n".join(stamps))
        (tmp_path / "calibration" / "calib_cam_to_pose.txt").write_text(f"image_00: {row(mount @ np.linalg.inv(CAMERA))}\n")
        (tmp_path / "calibration" / "calib_cam_to_velo.txt").write_text(row(np.linalg.inv(CAMERA)))
        drive = layouts.kitti_360(tmp_path, "0003")
        assert drive.name == name and drive.without_pose == (0,) and [scan.number for scan in drive.scans] == [1, 2, 3]
        expected = np.linalg.inv(poses(4)[1]) @ poses(4)[3]
        assert drive.scans[2].pose is not None and drive.scans[2].labels is None
        np.testing.assert_allclose(drive.scans[2].pose, expected, atol=1e-8)
        assert drive.scans[2].time == pytest.approx(3.0)
        assert len(layouts.kitti_360(tmp_path, name, poses=False).scans) == 4
        with pytest.raises(UserError, match="these have none"):
            maps.build_map(drive)
        assert len(maps.build_map(drive, keep=replace(maps.MAP_BUILDER, static=False))) > 1000
        own = tmp_path / "labels"
        own.mkdir()
        for number in (1, 3):
            labels = scan_of(poses(4)[number], number)[1]
            files.write_labels(own / f"{number:010d}.label", labels, np.zeros(len(labels)))
        with pytest.raises(UserError, match=r"labels has no labels for 1 of 3 scans \(the first are 0000000002\)"):
            layouts.kitti_360(tmp_path, "0003", labels=own)
        labels = scan_of(poses(4)[2], 2)[1]
        files.write_labels(own / f"{2:010d}.label", labels, np.zeros(len(labels)))
        whole = layouts.kitti_360(tmp_path, "0003", labels=own)  # scan 0 has no pose, and needs no labels
        assert all(scan.labels is not None for scan in whole.scans) and len(maps.build_map(whole)) > 1000


class TestBrokenFiles:
    def test_scans(self, sequence: layouts.ScanSequence) -> None:
        path = sequence.scans[0].points
        whole = path.read_bytes()
        path.write_bytes(whole[:-6])
        with pytest.raises(UserError, match="cut short"):
            files.read_scan(path)
        path.write_bytes(b"")
        with pytest.raises(UserError, match="has no points"):
            files.read_scan(path)
        points = np.frombuffer(whole, dtype="<f4").reshape(-1, 4).copy()
        points[5, 1] = np.nan
        files.write_scan(path, points)
        with pytest.raises(UserError, match=r"1 of \d+ points are NaN or infinite, the first is number 5"):
            files.read_scan(path)
        with pytest.raises(UserError, match="there is no scan"):
            files.read_scan(path.with_name("000009.bin"))

    def test_labels_of_another_scan(self, sequence: layouts.ScanSequence) -> None:
        scan = sequence.scans[0]
        assert scan.labels is not None
        files.write_labels(scan.labels, np.zeros(12), np.zeros(12))
        with pytest.raises(UserError, match=r"has 12 labels and its scan \d+ points"):
            maps.build_map(sequence)

    def test_sequences(self, kitti: Path, sequence: layouts.ScanSequence) -> None:
        folder = sequence.folder
        with pytest.raises(UserError, match="there is no sequence '03'"):
            layouts.semantic_kitti(kitti, "03")
        (folder / "labels" / "000002.label").unlink()
        with pytest.raises(UserError, match=r"no labels for 1 of 4 scans \(the first is 2\)"):
            layouts.semantic_kitti(kitti, "08")
        lines = (folder / "poses.txt").read_text().splitlines()
        (folder / "poses.txt").write_text("\n".join(lines[:2]))
        with pytest.raises(UserError, match=r"has 2 poses, none for 2 scans \(the first is 2\)"):
            layouts.semantic_kitti(kitti, "08")
        (folder / "poses.txt").write_text("1 2 3\n")
        with pytest.raises(UserError, match="line 1: a pose is 12 numbers"):
            layouts.semantic_kitti(kitti, "08")
        (folder / "poses.txt").write_text("one two\n")
        with pytest.raises(UserError, match="line 1: numbers are expected"):
            layouts.semantic_kitti(kitti, "08")
        (folder / "poses.txt").unlink()
        with pytest.raises(UserError, match="there are no poses at"):
            layouts.semantic_kitti(kitti, "08")
        (folder / "velodyne" / "notes.bin").write_bytes(b"")
        with pytest.raises(UserError, match="named by its number"):
            layouts.semantic_kitti(kitti, "08", poses=False, labels=False)

    def test_times(self, tmp_path: Path) -> None:
        (tmp_path / "times.txt").write_text("0.0\nsoon\n")
        with pytest.raises(UserError, match="line 2: 'soon' is neither seconds"):
            files.read_times(tmp_path / "times.txt")


class TestMaps:
    def test_the_map_is_the_world(self, sequence: layouts.ScanSequence) -> None:
        found = maps.build_map(sequence)
        assert _nearest(found, world()).max() < 1e-3  # neither the car nor the dust
        seen = np.zeros(len(world()), dtype=bool)
        for pose in poses(4):
            away = np.linalg.norm(maps.transform(world(), np.linalg.inv(pose)), axis=1)
            seen |= (away < 30) & (away > 3.5)
        assert len(found) == len(np.unique(np.floor(world()[seen] / 0.1), axis=0))

    def test_growing_equals_thinning_at_the_end(self) -> None:
        generator = np.random.default_rng(0)
        grown, every = maps.VoxelMap(0.5), []
        for _ in range(40):
            part = generator.uniform(-6, 6, (200, 3)) + generator.uniform(-3, 3, 3)
            every.append(part)
            grown.add(part)
        cells, first = np.unique(np.floor(np.concatenate(every) / 0.5), axis=0, return_index=True)
        assert len(grown) == len(cells) and len(grown._runs) < 12
        expected = np.concatenate(every)[first].astype(np.float32)
        found = grown.points()
        np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
        assert grown.add(every[0]) == 0

    def test_a_map_out_of_reach(self) -> None:
        with pytest.raises(UserError, match="are the poses right"):
            maps.VoxelMap().add(np.array([[1e7, 0, 0]]))
        assert maps.VoxelMap().points().shape == (0, 3)

    def test_around_a_scan(self, sequence: layouts.ScanSequence, tmp_path: Path) -> None:
        points = maps.build_map(sequence)
        np.save(tmp_path / maps.MAP_FILE, points)
        np.save(tmp_path / "shuffled.npy", points[np.random.default_rng(0).permutation(len(points))])
        pose = poses(4)[2]
        expected = maps.transform(points, np.linalg.inv(pose))
        expected = expected[np.linalg.norm(expected, axis=1) < 17]
        opened = maps.SceneMap.load(tmp_path / maps.MAP_FILE)
        assert isinstance(opened.points, np.memmap)
        for scene in (opened, maps.SceneMap.load(tmp_path / "shuffled.npy")):
            found = scene.around(pose, 17)
            np.testing.assert_allclose(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], atol=1e-9)
        far = np.eye(4)
        far[:3, 3] = 500
        assert opened.around(far, 17).shape == (0, 3)

    def test_broken_maps(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="build it from the scans first"):
            maps.SceneMap.load(tmp_path / "map_clean.npy")
        (tmp_path / "map_clean.npy").write_bytes(b"\x93NUMPY\x01")
        with pytest.raises(UserError, match="may be cut short"):
            maps.SceneMap.load(tmp_path / "map_clean.npy")
        with pytest.raises(UserError, match=r"\(M, 3\), found \(4, 2\)"):
            maps.SceneMap(np.zeros((4, 2)))


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.asarray(KDTree(others).query(points)[0])


class TestFilters:
    def test_bounds_are_strict_and_the_official_norm_has_four_columns(self) -> None:
        points = np.array([[3.5, 0, 0, 0.0], [3.5, 0, 0, 0.9], [4, 0, -4, 0], [4, 0, -3.9, 0], [50, 0, 0, 0]])
        assert filters.COMPLETION_SCAN.keep(points).tolist() == [False, False, True, True, False]
        assert filters.OFFICIAL_COMPLETION_SCAN.keep(points).tolist() == [False, True, True, True, False]
        labels = np.array([50, 50, 50, 50, 50])
        assert filters.TRAINING_SCAN.keep(points, labels).tolist() == [False, False, False, True, False]
        assert filters.EVALUATION_MAP.keep(np.array([[1.0, 0, 4.4], [1, 0, 4.3]])).tolist() == [False, True]

    def test_classes(self) -> None:
        points = np.tile([10.0, 0, 0], (5, 1))
        assert filters.TRAINING_SCAN.keep(points, np.array([0, 1, 2, 251, 252])).tolist() == [False, False, True, True, False]

    def test_view(self) -> None:
        """The grid begins 5 m below the scan's corner: its voxels here are [-5, 5) and [5, 15) in x."""
        scan = np.array([[0.0, 0, 0], [6, 0, 0]])
        points = np.array([[4.9, 0, 0], [-4.9, 4.9, -4.9], [14.9, 0, 0], [15.1, 0, 0], [0, 5.1, 0]])
        assert filters.in_view(points, scan).tolist() == [True, True, True, False, False]

    def test_farthest_points_against_the_plain_way(self) -> None:
        cloud = np.random.default_rng(0).normal(size=(900, 3)) * [10, 10, 1]
        chosen, nearest = [0], cdist(cloud, cloud[:1])[:, 0]
        for _ in range(299):
            chosen.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, cdist(cloud, cloud[chosen[-1:]])[:, 0])
        assert filters.farthest_points(cloud, 300).tolist() == chosen

    def test_copies_come_last_and_once(self) -> None:
        cloud = np.repeat(np.random.default_rng(0).normal(size=(100, 3)), 2, axis=0)
        chosen = filters.farthest_points(cloud, 200)
        assert len(set(chosen)) == 200 and len(set(chosen[:100] // 2)) == 100
        with pytest.raises(UserError, match="201 points are to be chosen of 200"):
            filters.farthest_points(cloud, 201)


class TestSamples:
    settings = samples.SampleSettings(full_points=3000, scan_points=300)

    def test_training(self, sequence: layouts.ScanSequence) -> None:
        scene = maps.SceneMap(maps.build_map(sequence))
        plain = replace(self.settings, augment=False)
        found = samples.training_sample(sequence.scans[1], scene, plain, seed=0, epoch=0)
        assert found.scan.shape == (300, 3) and found.full.shape == (3000, 3) and found.full.dtype == np.float32
        local = maps.transform(world(), np.linalg.inv(poses(4)[1]))
        assert _nearest(found.scan, local).max() < 1e-3 and _nearest(found.full, local).max() < 1e-3
        assert np.linalg.norm(found.scan, axis=1).min() > 3.5

    def test_augmented_and_keyed_by_epoch(self, sequence: layouts.ScanSequence) -> None:
        scene = maps.SceneMap(maps.build_map(sequence))
        first, again, other = (
            samples.training_sample(sequence.scans[0], scene, self.settings, seed=1, epoch=epoch) for epoch in (0, 0, 1)
        )
        np.testing.assert_array_equal(first.full, again.full)
        assert not np.allclose(first.scan, other.scan)
        # Scan and ground truth are turned together: every point of the scan lies on the ground truth's surface.
        assert np.median(_nearest(first.scan, first.full)) < 0.6

    def test_augmentation_is_a_scaled_rotation_or_mirror(self) -> None:
        signs = set()
        for number in range(20):
            matrix = samples.augmentation(np.random.default_rng(number))
            scale = abs(np.linalg.det(matrix)) ** (1 / 3)
            np.testing.assert_allclose(matrix @ matrix.T, scale**2 * np.eye(3), atol=1e-12)
            assert 0.95 <= scale <= 1.05 and abs(matrix[2, 2]) > 0.9
            signs.add(np.sign(np.linalg.det(matrix)))
        assert signs == {-1.0, 1.0}

    def test_few_points_come_equally_often(self) -> None:
        found = samples.resampled(np.arange(30).reshape(10, 3), 25, np.random.default_rng(0))
        counts = np.unique(found, axis=0, return_counts=True)[1]
        assert len(counts) == 10 and set(counts) == {2, 3}

    def test_ground_truth_for_evaluation(self, sequence: layouts.ScanSequence) -> None:
        scene = maps.SceneMap(maps.build_map(sequence))
        found = samples.evaluation_ground_truth(sequence.scans[2], scene, max_range=20)
        assert found[:, 2].min() > -4 and found[:, 2].max() < 4.4 and np.linalg.norm(found, axis=1).max() < 20
        local = maps.transform(world(), np.linalg.inv(poses(4)[2]))
        assert _nearest(found, local).max() < 1e-3 and len(found) > 1000

    def test_nothing_left(self, sequence: layouts.ScanSequence) -> None:
        far = maps.SceneMap(world() + [900.0, 0, 0])
        with pytest.raises(UserError, match="no point of the map is left"):
            samples.training_sample(sequence.scans[0], far, self.settings, seed=0, epoch=0)
        tight = replace(self.settings, scan_filter=filters.PointFilter(nearest=49))
        with pytest.raises(UserError, match="no point of the scan is left"):
            samples.training_sample(sequence.scans[0], maps.SceneMap(world()), tight, seed=0, epoch=0)
        blind = replace(sequence.scans[0], pose=None)
        with pytest.raises(UserError, match="has no pose"):
            samples.training_sample(blind, maps.SceneMap(world()), self.settings, seed=0, epoch=0)
