"""Network judges in a whole run on a tiny base: named in the recipe, recorded with the hashes of their weights, and noticed
when other weights lie under the same name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from polyalign.core.config import load
from polyalign.core.references import AdapterOff
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.evaluation import judges
from polyalign.evaluation.implicit_reward import implicit_reward_accuracy
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.training import open_trained

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "image")]

from image_judge_models import save_clip  # noqa: E402  # pyright: ignore[reportMissingImports]
from image_runs import polyalign, recipe, save_base, write_recipe  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run that PickScore's layout decided, and that two judges evaluated which training never saw."""
    root = tmp_path_factory.mktemp("judged")
    for seed, name in enumerate(("scorer", "other")):
        save_clip(root / name, seed)
    content = recipe(save_base(root / "base"))
    scorer, other = ({"name": "pickscore", "options": {"model": str(root / name)}} for name in ("scorer", "other"))
    content["pairs"]["judges"] = [scorer]
    parts = [{**other, "mean": 20.0, "deviation": 2.0}, {"name": "saturation", "weight": -0.5}]
    content["evaluate"]["judges"] = [
        scorer,
        {"name": "clip_score", "options": {"model": str(root / "other"), "label": "held out"}},
        {"name": "mixture", "options": {"judges": parts, "label": "mixed"}},
    ]
    content["evaluate"]["seeds_per_prompt"] = 2
    write_recipe(root, content)
    assert polyalign("align", root / "recipe.yaml", root / "run") == 0
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_pairs_and_evaluation_record_the_weights(place):
    run = place / "run"
    version = judges.build(judge_of(place, "scorer")).version
    assert version.startswith("1 scorer@sha256:")
    assert read(run / "pairs" / "summary.json")["judge"] == {"name": "pickscore", "version": version}
    (row,) = PairStore(run / "pairs").rows([0])
    assert row["provenance"]["judges"] == {"pickscore": {"version": version}}
    assert row["chosen_scores"]["pickscore"] > row["rejected_scores"]["pickscore"]
    evaluation = read(run / "evaluation.json")
    assert evaluation["judge"]["version"] == version
    assert set(evaluation["other_judges"]) == {"held out", "mixed"}
    assert "other@sha256:" in evaluation["other_judges"]["held out"]["version"]
    assert "other@sha256:" in evaluation["other_judges"]["mixed"]["version"]
    assert evaluation["other_judges"]["mixed"]["parts"] == ["pickscore", "saturation"]
    assert str(place) not in json.dumps(evaluation)


def test_several_seeds_of_a_prompt_give_a_diversity(place):
    found = read(place / "run" / "evaluation.json")["diversity"]
    assert found["prompts"] == 4 and found["base"] > 0 and found["interval"][0] <= found["change"] <= found["interval"][1]


def judge_of(place: Path, name: str) -> Any:
    from polyalign.core.recipe import JudgeConfig

    return JudgeConfig(name="pickscore", options={"model": str(place / name)})


def test_the_implicit_reward_of_the_run(place):
    """Policy equal to reference is half right exactly; the trained adapter is judged by the same call."""
    settings, _ = load(place / "recipe.yaml", [], ImageRecipe)
    run = RunFolder(place / "run")
    rows = PairStore(run / "pairs").rows(range(6))
    adapter, model = open_trained(settings, run, run / "adapter")
    found = implicit_reward_accuracy(adapter, model, AdapterOff(model.network), rows, draws=3)
    assert found["pairs"] == 6 and 0 <= found["accuracy"] <= 1 and found["mean_margin"] != 0
    adapter, model = open_trained(settings, run, None)
    fresh = adapter.trainable(model)
    untrained = implicit_reward_accuracy(adapter, fresh, AdapterOff(fresh.network), rows, draws=3)
    assert untrained["accuracy"] == 0.5 and untrained["mean_margin"] == 0.0


def test_other_weights_under_the_same_name_are_another_judge(place):
    """Last, since it changes a folder of the run: the evaluation of before is no longer that of the recipe."""
    run = place / "run"
    before = read(run / "evaluation.json")["other_judges"]["held out"]["version"]
    assert polyalign("evaluate", place / "recipe.yaml", run) == 0
    assert read(run / "evaluation.json")["other_judges"]["held out"]["version"] == before
    save_clip(place / "other", seed=5)
    assert polyalign("evaluate", place / "recipe.yaml", run) == 0
    assert read(run / "evaluation.json")["other_judges"]["held out"]["version"] != before


COMPARING = {"name": "http", "weight": -1, "options": {"url": "http://127.0.0.1:1/v1", "model": "m", "mode": "pairwise"}}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([{"name": "pickscore", "options": {"model": "/nowhere"}}], "there is no such file or folder"),
        ([{"name": "saturation"}, {"name": "saturation"}], "two judges of the evaluation are called"),
        ([COMPARING], "compares outputs of one prompt"),
        ([{"name": "mixture", "options": {"judges": [COMPARING]}}], "compares outputs of one prompt"),
    ],
)
def test_a_wrong_judge_is_refused_before_anything_is_sampled(place, tmp_path, capsys, wrong, said):
    content = recipe(place / "base")
    content["evaluate"]["judges"] = wrong
    write_recipe(tmp_path, content)
    assert polyalign("align", tmp_path / "recipe.yaml", tmp_path / "run") != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "pairs").exists()
