"""Scans from files to completions in files; a folder of completions measured by the papers' protocol; real scans where given.

The environment variable POLYALIGN_LIDAR_SAMPLES may name a folder of real scans (.npz with xyz_cm); nothing here needs it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.datasets.lidar.files import read_scan, write_scan
from polyalign.datasets.lidar.layouts import semantic_kitti
from polyalign.datasets.lidar.maps import SceneMap, build_map
from polyalign.datasets.lidar.samples import evaluation_ground_truth
from polyalign.datasets.worlds import streets
from polyalign.evaluation.lidar_metrics.scenes import SceneMetrics, measure
from polyalign.modalities.lidar import complete, evaluate_folder
from polyalign.modalities.lidar.checkpoints import save_completion
from polyalign.modalities.lidar.config import LidarRecipe
from polyalign.modalities.lidar.data import TrainingRows, data_files, make, opened, splits_of
from polyalign.modalities.lidar.evaluate_folder import Protocol
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)
SAMPLES = os.environ.get("POLYALIGN_LIDAR_SAMPLES")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and two drives of three small scans in SemanticKITTI's layout."""
    folder = tmp_path_factory.mktemp("scans")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_completion(folder / "model.safetensors", MinkUNetDiff(NARROW), MinkGlobalEnc(NARROW))
    for name, split in (("00", "train"), ("08", "heldout")):
        drive = streets.drive(streets.street(split, 0), 3, streets.SMALL, seconds=0.5)
        streets.write_sequence(folder / "kitti", name, drive)
    return folder


def run(place: Path, *scans: Path, out: Path, form: str = "npy") -> None:
    words = ["--model", str(place / "model.safetensors"), "--scan-points", "60", "--steps", "1", "--voxel", "0.5"]
    complete.main([*map(str, scans), *words, "--guidance", "1", "--out", str(out), "--format", form])


def scan_of(place: Path, number: int = 0) -> Path:
    return place / "kitti" / "sequences" / "08" / "velodyne" / f"{number:06d}.bin"


