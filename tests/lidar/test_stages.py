"""A LiDAR run from scans to report, with all four objectives; killed and gone on with; export; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyalign.core.cli import main
from polyalign.core.config import dump, load
from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.lidar import stages
from polyalign.modalities.lidar.checkpoints import open_completion, save_completion
from polyalign.modalities.lidar.complete import open_completer
from polyalign.modalities.lidar.config import LidarRecipe
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.training import SETTINGS, completion_use

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)
STEPS = 4
RECIPE = """
modality: lidar
seed: 3
run: {run}
model: {{base: {base}, device: cpu}}
data: {{streets: 1, scan_points: 24, max_range: 16, versions: 2}}
sampler: {{guidance: 1.0, copies: 2, voxel: 0.3, stochastic: false, batch_size: 3, postprocess: false}}
objective: {{name: distillation_dpo, courses: [1, 2], assistants: {{train: low_rank, rank: 2}}}}
train:
  steps: 4
  batch_size: 2
  micro_batch_size: 2
  save_every: 1
  keep_checkpoints: 4
  optimizer: {{learning_rate: 1.0e-3}}
  threads: 1
arms:
  score: {{name: score_distillation, courses: [1]}}
  dpo: {{name: diffusion_dpo, samples_per_scan: 2, steps: 1}}
  lidiff: {{name: lidiff}}
evaluate: {{steps: [1, 2], streets: 1, truth_points: 200, shown: 1}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("lidar")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_completion(folder / "base.safetensors", MinkUNetDiff(NARROW), MinkGlobalEnc(NARROW))
    (folder / "recipe.yaml").write_text(RECIPE.format(run=folder / "run", base=folder / "base.safetensors"))
    assert main(["align", str(folder / "recipe.yaml")]) == 0
    return folder


def recipe_of(place: Path, *changes: str) -> LidarRecipe:
    return load(place / "recipe.yaml", list(changes), LidarRecipe)[0]


def unfinished(run: Path, stage: str) -> None:
    """As a kill leaves the ledger."""
    ledger = json.loads((run / "stages.json").read_text())
    ledger[stage]["finished"] = False
    (run / "stages.json").write_text(json.dumps(ledger))


def figures(path: Path) -> list[dict[str, Any]]:
    changing = ("seconds", "peak_memory", "cpu", "gpu", "rss")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(changing)} for row in rows]


def test_every_objective_leaves_weights_that_differ_from_the_base(place: Path) -> None:
    base = open_completion(place / "base.safetensors")
    folders = [place / "run" / "adapter", *(place / "run" / "arms" / name / "adapter" for name in ("score", "dpo", "lidiff"))]
    seen = set()
    for folder in folders:
        found = open_completion(folder / "completion.safetensors")
        weights, before = found.denoiser.state_dict(), base.denoiser.state_dict()
        assert any(not torch.equal(weights[name], before[name]) for name in weights), folder
        encoder = all(torch.equal(value, base.encoder.state_dict()[name]) for name, value in found.encoder.state_dict().items())
        assert encoder == ("lidiff" not in str(folder)), "only a teacher's training moves the encoder"
        seen.add((folder / "completion.safetensors").read_bytes())
    assert len(seen) == len(folders)


def test_pairs_of_the_arm_are_clouds_in_order_of_distance(place: Path) -> None:
    store = PairStore(place / "run" / "arms" / "dpo" / "pairs", "cloud")
    assert store.validate() == len(store) > 0
    row = store.rows([0])[0]
    assert row["chosen"].shape == (48, 3) and row["chosen"].dtype == np.float32
    assert row["chosen_scores"]["distance"] > row["rejected_scores"]["distance"]
    assert row["condition"]["prompt"].startswith("train-0000-")


