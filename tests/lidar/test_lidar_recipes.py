"""Every LiDAR recipe that is shipped loads, says what it is for, and can be changed as its comments say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from polyalign.core.cli import main
from polyalign.core.config import dump, load, packaged
from polyalign.core.errors import UserError
from polyalign.core.verbs import modality_module
from polyalign.datasets.lidar.layouts import TRAINING_SEQUENCES
from polyalign.modalities.lidar.config import DistillationDPO, LidarRecipe
from polyalign.modalities.lidar.training import completion_settings, distance_mix, distillation_settings

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "lidar"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_the_modality_is_known_and_its_recipes_are_packaged() -> None:
    assert modality_module("lidar").SCHEMA is LidarRecipe
    assert {f"lidar/{path.stem}" for path in RECIPES} <= set(packaged())
    assert {"quickstart", "distillation_dpo", "score_distillation", "lidiff", "diffusion_dpo"} == {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_survives_being_written_out_and_refuses_misspelt_keys(path: Path, tmp_path: Path) -> None:
    recipe, _ = load(path, ["seed=5"], LidarRecipe)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "{seed}" in recipe.run
    assert path.stem == "quickstart" or "Not run at full size by us." in text and "[ours]" in text
    assert recipe.train.batch_size % recipe.train.micro_batch_size == 0
    (tmp_path / "config.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(tmp_path / "config.yaml", [], LidarRecipe)[0] == recipe
    with pytest.raises(UserError, match="train.batchsize"):
        load(path, ["train.batchsize=4"], LidarRecipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_its_comments_load(path: Path) -> None:
    commands = [shlex.split(line) for line in re.findall(r"#\s+polyalign align ([^\n(]+)", path.read_text(encoding="utf-8"))]
    assert [f"configs/lidar/{path.name}"] in [command[:1] for command in commands]
    for name, *changes in commands:
        load(FOLDER.parents[1] / name, changes, LidarRecipe)


def test_what_a_recipe_says_reaches_the_algorithm() -> None:
    recipe, _ = load("lidar/quickstart", ["preference.metrics={cd: 1.0, jsd: 0.5}", "preference.margin=0.01"], LidarRecipe)
    assert isinstance(recipe.objective, DistillationDPO)
    settings = distillation_settings(recipe, recipe.objective)
    assert settings.preference and settings.margin == 0.01 and settings.mix.weights == {"cd": 1.0, "jsd": 0.5}
    assert settings.courses == recipe.objective.courses and settings.assistant_rank is None
    assert settings.completion.voxel == recipe.sampler.voxel and settings.completion.guidance == recipe.objective.guidance
    assert distance_mix(recipe) == settings.mix and settings.mix.max_range == 50.0
    solver = completion_settings(recipe, 8, 2.0).solver
    assert (solver.steps, solver.stochastic, solver.start) == (8, False, 1000)
    score = distillation_settings(recipe, recipe.arms["score_distillation"])  # type: ignore[arg-type]
    assert not score.preference and score.courses == settings.courses


def test_preferences_see_as_far_as_the_evaluation() -> None:
    recipe, _ = load("lidar/quickstart", ["data.max_range=80"], LidarRecipe)
    assert isinstance(recipe.objective, DistillationDPO)
    assert distance_mix(recipe).max_range == distillation_settings(recipe, recipe.objective).mix.max_range == 80.0


def test_a_teacher_is_trained_for_as_many_epochs_as_there_are_versions() -> None:
    """SemanticKITTI has 23,201 scans in drives 00 to 10, of which 4,071 are drive 08, which is held out."""
    recipe, _ = load("lidar/lidiff", [], LidarRecipe)
    assert recipe.data.sequences == TRAINING_SEQUENCES and "08" not in TRAINING_SEQUENCES
    assert recipe.train.steps * recipe.train.batch_size == recipe.data.versions * (23_201 - 4_071)


@pytest.mark.parametrize("name", ["distillation_dpo", "score_distillation", "lidiff", "diffusion_dpo"])
def test_objectives_outside_the_table_are_explained_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ") and "in recipes of modality lidar" in said and "objective." in said