def test_scans_become_files_that_other_programs_read(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in complete.FORMATS:
        run(place, scan_of(place), out=tmp_path, form=form)
    points = np.load(tmp_path / "000000.npy")
    assert points.dtype == np.float32 and points.shape[1] == 3 and 0 < len(points) <= 600
    np.testing.assert_array_equal(evaluate_folder.read_completion(tmp_path / "000000.ply"), points)
    np.testing.assert_array_equal(read_scan(tmp_path / "000000.bin")[:, :3], points)
    changed = (tmp_path / "000000.npy").read_bytes()
    run(place, scan_of(place), out=tmp_path / "again")
    assert (tmp_path / "again" / "000000.npy").read_bytes() == changed, "the same scan and seed give the same bytes"
    capsys.readouterr()
    run(place, scan_of(place), out=tmp_path / "again")
    assert "kept" in capsys.readouterr().out


def test_bad_scans_are_refused_by_name(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "cut.bin").write_bytes(scan_of(place).read_bytes()[:-3])
    write_scan(tmp_path / "nan.bin", np.full((20, 4), np.nan, dtype=np.float32))
    np.savez(tmp_path / "other.npz", points=np.zeros((3, 3)))
    np.save(tmp_path / "flat.npy", np.zeros(12))
    write_scan(tmp_path / "near.bin", np.ones((20, 4), dtype=np.float32))
    for name, said in (
        ("empty.bin", "has no points"),
        ("cut.bin", "cut short"),
        ("nan.bin", "NaN"),
        ("other.npz", "'xyz'"),
        ("flat.npy", "found (12,)"),
        ("near.bin", "none of the 20 points"),
        ("nowhere.bin", "no scan"),
        ("scan.pcd", ".bin, .npy and .npz"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(place, tmp_path / name, out=tmp_path / "out")
        assert stopped.value.code == 2 and said in capsys.readouterr().err, name
    assert not (tmp_path / "out").exists()


def test_a_folder_without_settings_and_a_damaged_one_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no export of a LiDAR run. Name its checkpoint"):
        complete.open_completer(str(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "completion.json").write_text("{}")
    with pytest.raises(UserError, match=r"Did you mean .*adapter\?"):
        complete.open_completer(str(tmp_path))
    with pytest.raises(UserError, match="steps is 0"):
        complete.open_completer("tiny", steps=0)
    (tmp_path / "completion.json").write_text('{"sampler": {}}')
    with pytest.raises(UserError, match="is damaged"):
        complete.open_completer(str(tmp_path))


def protocol(place: Path, **changes: Any) -> Protocol:
    return Protocol(place / "kitti", "08", metrics=SceneMetrics(iou_voxels=(0.5,), **changes))


def perfect(place: Path, folder: Path) -> None:
    """The ground truth itself, as completions."""
    sequence = semantic_kitti(place / "kitti", "08")
    scene = SceneMap(build_map(sequence))
    folder.mkdir()
    for scan in sequence.scans:
        truth = evaluation_ground_truth(scan, scene)
        (folder / f"{scan.number:06d}.ply").write_bytes(complete.cloud_bytes(truth, "ply"))


def test_a_folder_is_measured_by_the_protocol_and_gone_on_with(place: Path, tmp_path: Path) -> None:
    perfect(place, tmp_path / "made")
    rows = tmp_path / "rows.jsonl"
    whole = Protocol(place / "kitti", "08", postprocess=False, metrics=SceneMetrics(iou_voxels=(0.5,)))
    summary = evaluate_folder.evaluate_folder(tmp_path / "made", rows, whole)
    assert summary["scans"] == 3
    assert summary["metrics"]["cd"]["mean"] < 1e-5 and summary["metrics"]["iou_0.5"]["mean"] > 0.999
    written = rows.read_bytes()
    rows.write_bytes(written[: 3 * len(written) // 4])  # as a kill leaves it
    again = evaluate_folder.evaluate_folder(tmp_path / "made", rows, whole)
    assert rows.read_bytes() == written and again == summary
    with pytest.raises(UserError, match="rows measured otherwise"):
        evaluate_folder.evaluate_folder(tmp_path / "made", rows, protocol(place, compat="lidiff_old"))


def test_replaced_completions_are_measured_anew_and_removed_ones_leave(place: Path, tmp_path: Path) -> None:
    made, rows = tmp_path / "made", tmp_path / "rows.jsonl"
    perfect(place, made)
    evaluate_folder.evaluate_folder(made, rows, protocol(place))
    untouched = rows.read_text().splitlines()[2]
    moved = evaluate_folder.read_completion(made / "000000.ply") + np.float32(0.3)
    (made / "000000.ply").write_bytes(complete.cloud_bytes(moved, "ply"))
    (made / "000001.ply").unlink()
    found = evaluate_folder.evaluate_folder(made, rows, protocol(place))
    fresh = evaluate_folder.evaluate_folder(made, tmp_path / "fresh.jsonl", protocol(place))
    assert found == fresh and found["scans"] == 2 and found["metrics"]["cd"]["mean"] > 0.05
    assert rows.read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()
    assert rows.read_text().splitlines()[1] == untouched and "completion" not in found["metrics"]


def test_built_maps_are_of_one_root_and_kind_of_poses_and_given_ones_of_one_content(place: Path, tmp_path: Path) -> None:
    made, other = tmp_path / "made", tmp_path / "other"
    perfect(place, made)
    streets.write_sequence(other, "08", streets.drive(streets.street("train", 1), 3, streets.SMALL, seconds=0.5))
    near = evaluate_folder.evaluate_folder(made, tmp_path / "near.jsonl", protocol(place))["metrics"]
    elsewhere = Protocol(other, "08", metrics=SceneMetrics(iou_voxels=(0.5,)))
    found = evaluate_folder.evaluate_folder(made, tmp_path / "elsewhere.jsonl", elsewhere)["metrics"]
    alone = evaluate_folder.evaluate_folder(made, tmp_path / "alone" / "rows.jsonl", elsewhere)["metrics"]
    assert found == alone and found["cd"]["mean"] > near["cd"]["mean"] + 0.1
    evaluate_folder.evaluate_folder(made, tmp_path / "sensor.jsonl", replace(protocol(place), sensor_poses=True))
    assert len(list(tmp_path.glob("08-*-map_clean.npy"))) == 3

    given = replace(protocol(place), map_file=tmp_path / "given.npy")
    with pytest.raises(UserError, match="no such file"):
        evaluate_folder.evaluate_folder(made, tmp_path / "given.jsonl", given)
    np.save(tmp_path / "given.npy", build_map(semantic_kitti(place / "kitti", "08")))
    assert evaluate_folder.evaluate_folder(made, tmp_path / "given.jsonl", given)["metrics"] == near
    np.save(tmp_path / "given.npy", build_map(semantic_kitti(other, "08")))
    with pytest.raises(UserError, match="rows measured otherwise .*map was"):
        evaluate_folder.evaluate_folder(made, tmp_path / "given.jsonl", given)


def test_completions_are_cut_to_the_scans_heights_and_compat_changes_the_iou(place: Path, tmp_path: Path) -> None:
    perfect(place, tmp_path / "made")
    high = evaluate_folder.read_completion(tmp_path / "made" / "000000.ply")
    high = np.concatenate([high, high[:50] + [0, 0, 60]]).astype(np.float32)
    (tmp_path / "made" / "000000.ply").write_bytes(complete.cloud_bytes(high, "ply"))
    cut = evaluate_folder.evaluate_folder(tmp_path / "made", tmp_path / "cut.jsonl", protocol(place))
    assert cut["metrics"]["cd_pred_to_gt"]["mean"] < 1e-5
    old = evaluate_folder.evaluate_folder(tmp_path / "made", tmp_path / "old.jsonl", protocol(place, compat="lidiff_old"))
    rows = [json.loads(line)["voxels_0.5"] for name in ("cut", "old") for line in (tmp_path / f"{name}.jsonl").open()]
    assert rows[:3] != rows[3:] and old["metrics"]["cd"] == cut["metrics"]["cd"]


def test_folders_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            evaluate_folder.evaluate_folder(tmp_path / "made", tmp_path / "rows.jsonl", protocol(place))

    refused("no folder")
    (tmp_path / "made").mkdir()
    refused("has no completions")
    (tmp_path / "made" / "000777.npy").write_bytes(complete.cloud_bytes(np.ones((4, 3)), "npy"))
    refused("of no scan of sequence 08, first 777")
    (tmp_path / "made" / "000777.npy").rename(tmp_path / "made" / "scan.npy")
    refused("named by its scan's number")
    (tmp_path / "made" / "scan.npy").unlink()
    (tmp_path / "made" / "000001.ply").write_bytes(complete.cloud_bytes(np.ones((4, 3)), "ply")[:-5])
    refused("cut short")
    (tmp_path / "made" / "000001.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n1 2 3\n")
    refused("binary little-endian")


def test_scans_of_a_data_set_are_trained_and_evaluated_on(place: Path, tmp_path: Path) -> None:
    recipe = LidarRecipe.model_validate(
        {
            "modality": "lidar",
            "data": {
                "source": "semantic_kitti",
                "folder": str(place / "kitti"),
                "sequences": ["00"],
                "scan_points": 50,
                "max_range": 20,
                "versions": 2,
            },
            "objective": {"name": "lidiff"},
        }
    )
    summary = make(recipe, tmp_path)
    assert summary["train"] == {"scans": 3, "places": 1} and (tmp_path / "maps" / "08" / "map_clean.npy").is_file()
    train, held = (opened(recipe, tmp_path, split) for split in splits_of(recipe))
    rows = TrainingRows(train, 200, versions=2, seed=0)
    assert len(rows) == 6
    plain, turned = rows.rows([1, 4])
    assert plain["pair_id"] == "00-000001/0" and turned["pair_id"] == "00-000001/1"
    assert plain["scan"].shape == (50, 3) and plain["full"].shape == (200, 3)
    assert not np.allclose(plain["scan"], turned["scan"])
    np.testing.assert_array_equal(turned["full"], rows.rows([4])[0]["full"])
    assert held.scan(0).shape == (50, 3) and np.linalg.norm(held.truth(0), axis=1).max() < 20
    before = data_files(recipe)
    (place / "kitti" / "sequences" / "00" / "velodyne" / "000002.bin").write_bytes(scan_of(place).read_bytes())
    assert data_files(recipe) != before


@pytest.mark.skipif(SAMPLES is None, reason="POLYALIGN_LIDAR_SAMPLES names no folder of real scans")
def test_real_scans_go_through_loading_completion_and_metrics(place: Path) -> None:
    assert SAMPLES is not None
    files = sorted(Path(SAMPLES).glob("*.npz"))
    assert files
    how = {"guidance": 1.0, "voxel": 0.5, "scan_points": 300}
    completer = complete.open_completer(str(place / "model.safetensors"), steps=1, **how)
    for path in files:
        points = complete.read_points(path)
        made = completer(points, 0)
        assert np.isfinite(made).all() and 0 < len(made) <= 3000
        row = measure(made, points[np.linalg.norm(points[:, :3], axis=1) < 50, :3], metrics=SceneMetrics(iou_voxels=(0.5,)))
        assert 0 < row["cd"] < 20 and 0 < row["jsd_bev"] < 0.8326
