"""Whole runs of the vision-language modality from the command line, on the embedded base: every source of pairs, every method,
and bad input, of which each is named and nothing is lost."""

from __future__ import annotations

import json
import math
import re

import pytest
from PIL import Image
from safetensors.torch import load_file
from vlm_runs import MULTI_IMAGE, WORLD, recipe, run

from polyalign.core.errors import UserError
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import decode
from polyalign.modalities.held_out import split_pairs
from polyalign.modalities.vlm import stages
from polyalign.modalities.vlm.config import VlmRecipe

LORA = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with an arm beside it."""
    place = tmp_path_factory.mktemp("run")
    asked = recipe(arms={"sft": {"name": "sft"}})
    assert run(place, "align", asked) == 0
    return place, asked


def test_a_run_ends_with_an_evaluation_by_number_of_pictures(finished):
    place, _ = finished
    found = json.loads((place / "run" / "evaluation.json").read_text())
    assert found["judge"]["name"] == "scenes" and set(found["arms"]) == {"sft"}
    table = found["groups"]["Pictures"]
    assert set(table) == {"1 picture", "2 pictures, sequence", "all"}
    assert table["all"]["base"]["of"] == 8 == table["all"]["aligned"]["of"]
    assert {"difference", "low", "high"} <= set(table["all"]["sft"]["against_base"])
    lines = [json.loads(line) for line in (place / "run" / "samples" / "outputs.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all((place / "run" / name).is_file() for line in lines for name in line["images"])
    assert sum(len(line["images"]) for line in lines) == 4 * 1 + 4 * 2


def test_where_the_models_look_is_kept_for_the_report(finished):
    place, _ = finished
    (file,) = (place / "run" / "samples" / "attention").glob("*.json")
    models = json.loads(file.read_text())["models"]
    assert set(models) == {"base", "aligned"}
    maps = models["base"]["images"]
    assert len(maps) == 2
    total = sum(value for one in maps for row in one["map"] for value in row)
    assert 0 < total <= 1.001
    assert (place / "run" / "report.html").stat().st_size > 1000


def test_pairs_keep_their_pictures_and_say_what_was_dropped(finished):
    place, _ = finished
    store = PairStore(place / "run" / "pairs", "text")
    assert store.validate() == len(store) > 10
    row = store.rows([0])[0]
    assert decode(row["condition"]["images"][0]["bytes"]).size == (32, 32)
    assert row["chosen"] != row["rejected"]
    summary = json.loads((place / "run" / "pairs" / "summary.json").read_text())
    assert summary["questions"] == 20 and summary["pairs"] == len(store)
    assert {"mistakes", "balanced"} <= set(summary["audit"])


def test_the_first_step_is_that_of_equal_models(finished):
    place, _ = finished
    first = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0.0


def test_running_again_does_nothing(finished, capsys):
    place, asked = finished
    assert run(place, "align", asked) == 0
    assert capsys.readouterr().err.count("done already") == 4


def test_an_interrupted_generation_ends_with_the_same_bytes(finished, tmp_path):
    place, asked = finished
    assert run(tmp_path, "generate", asked) == 0
    made = tmp_path / "run" / "pairs"
    wanted = PairStore(place / "run" / "pairs").content_hash()
    assert PairStore(made).content_hash() == wanted
    (made / "pairs-00001.parquet").unlink()
    ledger = tmp_path / "run" / "stages.json"
    kept = json.loads(ledger.read_text())
    kept["generate"]["status"] = "started"
    ledger.write_text(json.dumps(kept))
    assert run(tmp_path, "generate", asked) == 0
    assert PairStore(made).content_hash() == wanted


def test_a_training_that_was_cut_ends_with_the_same_weights(finished, tmp_path):
    place, asked = finished
    short = {**asked, "arms": {}}
    assert run(tmp_path, "generate", short) == 0
    assert run(tmp_path, "train", {**short, "train": {**short["train"], "steps": 2, "schedule": {"name": "constant"}}}) == 0
    assert run(tmp_path / "whole", "generate", short) == 0
    both = {**short, "train": {**short["train"], "schedule": {"name": "constant"}}}
    assert run(tmp_path / "whole", "train", both) == 0
    assert run(tmp_path, "train", both) == 0
    ours, whole = (load_file(folder / "run" / "adapter" / LORA) for folder in (tmp_path, tmp_path / "whole"))
    assert ours.keys() == whole.keys() and all(ours[name].equal(whole[name]) for name in ours)


def single(**pairs):
    return {"prompts_per_shard": 8, "prompts": {**WORLD, "tasks": ["what", "alt"]}, **pairs}


METHODS = {
    "rdpo on Re-Align's pairs": (
        {"name": "rdpo"},
        single(source="re_align", re_align={"completion": "constrained"}),
        3,
    ),
    "mcm_dpo on sampled pairs": (
        {"name": "mcm_dpo"},
        single(
            source="generate",
            samples_per_prompt=6,
            judges=[{"name": "scenes"}],
            negatives={"image": {"kind": "diffused"}, "context": True},
        ),
        8,
    ),
    "mdpo on multi-image pairs": (
        {"name": "mdpo"},
        {**MULTI_IMAGE, "negatives": {"image": {"kind": "cropped", "area": 0.2}}},
        3,
    ),
    "chip on multi-image pairs": (
        {"name": "chip"},
        {**MULTI_IMAGE, "negatives": {"image": {"kind": "diffused", "step": 500}}},
        3,
    ),
    "branches that the recipe names": (
        {"name": "branches", "terms": {"response": 1.0, "image": 0.5, "context+image": 0.2}, "joint": True, "anchored": 0.5},
        {**MULTI_IMAGE, "negatives": {"image": {"kind": "blanked"}, "context": True}},
        4,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_on_its_pairs(tmp_path, name):
    objective, pairs, _ = METHODS[name]
    sampler = {"max_new_tokens": 40, "temperature": 1.0, "batch_size": 16}
    asked = recipe(objective=objective, pairs=pairs, sampler=sampler)
    assert run(tmp_path, "align", asked) == 0
    store = PairStore(tmp_path / "run" / "pairs", "text")
    assert store.validate() > 0
    row = store.rows([0])[0]
    assert row["rejected_images"] != row["condition"]["images"]
    context = (pairs.get("negatives") or {}).get("context", False)
    assert ("rejected_messages" in row) == context
    if context:
        assert row["rejected_messages"] != row["condition"]["messages"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0
    weights = load_file(tmp_path / "run" / "adapter" / LORA)
    assert any(bool(tensor.abs().sum() > 0) for key, tensor in weights.items() if "lora_B" in key)


def test_branches_follow_the_objective():
    from polyalign.modalities.vlm.training import settings_of

    for objective, pairs, count in METHODS.values():
        asked = VlmRecipe.model_validate(recipe(objective=objective, pairs=pairs))
        assert len(settings_of(asked).branches) == count
    named = VlmRecipe.model_validate(recipe(prepare={"branches": ["chosen", "image"]}))
    assert settings_of(named).branches == ("chosen", "image")
    terms = {"name": "branches", "terms": {"image+context": 1.0, "response": 0.5}}
    arm = VlmRecipe.model_validate(recipe(arms={"ours": terms}))
    assert settings_of(arm, objective=arm.arms["ours"]).branches == ("chosen", "context+image", "response")
    assert settings_of(arm).branches == ("chosen", "response")
    same = VlmRecipe.model_validate(recipe(objective=terms, prepare={"branches": ["chosen", "image+context", "response"]}))
    assert settings_of(same).branches == ("chosen", "context+image", "response")


ONLY_IMAGES = {**MULTI_IMAGE, "negatives": {"image": {}}}
NAMED = {"name": "branches", "terms": {"response": 1.0, "context": 0.5}}


# --- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"name": "rdpo"}}, "objective: rdpo compares chosen, response, image, .*pairs.negatives"),
        (
            {"objective": {"name": "mcm_dpo"}, "pairs": {**MULTI_IMAGE, "negatives": {"image": {}}}},
            "mcm_dpo compares .*context: true",
        ),
        ({"evaluate": {"judges": [{"name": "shapes"}]}}, "judges pictures, and these outputs are texts"),
        ({"pairs": {"source": "re_align"}}, "source 're_align' needs 'prompts'"),
        ({"pairs": {"source": "multi_image"}}, "needs 'multi_image'"),
        ({"pairs": {**MULTI_IMAGE, "negatives": {}}}, "nothing is to lose"),
        ({"sampler": {"max_new_tokens": 4000}}, "max_new_tokens is 4000.*positions"),
        ({"prepare": {"branches": ["chosen", "sound"]}}, "objective: the branch 'sound' is unknown"),
        ({"prepare": {"branches": ["chosen", "image"]}}, "objective: dpo compares chosen, image, .*makes the image that"),
        ({"objective": NAMED}, "branches compares chosen, .*makes the context .*such as {context: true}"),
        ({"objective": NAMED, "pairs": ONLY_IMAGES}, "makes the context that is to lose in them"),
        ({"arms": {"more": {"name": "branches"}}}, "arms.more: branches compares chosen, response, image, .*kind: diffused"),
        ({"objective": {"name": "branches", "terms": {"image+sound": 1.0}}}, "objective: the branch 'image.sound' is unknown"),
        ({"objective": {"name": "branches", "terms": {"image": -1.0}}}, "objective.terms.image: must be greater than 0"),
        ({"objective": NAMED, "prepare": {"branches": ["chosen", "response"]}}, "Leave prepare.branches out"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, capsys, changes, words):
    asked = recipe()
    for key, value in changes.items():
        asked[key] = {**asked[key], **value} if key == "evaluate" else value
    assert run(tmp_path, "align", asked) == 2
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "run" / "pairs").exists()


def preferences(folder, *rows):
    """Eight good rows of pictures that lie beside them, and more."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(8):
        Image.new("RGB", (32, 32), (30 * index, 60, 90)).save(folder / f"{index}.png")
        question = f"What colour is the {('square', 'circle')[index % 2]}?"
        lines.append({"image": f"{index}.png", "prompt": question, "chosen": "The square is red.", "rejected": "There is one."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *rows]))
    return {"source": "rows", "path": str(folder / "rows.jsonl")}


