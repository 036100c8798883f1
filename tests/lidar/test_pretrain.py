"""The training of the embedded base: scenes, a killed run that goes on to the same weights, the record and the gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.modalities.lidar import pretrain as base
from polyalign.modalities.lidar.checkpoints import open_completion
from polyalign.modalities.lidar.layers import SparseBatchNorm
from polyalign.modalities.lidar.scenes import Scene, SceneSettings, scenes

torch.set_num_threads(1)
SCENES = SceneSettings(scan_points=60, copies=2, drives=5, ends=2, every=2)
SETTINGS = base.Settings(
    steps=4, batch=2, width=0.125, streets=1, measured_streets=1, save_every=2, scenes=SCENES, frozen_from=0.5
)


@pytest.fixture(scope="module")
def given() -> list[Scene]:
    return scenes("train", [0, 1], SCENES)


def test_scenes_are_cut_from_streets(given: list[Scene]) -> None:
    assert [scene.name for scene in given] == ["train-0000-02", "train-0001-02"]
    for scene in given:
        assert scene.scan.shape == (60, 3) and len(scene.surroundings) > 500
        reach = [np.linalg.norm(cloud, axis=1).max() for cloud in (scene.scan, scene.surroundings)]
        assert max(reach) < SCENES.farthest + 1e-3
        nearest = np.linalg.norm(scene.scan[:, None] - scene.surroundings[None], axis=2).min(axis=1)
        assert nearest.max() < 0.2  # the scan's static points are in the map, but for its voxels of 0.1 m


def test_a_batch_is_its_step(given: list[Scene]) -> None:
    first, again, other = (base.draw(given, SETTINGS, step) for step in (3, 3, 4))
    assert torch.equal(first.full, again.full) and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.full, other.full)
    assert first.levels[0] < 500 <= first.levels[1]
    absent = base.draw(given, replace(SETTINGS, unconditional=1.0), 3)
    assert float(absent.scans.abs().max()) == 0 and float(absent.full.abs().max()) > 1


def test_a_killed_run_goes_on_to_the_same_weights(given: list[Scene], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killed(_: object) -> None:
        raise Killed

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = base.Training(given, SETTINGS, tmp_path / "whole")
    whole.run(lambda _: 0)
    with pytest.raises(Killed):
        base.Training(given, SETTINGS, tmp_path / "parts").run(killed)
    resumed = base.Training(given, SETTINGS, tmp_path / "parts")
    assert resumed.stage.start == 2
    resumed.run(lambda _: 0)
    found = resumed.networks.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in whole.networks.state_dict().items())
    assert all(module.frozen for module in whole.networks.modules() if isinstance(module, SparseBatchNorm))
    with pytest.raises(UserError, match="is of another run"):
        base.Training(given, replace(SETTINGS, rate=1e-4), tmp_path / "parts")


def test_a_base_is_written_with_its_record(tmp_path: Path) -> None:
    record = base.pretrain(tmp_path / "base", replace(SETTINGS, steps=2))
    opened = open_completion(tmp_path / "base" / base.WEIGHTS)
    assert opened.unused == () and opened.layout == "lidiff"
    assert json.loads((tmp_path / "base" / "base.json").read_text()) == json.loads(json.dumps(record))
    assert {"cd_input", "cd_1", "cd_2", "cd_8", "jsd_8"} <= set(record["figures"]) and record["bytes"] < base.SIZE_LIMIT


def test_the_gate() -> None:
    good = {"cd_input": 0.6, "cd_8": 0.4, "cd_1": 1.5}
    assert base.unfit(good) is None
    assert "does not complete" in str(base.unfit(good | {"cd_8": 0.58}))
    assert "nothing to distil" in str(base.unfit(good | {"cd_1": 0.45}))