def test_the_evaluation_compares_all_on_the_same_scans(place: Path) -> None:
    found = json.loads((place / "run" / "evaluation.json").read_text())
    block = found["completions"]
    assert set(block["means"]) == {"base", "aligned", "score", "dpo", "lidiff"} and block["steps"] == [1, 2]
    assert block["labels"]["base"] == "teacher" and block["labels"]["aligned"] == "student"
    assert [(one["before"], one["after"]) for one in block["changes"]][0] == ("base", "aligned")
    rows = [json.loads(line) for line in (place / "run/samples/rows/aligned-1.jsonl").read_text().splitlines()]
    assert len(rows) == block["scans"] == len(found["items"])
    change = block["changes"][0]["steps"]["1"]["cd"]
    assert change["after"] == pytest.approx(np.mean([row["cd"] for row in rows]))
    assert change["ratio"] == pytest.approx(change["after"] / change["before"])
    assert -found["items"][0]["aligned_score"] == rows[0]["cd"]
    assert found["win_rate"]["wins"] + found["win_rate"]["losses"] + found["win_rate"]["ties"] == len(rows)


def test_the_report_shows_clouds_and_asks_the_network_for_nothing(place: Path) -> None:
    page = (place / "run" / "report.html").read_text()
    assert page.count("<canvas") == 9  # input, five models in one step, base and aligned in two, ground truth
    for said in ("Distances by steps", "Chamfer distance, m", "ground truth", "score against teacher", "official", "held out"):
        assert said in page, said
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    state = json.loads((place / "run" / "report.json").read_text())["verdict"]
    assert "of the teacher's" in state["sentence"] and "picture" not in state["sentence"]


def test_a_killed_training_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    for stage, folder in (("train", ""), ("train lidiff", "arms/lidiff/"), ("train dpo", "arms/dpo/")):
        run = tmp_path / stage.replace(" ", "-")
        shutil.copytree(place / "run", run)
        shutil.rmtree(run / folder / "adapter")
        for step in range(3, STEPS + 1):
            shutil.rmtree(run / folder / "checkpoints" / f"step-{step:06d}")
        unfinished(run, stage)
        stages.train(recipe_of(place, f"run={run}"), RunFolder(run))
        again, before = (root / folder / "adapter" / "completion.safetensors" for root in (run, place / "run"))
        assert again.read_bytes() == before.read_bytes(), stage
        assert figures(run / folder / "metrics.jsonl") == figures(place / "run" / folder / "metrics.jsonl"), stage


