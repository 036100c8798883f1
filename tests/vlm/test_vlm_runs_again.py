"""What a vision-language run depends on besides its recipe, and what it keeps apart: files that others name, questions asked in
two forms, references of several objectives, stores with pictures and without."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from vlm_runs import recipe, run

from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import ANSWER_SOURCES, TEXT_SOURCES, import_format
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.visual_prompts import load_visual_prompts, named_pictures
from polyalign.modalities.held_out import evaluation_conditions
from polyalign.modalities.vlm import stages
from polyalign.modalities.vlm.config import EvaluateConfig, VlmRecipe
from polyalign.modalities.vlm.training import conditions_of

JUDGES = [{"name": "scenes"}]


@pytest.fixture
def data(tmp_path):
    """A folder of two pictures, and a row about each in the two splits of ``data``."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, split in enumerate(("train", "test")):
        Image.new("RGB", (20, 10), (90 * number, 9, 9)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "prompt": "<image>\nWhat is it?", "chosen": "red", "rejected": "blue"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def rows(path, **more):
    return recipe(pairs={"source": "rows", "path": str(path), **more}, evaluate={"judges": JUDGES})


@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_picture_under_the_same_name_makes_pairs_anew(data, tmp_path, capsys, elsewhere):
    path, options = data, {"split": "train"}
    if elsewhere:
        path, options = tmp_path / "elsewhere" / "rows.jsonl", {"pictures": str(data)}
        path.parent.mkdir()
        path.write_bytes((data / "train.jsonl").read_bytes())
    asked = rows(path, options=options)
    assert run(tmp_path, "generate", asked) == 0
    assert run(tmp_path, "generate", asked) == 0
    assert "generate: done already" in capsys.readouterr().err
    Image.new("RGB", (20, 10), "green").save(data / "0.png")
    assert run(tmp_path, "generate", asked) == 0
    assert "generate: begins anew" in capsys.readouterr().err


def test_pictures_that_questions_name_are_inputs(data):
    file = data / "q.jsonl"
    lines = [{"images": ["0.png", "1.png"], "prompt": "Which?"}, {"image": "../out.png", "prompt": "What?"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    assert named_pictures(file) == [data / "0.png", data / "1.png"]


def test_pictures_of_llava_questions_are_inputs(data):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    given = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(2)]
    (data / "llava.json").write_text(json.dumps(given))
    pairs = {"source": "multi_image", "multi_image": {"questions": str(data / "llava.json"), "formats": {"sequence": {2: 1}}}}
    asked = VlmRecipe.model_validate(recipe(pairs=pairs))
    before = stages._pictures_of(asked)
    assert before == stages._pictures_of(asked) and before
    Image.effect_noise((20, 10), 40).save(data / "1.png")
    assert stages._pictures_of(asked) != before


def test_a_question_is_the_same_with_and_without_a_marked_place(data, tmp_path):
    store = PairStore(tmp_path / "pairs", "text", pictured=True)
    import_format("rows", data / "train.jsonl", store, formats=ANSWER_SOURCES)
    (data / "q.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "What is it?"}) + "\n")
    assert len(load_visual_prompts(data / "q.jsonl")) == 1
    evaluate = EvaluateConfig.model_validate({"prompts": {"file": str(data / "q.jsonl")}, "judges": JUDGES})
    with pytest.raises(UserError, match="are also prompts of the pairs"):
        evaluation_conditions(evaluate, 0, store, conditions_of)
    (data / "q.jsonl").write_text(json.dumps({"image": "1.png", "prompt": "What is it?"}) + "\n")
    assert len(evaluation_conditions(evaluate, 0, store, conditions_of)) == 1  # of another picture


def test_a_store_of_texts_takes_no_pairs_about_pictures(data, tmp_path):
    store = PairStore(tmp_path / "pairs", "text", pictured=True)
    import_format("rows", data / "train.jsonl", store, formats=ANSWER_SOURCES)
    with pytest.raises(UserError, match="answers about pictures.*modality: vlm"):
        import_format("store", store.folder, PairStore(tmp_path / "texts", "text"), formats=TEXT_SOURCES)
    copy = PairStore(tmp_path / "copy")
    import_format("store", store.folder, copy, formats=TEXT_SOURCES)
    assert copy.conditions() == store.conditions()


@pytest.mark.parametrize("name", ["base", "aligned"])
def test_an_arm_is_not_called_as_the_models_it_stands_beside(name):
    with pytest.raises(ValueError, match=f"'{name}' is what evaluations call the {name} model"):
        VlmRecipe.model_validate(recipe(arms={name: {"name": "sft"}}))


def test_arms_of_other_candidates_have_references_of_their_own(tmp_path, capsys):
    negatives = {"image": {"kind": "blanked"}, "context": True}
    asked = recipe(objective={"name": "mcm_dpo"}, arms={"dpo": {"name": "dpo"}})
    asked["pairs"] = {**asked["pairs"], "negatives": negatives}
    asked["train"] = {**asked["train"], "steps": 1, "reference": {"seat": "cached"}}
    assert run(tmp_path, "generate", asked) == 0
    assert run(tmp_path, "train", asked) == 0
    first = json.loads((tmp_path / "run" / "arms" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # An answer that no model can have said has no picture of where it looked; the others' stay.
    finished = VlmRecipe.model_validate(asked)
    conditions = conditions_of(finished.evaluate.prompts, 0)[-2:]
    shown = finished.model_copy(update={"evaluate": finished.evaluate.model_copy(update={"attention": 2})})
    outputs = {"base": ["red", "<image>"], "aligned": ["red", "blue"]}
    capsys.readouterr()
    stages.write_attention(shown, RunFolder(tmp_path / "run"), outputs, conditions)
    assert "1 of 2 questions have no picture" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run" / "samples" / "attention").iterdir()] == ["00000.json"]
