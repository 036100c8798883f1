"""Both students of one teacher, from scenes to the page; what is compared, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from polyalign.modalities.lidar import distil, pretrain
from polyalign.modalities.lidar.checkpoints import save_completion
from polyalign.modalities.lidar.measuring import compared, qualities
from polyalign.modalities.lidar.scenes import Scene, SceneSettings

torch.set_num_threads(1)
SCENES = SceneSettings(scan_points=40, copies=2, drives=5, ends=2, every=2)


def scene(name: str) -> Scene:
    draws = np.random.default_rng(int(name[-1]))
    return Scene(name, *(draws.uniform(-3, 3, (count, 3)).astype(np.float32) for count in (20, 500)))


def test_students_are_trained_measured_and_shown(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    networks = pretrain.Networks(0.125)
    save_completion(base / pretrain.WEIGHTS, networks.denoiser, networks.encoder)
    (base / "base.json").write_text('{"sha256": "of the test"}')
    settings = distil.Settings(
        steps=2, batch=1, streets=1, measured_streets=1, shown=1, courses=(1,), evaluated=(1,), scenes=SCENES
    )
    record = distil.distil(base, tmp_path / "out", settings)
    assert set(record["compared"]) == {
        "distillation_dpo against teacher",
        "score_distillation against teacher",
        "distillation_dpo against score_distillation",
    }
    written = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert set(written["rows"]) == {"teacher", "distillation_dpo", "score_distillation"}
    assert written["compared"]["distillation_dpo against teacher"]["1"]["cd"]["ratio"] > 0
    page = (tmp_path / "out" / "clouds.html").read_text()
    assert page.count("<canvas") == 5 and "ground truth" in page
    weights = [(tmp_path / "out" / "students" / name / pretrain.WEIGHTS).read_bytes() for name in distil.OBJECTIVES]
    again = distil.distil(base, tmp_path / "out", settings)  # nothing is trained twice
    assert again["compared"] == record["compared"]
    assert weights == [(tmp_path / "out" / "students" / name / pretrain.WEIGHTS).read_bytes() for name in distil.OBJECTIVES]


def test_a_comparison() -> None:
    given = [scene(f"heldout-000{street}-0{order}") for street in (0, 1) for order in (2, 4)]
    before = [{"cd": 2.0, "jsd": 0.6}] * 4
    after = [{"cd": 1.0, "jsd": 0.6}] * 4
    found = compared(before, after, given, 0)
    assert found["cd"]["ratio"] == 0.5 and found["cd"]["difference"] == -1.0
    assert found["cd"]["ratio_interval"] == pytest.approx([0.5, 0.5])
    assert found["jsd"]["difference_interval"] == [0.0, 0.0]


def test_a_scene_itself_is_nearest_to_its_ground_truth() -> None:
    one = scene("heldout-0000-02")
    near, far = qualities([one.surroundings.astype(np.float64), one.surroundings + 1.0], [one, one], 0)
    assert near["cd"] == 0.0 and near["jsd"] < far["jsd"] and far["cd"] > 0.2
