"""The refinement network in training: the loss by hand and in gradient, a loss that falls, an exact resume, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.datasets.lidar.maps import build_map
from polyalign.datasets.worlds import streets
from polyalign.modalities.lidar import refine as command
from polyalign.modalities.lidar.checkpoints import open_refinement
from polyalign.modalities.lidar.minkunet import MinkUNet, scaled
from polyalign.modalities.lidar.refinement_training import (
    NETWORK,
    ChamferRefinement,
    RefinementSettings,
    chamfer_loss,
    jittered,
    nearest_points,
)

torch.set_num_threads(1)
SMALL = RefinementSettings(points=120, full_points=400, voxel=0.2)
WALLS = {"walls": 4}
SETTINGS = command.Settings(steps=6, batch=2, width=0.125, save_every=3, refinement=SMALL)


class Walls:
    """Four clouds of 900 points on two walls."""

    def __len__(self) -> int:
        return 4

    def rows(self, indices: Any) -> list[dict[str, Any]]:
        return [{"pair_id": f"wall-{index}", "points": self._points(index)} for index in indices]

    def _points(self, index: int) -> np.ndarray:
        points = np.random.default_rng(index).uniform(-3, 3, (900, 3))
        points[:450, 0], points[450:, 1] = 2.0, -2.0
        return points


def cloud(count: int, seed: int) -> Tensor:
    return 3 * torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    def test_by_hand(self) -> None:
        """Predicted 0 and 3, true 1: squares 1, 4 and 1."""
        predicted = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
        assert chamfer_loss(predicted, torch.tensor([[[1.0, 0, 0]]])).tolist() == [2.5 + 1]

    def test_against_all_pairs_in_value_and_gradient(self) -> None:
        predicted, truth = cloud(30, 0).requires_grad_(), cloud(50, 1)
        every = (predicted[:, :, None] - truth[:, None]).pow(2).sum(dim=3)
        expected = every.amin(dim=2).mean(dim=1) + every.amin(dim=1).mean(dim=1)
        found = chamfer_loss(predicted, truth)
        torch.testing.assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(value.sum(), predicted)[0] for value in (found, expected))
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_nearest_on_a_gpu(self) -> None:
        points, others = cloud(3000, 2)[0].float() + 40, cloud(5000, 3)[0].float() + 40
        assert torch.equal(nearest_points(points.cuda(), others.cuda()).cpu(), nearest_points(points, others))


def test_inputs_are_ground_truth_moved_a_little() -> None:
    points = np.zeros((50, 3))
    moved = jittered(points, SMALL, np.random.default_rng(0))
    assert moved.shape == (120, 3) and np.abs(moved).max() == SMALL.clip
    assert 0.15 < moved.std() < 0.2  # 0.2 m, but for what is clipped


def test_a_batch_is_its_rows_and_its_step() -> None:
    algorithm = ChamferRefinement(MinkUNet(scaled(0.125)), SMALL)
    first, again, other = (algorithm.prepare(Walls().rows([0, 1]), step=step).tensors for step in (1, 1, 2))
    assert first["points"].shape == (2, 120, 3) and first["full"].shape == (2, 400, 3)
    assert torch.equal(first["points"], again["points"]) and not torch.equal(first["points"], other["points"])
    swapped = algorithm.prepare(Walls().rows([1, 0]), step=1).tensors
    assert torch.equal(swapped["full"][1], first["full"][0])


def test_the_loss_falls_and_training_goes_on_exactly(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=16, rate=1e-2)
    whole = command.train(Walls(), settings, tmp_path / "whole", source=WALLS)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]  # sampling and jitter leave a floor

    class Killed(Exception):
        pass

    class Dying(Walls):
        def __init__(self, left: int):
            self.left = left

        def rows(self, indices: Any) -> list[dict[str, Any]]:
            self.left -= 1
            if not self.left:
                raise Killed
            return super().rows(indices)

    with pytest.raises(Killed):
        command.train(Dying(8), settings, tmp_path / "parts", source=WALLS)
    assert not (tmp_path / "parts" / command.WEIGHTS).exists()
    resumed = command.train(Walls(), settings, tmp_path / "parts", source=WALLS).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items())
    assert float(resumed["stem.1.bn.running_var"].sub(1).abs().max()) > 0  # batch statistics have moved, and were kept
    with pytest.raises(UserError, match="refinement"):
        command.train(Walls(), replace(settings, refinement=replace(SMALL, jitter=0.1)), tmp_path / "parts", source=WALLS)
    with pytest.raises(UserError, match="data"):
        command.train(Walls(), settings, tmp_path / "parts", source={"data": "as many other walls"})


def test_refused_input() -> None:
    algorithm = ChamferRefinement(MinkUNet(scaled(0.125)), SMALL)
    for points in (np.zeros((0, 3)), np.full((5, 3), np.nan), np.zeros((5, 2))):
        with pytest.raises(UserError, match="'bad': ground truth has to be finite points"):
            algorithm.prepare([{"pair_id": "bad", "points": points}], step=1)
    with pytest.raises(UserError, match="jitter is 0"):
        RefinementSettings(jitter=0)


def test_the_command_on_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(SETTINGS, streets=1, measured_streets=1, scenes=replace(SETTINGS.scenes, drives=5, ends=2))
    monkeypatch.setattr(command, "WORLD", small)
    command.main([str(tmp_path / "made"), "--steps", "2"])
    record = json.loads((tmp_path / "made" / "refinement.json").read_text())
    assert json.loads(capsys.readouterr().out) == record and record["settings"]["steps"] == 2
    assert record["figures"]["scenes"] == 1 and record["figures"]["before"] > 0
    assert open_refinement(tmp_path / "made" / command.WEIGHTS).last[2].out_features == 18
    tensors = ChamferRefinement(MinkUNet(scaled(0.125)), SMALL).networks[NETWORK].state_dict()
    assert set(open_refinement(tmp_path / "made" / command.WEIGHTS).state_dict()) == set(tensors)


def test_clouds_of_a_data_set(tmp_path: Path) -> None:
    drive = streets.drive(streets.street("train", 0), 3, streets.SMALL, seconds=0.5)
    streets.write_sequence(tmp_path, "00", drive)
    clouds = command.MapClouds(tmp_path, ["00"], tmp_path / "work")
    rows = clouds.rows([0, 2])
    assert len(clouds) == 3 and [row["pair_id"] for row in rows] == ["00-000000", "00-000002"]
    assert all(len(row["points"]) > 1000 and np.linalg.norm(row["points"], axis=1).max() < 50 for row in rows)
    known = np.load(tmp_path / "work" / clouds.map_name("00"))
    np.testing.assert_array_equal(known, build_map(command.semantic_kitti(tmp_path, "00")))
    again = command.MapClouds(tmp_path, ["00"], tmp_path / "work").rows([0])
    np.testing.assert_array_equal(again[0]["points"], rows[0]["points"])
    with pytest.raises(UserError, match="there is no sequence '05'"):
        command.MapClouds(tmp_path, ["05"], tmp_path / "work")


def test_other_data_of_as_many_clouds_is_neither_mapped_nor_trained_on_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, root in enumerate(("first", "second")):
        drive = streets.drive(streets.street("train", number), 3, streets.SMALL, seconds=0.5)
        streets.write_sequence(tmp_path / root, "00", drive)
    found = [command.MapClouds(tmp_path / root, ["00"], tmp_path / "work") for root in ("first", "second", "first")]
    assert found[0].source == found[2].source != found[1].source and len(list((tmp_path / "work").glob("00-*.npy"))) == 2
    points = [clouds.rows([1])[0]["points"] for clouds in found]
    np.testing.assert_array_equal(points[0], points[2])
    expected = build_map(command.semantic_kitti(tmp_path / "second", "00"))
    np.testing.assert_array_equal(np.load(tmp_path / "work" / found[1].map_name("00")), expected)

    monkeypatch.setattr(command, "PUBLISHED", SETTINGS)
    words = [str(tmp_path / "made"), "--sequences", "00", "--steps", "1", "--kitti"]
    command.main([*words, str(tmp_path / "first")])
    first = (tmp_path / "made" / command.WEIGHTS).read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main([*words, str(tmp_path / "second")])
    assert stopped.value.code == 2 and "data" in capsys.readouterr().err
    assert (tmp_path / "made" / command.WEIGHTS).read_bytes() == first
    command.main([*words, str(tmp_path / "first")])
    assert (tmp_path / "made" / command.WEIGHTS).read_bytes() == first


def test_other_scenes_of_the_world_are_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many scenes, of another radius."""
    small = replace(SETTINGS, streets=1, measured_streets=1, steps=1, scenes=replace(SETTINGS.scenes, drives=5, ends=2))
    monkeypatch.setattr(command, "WORLD", small)
    command.main([str(tmp_path)])
    monkeypatch.setattr(command, "WORLD", replace(small, scenes=replace(small.scenes, farthest=14.0)))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path)])
    assert "farthest" in capsys.readouterr().err