def held_out():
    evaluate = recipe()["evaluate"]
    return {**evaluate, "prompts": None, "held_out": 0.3, "judges": [{"name": "text_rules", "options": {"rules": [RULE]}}]}


RULE = {"rule": "length", "most": 6, "unit": "words"}


def test_rows_of_ones_own_are_trained_on_and_a_share_is_kept_for_evaluation(tmp_path):
    asked = recipe(pairs=preferences(tmp_path / "data"), evaluate=held_out())
    assert run(tmp_path, "align", asked) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 < found["prompts"] < 8


def test_a_30_megapixel_picture_is_one_picture_more(tmp_path):
    Image.new("RGB", (6000, 5000), (10, 200, 30)).save(tmp_path / "large.jpg")
    row = {"image": "../large.jpg", "prompt": "What colour is the square?", "chosen": "a", "rejected": "b"}
    (tmp_path / "data").mkdir()
    pairs = preferences(tmp_path / "data", row)
    assert run(tmp_path, "generate", recipe(pairs=pairs, evaluate=held_out())) == 2  # outside of the data's folder
    (tmp_path / "large.jpg").rename(tmp_path / "data" / "large.jpg")
    pairs = preferences(tmp_path / "data", {**row, "image": "large.jpg"})
    assert run(tmp_path, "align", recipe(pairs=pairs, evaluate=held_out())) == 0
    assert len(PairStore(tmp_path / "run" / "pairs")) == 9


