"""The report's words and clouds of completed scans, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.evaluation.diagnose.diagnosis import diagnose
from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.completions import judged, readings


def change(before: float, after: float, spread: float) -> dict[str, Any]:
    by = after - before
    ratio = after / before if before else None
    return {
        "before": before,
        "after": after,
        "difference": by,
        "difference_interval": [by - spread, by + spread],
        "ratio": ratio,
        "ratio_interval": None if ratio is None else [ratio - 0.05, ratio + 0.05],
    }


def evaluation(files: list[str]) -> dict[str, Any]:
    mean = {name: {"mean": 0.5, "interval": [0.4, 0.6]} for name in ("cd", "jsd_bev", "jsd_3d", "f1")}
    changes = {"cd": change(1.0, 0.5, 0.1), "jsd_bev": change(0.5, 0.51, 0.1), "jsd_3d": change(0.5, 0.7, 0.1)}
    rate = {"wins": 9, "losses": 1, "ties": 0, "rate": 0.9, "wilson": [0.6, 0.98], "rate_with_ties": 0.9}
    rate |= {"bootstrap": [0.7, 1.0], "sign_test_p": 0.02}
    return {
        "judge": {"name": "chamfer distance", "version": "1", "parts": ["chamfer distance"]},
        "prompts": 10,
        "win_rate": rate,
        "scores": {side: {"mean": -0.5, "interval": [-0.6, -0.4]} for side in ("base", "aligned")},
        "items": [{"prompt": "street", "seed": 1, "base_score": -1.0, "aligned_score": -0.5}],
        "completions": {
            "scans": 10,
            "places": 3,
            "steps": [1],
            "labels": {"base": "teacher", "aligned": "student"},
            "means": {name: {"1": mean} for name in ("base", "aligned")},
            "changes": [{"before": "base", "after": "aligned", "steps": {"1": changes | {"f1": change(0.0, 0.0, 0.0)}}}],
        },
        "clouds": [{"name": "street", "views": [{"label": name, "file": name, "remark": ""} for name in files]}],
    }


def test_what_counts_as_better() -> None:
    assert judged("cd", change(1.0, 0.5, 0.1)) == "better" and judged("cd", change(0.5, 1.0, 0.1)) == "worse"
    assert judged("f1", change(0.5, 1.0, 0.1)) == "better" and judged("cd", change(0.5, 0.51, 0.1)) == "even"


def test_the_page_says_what_changed_and_opens_only_clouds_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    np.save(run / "samples" / "whole.npy", np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32))
    np.save(run / "samples" / "nan.npy", np.full((3, 3), np.nan))
    np.save(tmp_path / "secret.npy", np.ones((3, 3)))
    np.save(run / "samples" / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (run / "samples" / "cut.npy").write_bytes(b"\x93NUMPY")
    files = [f"samples/{name}.npy" for name in ("whole", "nan", "objects", "cut", "absent")] + ["samples/../../secret.npy"]
    found = evaluation(files)
    (run / "evaluation.json").write_text(json.dumps(found))
    (run / "config.yaml").write_text("modality: lidar\n")
    page = write_report(run).read_text()
    assert page.count("<canvas") == 1 and "Missing or unreadable" in page and "secret.npy" in page
    assert "student against teacher, in 1 step: its Chamfer distance is 50 % [45, 55], better" in page
    assert "JSD from above is 102 % [97, 107], even" in page
    verdict = json.loads((run / "report.json").read_text())["verdict"]
    assert verdict["state"] == "improved"
    assert "of the student is 50 % of the teacher's (45 to 55 %)" in verdict["sentence"]
    assert readings(found["completions"])[0].startswith("student against teacher")


def test_an_evaluation_cut_short_is_named(tmp_path: Path) -> None:
    found = evaluation([])
    del found["completions"]["changes"][0]["steps"]["1"]["cd"]["difference"]
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    (tmp_path / "config.yaml").write_text("modality: lidar\n")
    assert "completions.changes.0.steps.1.cd.difference" in write_report(tmp_path).read_text()


def test_a_diagnosis_asks_only_what_completions_can_answer(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation([])))
    (tmp_path / "config.yaml").write_text("modality: lidar\n")
    found = diagnose(tmp_path)
    assert found.state == "improved" and "scans" in found.sentence
    assert [finding.cause for finding in found.asked] == ["not a number", "learnt, yet worse"]
    assert not any(part.startswith("pairs/") for part in found.missing)
