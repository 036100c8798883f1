"""Every recipe that is shipped loads, and what it leaves unsaid is said in its own words when it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from polyalign.core.config import dump, load, packaged
from polyalign.core.errors import UserError
from polyalign.core.objectives.table import build
from polyalign.core.verbs import MODALITIES, modality_module
from polyalign.evaluation.judges import names

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for modality in MODALITIES for path in (ROOT / "configs" / modality).glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_are_recipes_and_all_of_them_are_packaged() -> None:
    assert {"image/quickstart", "image/sdxl_lora"} <= {name(path) for path in RECIPES} <= set(packaged())


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    module = modality_module(path.parent.name)
    recipe, provenance = load(path, [], module.SCHEMA)
    assert recipe.modality == path.parent.name
    assert "{seed}" in recipe.run, "two seeds would share a run folder"
    assert path in provenance.files
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what the recipe is for"
    assert build(recipe.objective).seats
    assert {judge.name for judge in (*recipe.pairs.judges, *recipe.evaluate.judges)} <= set(names())
    assert recipe.train.batch_size % recipe.train.micro_batch_size == 0


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_survives_being_written_out(path: Path, tmp_path: Path) -> None:
    """config.yaml of a run is the whole recipe: loaded again it is the same."""
    schema = modality_module(path.parent.name).SCHEMA
    recipe, _ = load(path, ["seed=5"], schema)
    (tmp_path / "config.yaml").write_text(dump(recipe), encoding="utf-8")
    again, _ = load(tmp_path / "config.yaml", [], schema)
    assert again == recipe and again.seed == 5


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_misspelt_key_is_refused_in_every_recipe(path: Path) -> None:
    with pytest.raises(UserError, match="train.batchsize"):
        load(path, ["train.batchsize=4"], modality_module(path.parent.name).SCHEMA)


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_accelerate_files_load(path: Path) -> None:
    """As ``accelerate launch --config_file`` reads them; precision is the recipe's business, so none is set there."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision in (None, "no")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["compute_environment"] == "LOCAL_MACHINE" and isinstance(written["num_processes"], int)


def test_there_is_a_launcher_for_each_way_to_train() -> None:
    assert {"cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3"} <= {path.stem for path in LAUNCHERS}
