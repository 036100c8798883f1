"""Bad scans on their way through maps and training: refused by file, nothing half-written left, and all well once mended.

The environment variable POLYALIGN_LIDAR_SAMPLES may name a folder of real consecutive scans (``kitti*.npz`` with ``xyz_cm``),
which then go through loading, map building and metrics; nothing else here needs it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.lidar import files
from polyalign.datasets.lidar.layouts import semantic_kitti
from polyalign.datasets.lidar.maps import build_map
from polyalign.datasets.worlds import streets
from polyalign.evaluation.lidar_metrics.scenes import SceneMetrics, measure, summarise
from polyalign.modalities.lidar.refine import MapClouds

SAMPLES = os.environ.get("POLYALIGN_LIDAR_SAMPLES")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sequence of three small scans."""
    drive = streets.drive(streets.street("train", 0), 3, streets.SMALL, seconds=0.5)
    streets.write_sequence(tmp_path, "00", drive)
    return tmp_path


def broken(root: Path, what: str) -> Path:
    folder = root / "sequences" / "00"
    scan, labels = folder / "velodyne" / "000001.bin", folder / "labels" / "000001.label"
    if what == "empty":
        scan.write_bytes(b"")
    elif what == "cut short":
        scan.write_bytes(scan.read_bytes()[:-5])
    elif what == "nan":
        points = files.read_scan(scan)
        points[7, 2] = np.nan
        files.write_scan(scan, points)
    elif what == "fewer labels":
        labels.write_bytes(labels.read_bytes()[:-8])
    elif what == "labels cut short":
        labels.write_bytes(labels.read_bytes()[:-3])
    elif what == "nan pose":
        lines = (folder / "poses.txt").read_text().splitlines()
        (folder / "poses.txt").write_text("\n".join([lines[0], " ".join(["nan"] * 12), lines[2]]))
    else:
        (folder / "poses.txt").unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", r"000001\.bin has no points"),
        ("cut short", r"000001\.bin has \d+ bytes, no multiple of the 16"),
        ("nan", r"000001\.bin: 1 of \d+ points are NaN or infinite, the first is number 7"),
        ("fewer labels", r"000001\.label has \d+ labels and its scan \d+ points"),
        ("labels cut short", r"000001\.label has \d+ bytes, no multiple of the 4"),
        ("nan pose", r"poses\.txt, line 2: a number is NaN"),
        ("no poses", r"there are no poses at .*poses\.txt"),
    ],
)
def test_refused_and_nothing_left(root: Path, tmp_path: Path, what: str, message: str) -> None:
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    whole = build_map(semantic_kitti(root, "00"))
    broken(root, what)
    work = tmp_path / "work"
    with pytest.raises(UserError, match=message):
        MapClouds(root, ["00"], work)
    assert not list(work.rglob("*.npy"))
    for path, content in kept.items():
        path.write_bytes(content)
    clouds = MapClouds(root, ["00"], work)
    np.testing.assert_array_equal(np.load(work / clouds.map_name("00")), whole)


@pytest.mark.skipif(SAMPLES is None, reason="POLYALIGN_LIDAR_SAMPLES names no folder of real scans")
def test_real_scans(tmp_path: Path) -> None:
    """Without poses of their own: as if the sensor had stood still, and all they see were road."""
    folder = tmp_path / "sequences" / "00"
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True)
    clouds = [np.load(file)["xyz_cm"].astype(np.float32) / 100 for file in sorted(Path(str(SAMPLES)).glob("kitti*.npz"))]
    for number, cloud in enumerate(clouds):
        files.write_scan(folder / "velodyne" / f"{number:06d}.bin", np.pad(cloud, ((0, 0), (0, 1))))
        label = np.full(len(cloud), streets.TERRAIN)
        files.write_labels(folder / "labels" / f"{number:06d}.label", label, np.zeros(len(cloud)))
    (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * len(clouds))
    began = time.process_time()
    found = build_map(semantic_kitti(tmp_path, "00", sensor_poses=True))
    built = time.process_time() - began
    assert len(clouds[0]) < len(found) < sum(map(len, clouds))
    rows = []
    for first, second in zip(clouds, clouds[1:], strict=False):
        near = [cloud[np.linalg.norm(cloud, axis=1) < 50] for cloud in (first, second)]
        rows.append(measure(*near, metrics=SceneMetrics(emd=len(rows) == 0, emd_voxel=4.0)))
    summary = summarise(rows, seed=0)
    assert 0.01 < summary["cd"].mean < 1 and summary["jsd_bev"].mean < 0.5
    assert rows[0]["emd_lower"] <= rows[0]["emd"] < 5
    print(f"{len(clouds)} scans, map of {len(found)} points in {built:.2f} s")
    print({name: (round(one.mean, 4), tuple(round(end, 4) for end in one.interval)) for name, one in summary.items()})