def test_a_killed_evaluation_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    rows = run / "samples" / "rows" / "aligned-2.jsonl"
    rows.write_text(rows.read_text()[: len(rows.read_text()) // 2])
    (run / "samples" / "rows" / "score-2.jsonl").unlink()
    os.remove(run / "evaluation.json")
    unfinished(run, "evaluate")
    stages.evaluate(recipe_of(place, f"run={run}"), RunFolder(run))
    for name in ("evaluation.json", "samples/rows/aligned-2.jsonl", "samples/rows/score-2.jsonl"):
        assert (run / name).read_bytes() == (place / "run" / name).read_bytes(), name


def test_nothing_is_done_twice_and_a_changed_key_is_noticed(place: Path) -> None:
    def status(*changes: str) -> dict[str, str]:
        plan = RunFolder(place / "run", planning=True)
        recipe = recipe_of(place, *changes)
        for verb in ("generate", "train", "evaluate"):
            getattr(stages, verb)(recipe, plan)
        return {name: stage.status for name, stage in plan.planned.items()}

    assert set(status().values()) == {"done"}
    assert set(status("train.log_every=1", "model.device=cpu").values()) == {"done"}
    changed = status("objective.loser_weight=0.4")
    assert changed["train"] == "stale" and changed["train score"] == "done" and changed["evaluate"] == "stale"
    assert status("data.streets=2")["generate"] == "stale"
    assert status("sampler.guidance=2.0")["train"] == "done"


def test_the_export_opens_as_published_and_completes(place: Path, tmp_path: Path) -> None:
    assert main(["export", str(place / "recipe.yaml"), "--to", str(tmp_path / "out")]) == 0
    published = open_completion(tmp_path / "out" / "completion.ckpt")
    assert published.layout == "distilled" and not published.unused
    ours = open_completion(tmp_path / "out" / "completion.safetensors")
    for name, value in ours.denoiser.state_dict().items():
        assert torch.equal(value, published.denoiser.state_dict()[name])
    completer = open_completer(str(tmp_path / "out"))
    assert (completer.steps, completer.sampler.voxel, completer.data.scan_points) == (2, 0.3, 24)
    with pytest.raises(UserError, match="exists already"):
        stages.export(recipe_of(place), RunFolder(place / "run"), tmp_path / "out")
    with pytest.raises(UserError, match="not trained with this recipe"):
        stages.export(recipe_of(place, "train.steps=9"), RunFolder(place / "run"), tmp_path / "other")


def test_an_export_completes_as_the_recipe_says_now(place: Path, tmp_path: Path) -> None:
    """What the training does not depend on changes without a new one; the run folder, which is hashed, stays as it was."""
    own = (place / "run" / "adapter" / SETTINGS).read_bytes()
    stages.export(recipe_of(place), RunFolder(place / "run"), tmp_path / "same")
    assert (tmp_path / "same" / SETTINGS).read_bytes() == own
    changed = recipe_of(place, "sampler.student_guidance=2.5", "sampler.postprocess=true", "sampler.batch_size=5")
    stages.export(changed, RunFolder(place / "run"), tmp_path / "changed")
    sampler = open_completer(str(tmp_path / "changed")).sampler
    assert (sampler.guidance, sampler.postprocess, sampler.batch_size) == (2.5, True, 5)
    for name in ("completion.safetensors", "README.md"):
        assert (tmp_path / "changed" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert (place / "run" / "adapter" / SETTINGS).read_bytes() == own


def test_what_a_teachers_training_does_not_know_is_said_by_the_recipe(place: Path) -> None:
    recipe = recipe_of(place, "sampler.guidance=4.0", "evaluate.steps=[3, 6]")
    said = json.loads(completion_use(recipe, recipe.arms["lidiff"]))
    assert said["steps"] == 6 and said["sampler"]["guidance"] == 4.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.base=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["model.base=new"], "begins from a trained base"),
        (["sampler.coarser=[[500, 0.4]]"], "one voxel size"),
        (["train.reference.seat=adapter_off"], "knows no sparse convolution"),
        (["train.micro_batch_size=1"], "arms.lidiff: lidiff couples"),
        (["data.source=kitti_360", "data.folder=.", "evaluate.sequences=['00']"], "both have 00"),
        (["data.source=semantic_kitti", "data.folder=nowhere"], "no folder nowhere"),
        (["objective.courses=[2000]"], "do not fit below level 1000"),
        (["sampler.start=300", "evaluate.steps=[400]", "evaluate.shown=0"], "400 steps do not fit below level 300"),
        (["evaluate.refinement=nowhere.ckpt"], "nowhere.ckpt"),
        (["arms={one: {name: diffusion_dpo, preference: {name: tdpo2}}}"], "arms.one.preference"),
    ],
)
def test_contradictions_are_refused_before_any_work(place: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        stages.generate(recipe_of(place, *changes), RunFolder(place / "nothing", planning=True))


def test_wrong_keys_are_refused_by_name(place: Path) -> None:
    for change, said in (
        ("objective.loser=1", "objective.loser"),
        ("preference.metrics={chamfer: 1.0}", "preference.metrics"),
        ("preference.metrics={}", "at least one metric"),
        ("data.folder=here", "the world 'streets' has none"),
        ("evaluate.steps=[0]", "evaluate.steps"),
    ):
        with pytest.raises(UserError, match=said):
            recipe_of(place, change)


def test_a_recipe_survives_being_written_out(place: Path, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(dump(recipe_of(place)))
    assert load(tmp_path / "again.yaml", [], LidarRecipe)[0] == recipe_of(place)
