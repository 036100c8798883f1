"""Sequences of scans in the layouts of SemanticKITTI and KITTI-360.

    SemanticKITTI   [dataset/]sequences/SS/{velodyne/NNNNNN.bin, labels/NNNNNN.label, poses.txt, calib.txt, times.txt}
    KITTI-360       data_3d_raw/NAME/velodyne_points/{data/NNNNNNNNNN.bin, timestamps.txt}, data_poses/NAME/poses.txt,
                    calibration/{calib_cam_to_pose.txt, calib_cam_to_velo.txt}; NAME is 2013_05_28_drive_SSSS_sync

Poses come out as sensor to world, (4, 4) float64 in metres.

Differences from the code of LiDiff and its descendants: they pair the n-th file of the folder with the n-th pose, so that one
missing scan shifts the poses of all that follow; here a scan's number is that in its name. They take poses as they are when
calib.txt is absent, and so does this (the poses of some conversions are the sensor's already), but only when asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError
from polyalign.datasets.lidar.files import read_calibration, read_matrices, read_times

TRAINING_SEQUENCES = ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
VALIDATION_SEQUENCES = ("08",)
"""Of SemanticKITTI, as LiDiff splits them: 4071 scans to validate on."""


@dataclass(frozen=True)
class ScanFile:
    """One scan: its files, which are read when wanted, and where the sensor was. ``pose`` (4, 4), ``labels`` and ``time``
    (seconds from the first scan) are None where the data set has none."""

    number: int
    points: Path
    labels: Path | None
    pose: np.ndarray | None
    time: float | None


@dataclass(frozen=True)
class ScanSequence:
    """Consecutive scans of one drive. ``without_pose`` are the numbers of scans left out because they have none."""

    name: str
    folder: Path
    scans: tuple[ScanFile, ...]
    without_pose: tuple[int, ...] = ()


def semantic_kitti(
    root: Path, sequence: str, *, poses: bool = True, labels: bool = True, sensor_poses: bool = False
) -> ScanSequence:
    """A sequence in SemanticKITTI's layout.

    Args:
        root: the folder that holds ``dataset/sequences``, ``sequences`` or the sequences themselves.
        poses, labels: whether they are needed. Test sequences (11 to 21) have no labels; completing a scan needs neither.
        sensor_poses: poses.txt has poses of the sensor already, and there is no calibration. Otherwise poses are of camera 0:
            sensor pose = Tr^-1 pose Tr, with Tr (sensor to camera) of calib.txt.

    Raises:
        UserError: no such sequence or no scans in it; poses, calibration or labels missing; a scan beyond the last pose.
    """
    folder = _sequence_folder(root, sequence)
    files = _numbered(folder / "velodyne", ".bin")
    matrices: dict[int, np.ndarray] = {}
    if poses:
        matrices = read_matrices(folder / "poses.txt")
        late = [number for number in files if number not in matrices]
        if late:
            raise UserError(
                f"{folder / 'poses.txt'} has {len(matrices)} poses, none for {len(late)} scans (the first is {late[0]})"
            )
        if not sensor_poses:
            matrices = _to_sensor(matrices, folder / "calib.txt")
    label_files = _numbered(folder / "labels", ".label") if labels else {}
    without = [number for number in files if number not in label_files] if labels else []
    if without:
        raise UserError(
            f"{folder / 'labels'} has no labels for {len(without)} of {len(files)} scans (the first is {without[0]})"
        )
    times = read_times(folder / "times.txt") if (folder / "times.txt").is_file() else []
    scans = tuple(
        ScanFile(number, path, label_files.get(number), matrices.get(number), times[number] if number < len(times) else None)
        for number, path in files.items()
    )
    return ScanSequence(folder.name, folder, scans)


def _sequence_folder(root: Path, sequence: str) -> Path:
    tried = [root / "dataset" / "sequences" / sequence, root / "sequences" / sequence, root / sequence]
    for folder in tried:
        if (folder / "velodyne").is_dir():
            return folder
    raise UserError(
        f"there is no sequence {sequence!r}: none of {', '.join(str(path) for path in tried)} has a folder 'velodyne'"
    )


def _to_sensor(poses: dict[int, np.ndarray], path: Path) -> dict[int, np.ndarray]:
    calibration = read_calibration(path)
    if "Tr" not in calibration:
        raise UserError(f"{path} has no line 'Tr:' of 12 numbers, which takes the sensor's points into the camera's frame")
    to_camera = calibration["Tr"]
    to_sensor = np.linalg.inv(to_camera)
    return {number: to_sensor @ pose @ to_camera for number, pose in poses.items()}


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by the number that is their name, in order.

    Raises:
        UserError: no such folder, no such files, or a name that is no number.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        if not path.stem.isdecimal():
            raise UserError(f"{path}: a scan's file is named by its number, as 000123{suffix}")
        found[int(path.stem)] = path
    if not found:
        raise UserError(f"{folder} has no {suffix} files")
    return dict(sorted(found.items()))


def kitti_360(root: Path, sequence: str, *, poses: bool = True, labels: Path | None = None) -> ScanSequence:
    """A drive in KITTI-360's layout. World is the sensor's frame at the first scan that has a pose, so that coordinates stay
    small.

    KITTI-360 has poses only where the car moved; scans without one are left out, and named in ``without_pose``. It publishes no
    labels of single scans: without ``labels`` moving objects cannot be taken out of a map.

    Args:
        sequence: the drive's number ("0000") or its whole name.
        labels: a folder of one's own with a SemanticKITTI ``.label`` per scan that has a pose, under the scan's name.

    Raises:
        UserError: no such drive or no scans in it, poses or calibration missing, labels of only some scans.
    """
    name = f"2013_05_28_drive_{sequence}_sync" if sequence.isdecimal() else sequence
    folder = root / "data_3d_raw" / name / "velodyne_points"
    files = _numbered(folder / "data", ".bin")
    matrices: dict[int, np.ndarray] = {}
    if poses:
        matrices = read_matrices(root / "data_poses" / name / "poses.txt", numbered=True)
        matrices = _from_body(matrices, root / "calibration", files)
    label_files = _numbered(labels, ".label") if labels is not None else {}
    times = read_times(folder / "timestamps.txt") if (folder / "timestamps.txt").is_file() else []
    kept = {number: path for number, path in files.items() if not poses or number in matrices}
    without = [path.stem for number, path in kept.items() if number not in label_files] if labels is not None else []
    if without:
        raise UserError(
            f"{labels} has no labels for {len(without)} of {len(kept)} scans (the first are {', '.join(without[:3])}), whose "
            "moving points would enter the map. Add them; without a folder of labels all that moves stays in the map"
        )
    scans = tuple(
        ScanFile(number, path, label_files.get(number), matrices.get(number), times[number] if number < len(times) else None)
        for number, path in kept.items()
    )
    return ScanSequence(name, folder, scans, tuple(number for number in files if number not in kept))


def _from_body(poses: dict[int, np.ndarray], calibration: Path, files: dict[int, Path]) -> dict[int, np.ndarray]:
    """Poses of the body (GPS/IMU) to poses of the sensor, relative to the first scan's: body from sensor is (body from camera)
    (camera from sensor)."""
    cameras = read_calibration(calibration / "calib_cam_to_pose.txt")
    sensor_from_camera = read_calibration(calibration / "calib_cam_to_velo.txt")
    if "image_00" not in cameras or not sensor_from_camera:
        raise UserError(f"{calibration} lacks 'image_00' in calib_cam_to_pose.txt, or the 12 numbers of calib_cam_to_velo.txt")
    body_from_sensor = cameras["image_00"] @ np.linalg.inv(next(iter(sensor_from_camera.values())))
    present = {number: poses[number] @ body_from_sensor for number in files if number in poses}
    if not present:
        raise UserError(f"none of the {len(files)} scans has a pose; do the poses belong to another drive?")
    origin = np.linalg.inv(next(iter(present.values())))
    return {number: origin @ pose for number, pose in present.items()}