def test_a_prompt_beyond_the_limit_is_an_error_or_left_out_and_counted(tmp_path, capsys):
    long = {"image": "0.png", "prompt": "What colour is the square? " * 40, "chosen": "a", "rejected": "b"}
    asked = recipe(pairs=preferences(tmp_path / "data", long), prepare={"max_prompt_tokens": 64})
    assert run(tmp_path, "align", asked) == 2
    said = capsys.readouterr().err
    assert "1 of" in said and "more than max_prompt_tokens, 64" in said and "prepare.on_long: drop" in said
    assert len(PairStore(tmp_path / "run" / "pairs")) == 9, "the pairs are kept"
    asked["prepare"]["on_long"] = "drop"
    assert run(tmp_path, "align", asked) == 0
    assert json.loads((tmp_path / "run" / "left_out.json").read_text()) == {"too_long": 1}


def test_a_damaged_picture_and_a_wrong_count_stop_the_import_by_name(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "cut.jpg")
    content = (tmp_path / "data" / "cut.jpg").read_bytes()
    (tmp_path / "data" / "cut.jpg").write_bytes(content[: len(content) // 2])
    bad = [
        {"image": "cut.jpg", "prompt": "a", "chosen": "b", "rejected": "c"},
        {"images": ["0.png"], "prompt": "<image> or <image>?", "chosen": "b", "rejected": "c"},
        {"image": "0.png", "prompt": "a", "chosen": "", "rejected": "c"},
    ]
    pairs = preferences(tmp_path / "data", *bad)
    assert run(tmp_path, "generate", recipe(pairs=pairs, evaluate=held_out())) == 2
    said = capsys.readouterr().err
    assert all(words in said for words in ("line 9", "2 place(s) for images", "column 'chosen': the answer is empty"))
    assert run(tmp_path, "align", recipe(pairs={**pairs, "on_bad_row": "drop"}, evaluate=held_out())) == 0
    dropped = json.loads((tmp_path / "run" / "pairs" / "summary.json").read_text())
    assert dropped["rows_dropped"] == 3


def test_questions_of_the_training_are_no_evaluation(tmp_path):
    asked = recipe()
    asked["evaluate"]["prompts"] = {"file": str(tmp_path / "asked.jsonl")}
    assert run(tmp_path, "generate", recipe()) == 0
    row = PairStore(tmp_path / "run" / "pairs").rows([0])[0]
    for number, picture in enumerate(row["condition"]["images"]):
        (tmp_path / f"{number}.png").write_bytes(picture["bytes"])
    images = [f"{number}.png" for number in range(len(row["condition"]["images"]))]
    line = {"messages": row["condition"]["messages"], "images": images}
    (tmp_path / "asked.jsonl").write_text(json.dumps(line) + "\n")
    store = PairStore(tmp_path / "run" / "pairs")
    with pytest.raises(UserError, match="are also prompts of the pairs"):
        stages.ROOM.evaluation_conditions(VlmRecipe.model_validate(asked), store)


def test_what_is_asked_about_one_picture_stays_on_one_side(tmp_path):
    data = preferences(tmp_path / "data")
    lines = (tmp_path / "data" / "rows.jsonl").read_text()
    again = [json.loads(line) | {"prompt": "How many objects are there?"} for line in lines.splitlines()]
    (tmp_path / "data" / "rows.jsonl").write_text(lines + "".join(json.dumps(line) + "\n" for line in again))
    asked = recipe(pairs=data, evaluate=held_out())
    assert run(tmp_path, "generate", asked) == 0
    store = PairStore(tmp_path / "run" / "pairs")
    trained, kept = split_pairs(VlmRecipe.model_validate(asked).evaluate, 3, store)
    shown = [{row["condition"]["images"][0]["bytes"] for row in store.rows(part)} for part in (trained, kept)]
    assert all(shown) and not shown[0] & shown[1]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"pictures": {"grid": [1, 2]}}, "the world has no grid of 1"),
        ({"pictures": {"sequence": [7]}}, "the world has no sequence of 7"),
        ({"pictures": {"sequence": [1, 2]}, "tasks": ["alt"]}, "alt is asked of a single picture only"),
    ],
)
def test_questions_that_the_world_does_not_ask_are_refused(prompts, words):
    asked = recipe()
    asked["evaluate"]["prompts"] = {"world": "scenes", "split": "heldout", "count": 4, **prompts}
    with pytest.raises(ValueError, match=words):
        VlmRecipe.model_validate(asked)
