"""Image recipes beyond pairs that are there: rounds of fresh samples, single pictures with labels, the implicit reward."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyalign.core.config import load
from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.picture_labels import PictureLabelStore
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.stages import refuse_early

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import LORA, digest, lines, polyalign, recipe, write_recipe  # noqa: E402

KTO = {"name": "diffusion_kto", "beta": {"value": 500, "convention": "mean"}}


def folders(place: Path, count: int = 6) -> Path:
    """liked/ is red, disliked/ is blue; captions of the world."""
    for side, colour in (("liked", (220, 30, 30)), ("disliked", (30, 30, 220))):
        (place / side).mkdir(parents=True)
        for number in range(count):
            shade = tuple(min(255, part + 3 * number) for part in colour)
            Image.new("RGB", (32, 32), shade).save(place / side / f"{number}.png")
            (place / side / f"{number}.txt").write_text(f"a circle, number {number}", encoding="utf-8")
    return place


def labelled(base: Path, place: Path, **changes: Any) -> dict[str, Any]:
    return recipe(base, pairs={"source": "labels", "path": str(place)}, objective=KTO, **changes)


def resolved(tmp_path: Path, content: dict[str, Any]) -> ImageRecipe:
    return load(str(write_recipe(tmp_path, content)), [], ImageRecipe)[0]


# --- rounds -------------------------------------------------------------------------------------------------------------------


def online(base: Path, **changes: Any) -> dict[str, Any]:
    content = recipe(base, online={"rounds": 2, "prompts_per_round": 3, "prompts_per_shard": 2, **changes})
    content["train"] |= {"steps": 4, "batch_size": 2, "micro_batch_size": 2}
    return content


def test_rounds_train_on_the_policys_own_samples_and_go_on_after_a_kill(base, tmp_path):
    config = write_recipe(tmp_path / "recipe", online(base))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert polyalign("align", config, whole) == 0
    rounds = [json.loads((whole / f"rounds/00{number}/round.json").read_text()) for number in (1, 2)]
    assert [one["after_steps"] for one in rounds] == [0, 2] and [one["samples"] for one in rounds] == [6, 6]
    identity = PairStore(whole / "rounds/002/pairs", "picture").rows([0])[0]["provenance"]
    assert "round 2" in identity["model"]
    assert (whole / LORA).is_file() and (whole / "evaluation.json").is_file() and (whole / "prompts.jsonl").is_file()
    assert not (whole / "pairs").exists() and len(lines(whole)) == 4
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert len(evaluation["items"]) == 4

    assert polyalign("generate", config, cut) == 0 and polyalign("train", config, cut) == 0
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / max(path.name for path in (cut / "checkpoints").iterdir()))
    assert polyalign("train", config, cut) == 0
    assert digest(cut / LORA) == digest(whole / LORA)


def test_rounds_of_diffusion_nft_regress_on_soft_preferences(base, tmp_path):
    """Against the policy of the round's beginning, from which the first step of a round has not moved yet."""
    content = online(base, targets="soft", scale=0.3, ties="half", reference="refreshed")
    content["objective"] = {"name": "diffusion_nft", "mixing": 0.5}
    config = write_recipe(tmp_path / "recipe", content)
    assert polyalign("generate", config, tmp_path / "run") == 0 and polyalign("train", config, tmp_path / "run") == 0
    assert (tmp_path / "run" / LORA).is_file()
    margins = [line["rewards/margins"] for line in lines(tmp_path / "run")]
    assert len(margins) == 4 and margins[0] == margins[2] == 0.0 and margins[1] != 0.0 and margins[3] != 0.0


def test_rounds_refuse_what_language_models_alone_have(base, tmp_path):
    for place, (changes, said) in enumerate(
        (
            ({"mixture": 0.2}, "online.mixture is for language models"),
            ({"lists": True, "mode": "best_rest"}, "lists"),
            ({"rounds": 3}, "do not divide"),
        )
    ):
        with pytest.raises(UserError, match=said):
            refuse_early(resolved(tmp_path / str(place), online(base, **changes)))


# --- labels -------------------------------------------------------------------------------------------------------------------


def test_diffusion_kto_trains_on_single_pictures_with_labels(base, tmp_path):
    content = labelled(base, folders(tmp_path / "pictures"), arms={"sft": {"name": "sft"}})
    content["train"] |= {"steps": 6, "batch_size": 6, "micro_batch_size": 6}
    config = write_recipe(tmp_path / "recipe", content)
    run = tmp_path / "run"
    assert polyalign("align", config, run) == 0
    summary = json.loads((run / "pairs/summary.json").read_text())
    assert (summary["desirable"], summary["undesirable"], summary["rows_dropped"]) == (6, 6, 0)
    store = PictureLabelStore(run / "pairs")
    assert store.validate() == 12 and store.labels() == [True] * 6 + [False] * 6
    written = lines(run)
    assert written[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # policy and reference are one: 1 - sigmoid(0)
    assert written[-1]["step"] == 6 and (run / LORA).is_file() and (run / "arms/sft" / LORA).is_file()
    assert json.loads((run / "arms/sft/left_out.json").read_text()) == {"undesirable": 6}
    assert (run / "report.html").is_file()


def test_labels_from_lines_are_those_from_folders(tmp_path):
    from polyalign.datasets.picture_labels import import_picture_labels, listed

    place = folders(tmp_path / "pictures", 2)
    rows = [
        {"prompt": (place / side / f"{n}.txt").read_text(), "image": f"{side}/{n}.png", "label": value, "source": "me"}
        for side, value in (("liked", True), ("disliked", 0))
        for n in range(2)
    ]
    lines_file = place / "labels.jsonl"
    lines_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = PictureLabelStore(tmp_path / "first"), PictureLabelStore(tmp_path / "second")
    import_picture_labels(place, first)
    import_picture_labels(lines_file, second)
    assert first.labels() == second.labels() == [True, True, False, False]
    assert [row["image"] for row in first.rows([0, 3], decode=False)] == [
        (place / name).read_bytes() for name in ("liked/0.png", "disliked/1.png")
    ]
    assert second.rows([3])[0]["image"].getpixel((0, 0)) == (33, 33, 223)
    assert second.conditions()[0] == {"prompt": "a circle, number 0", "source": "me"}
    assert len(listed(lines_file)) == 4 and listed(place) == []
    assert first.content_hash() != second.content_hash()


def test_bad_rows_are_all_listed_or_dropped_and_counted(tmp_path):
    from polyalign.datasets.picture_labels import import_picture_labels

    place = folders(tmp_path / "pictures", 2)
    (place / "liked/0.txt").unlink()
    (place / "liked/1.png").write_bytes(b"no picture")
    Image.new("CMYK", (8, 8)).save(place / "disliked/cmyk.jpg")
    (place / "disliked/cmyk.txt").write_text("x")
    store = PictureLabelStore(tmp_path / "store")
    with pytest.raises(UserError, match="3 bad row") as caught:
        import_picture_labels(place, store)
    for said in ("liked/0.png: no caption", "liked/1.png: not a picture", "disliked/cmyk.jpg: a CMYK picture"):
        assert said in str(caught.value)
    assert not store.shards()
    summary = import_picture_labels(place, store, on_bad_row="drop")
    assert (summary["rows"], summary["labelled"], summary["rows_dropped"]) == (5, 2, 3) and len(store) == 2
    rows = [
        {"prompt": "x", "image": "../secret.png", "label": 1},
        {"prompt": "x", "image": "a.png", "label": 0.5},
        {"prompt": "x"},
    ]
    (place / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        import_picture_labels(place / "bad.jsonl", store)
    for said in ("climbs out of its folder", "must be true or false", "no 'image' and no 'label'"):
        assert said in str(caught.value)
    with pytest.raises(UserError, match="neither liked/ nor disliked/"):
        import_picture_labels(tmp_path, store)


def test_a_store_of_many_shards_reads_rows_in_any_order(tmp_path):
    store = PictureLabelStore(tmp_path)
    rows = [
        {"pair_id": f"{n:08d}", "condition": {"prompt": f"p{n}"}, "image": bytes([n % 256, n // 256]), "label": n % 3 == 0}
        for n in range(150)
    ]
    store.write(rows)
    assert len(store.shards()) == 3 and len(store) == 150
    assert store.rows([149, 0, 70, 8], decode=False) == [rows[n] for n in (149, 0, 70, 8)]
    store.shards()[1].unlink()
    with pytest.raises(UserError, match="shards are missing"):
        PictureLabelStore(tmp_path).validate()


def test_objectives_that_compare_two_pictures_are_refused_on_labels(base, tmp_path):
    content = labelled(base, folders(tmp_path / "pictures", 2)) | {"objective": {"name": "dpo"}}
    with pytest.raises(UserError, match="dpo compares two pictures of a prompt.*diffusion_kto"):
        refuse_early(resolved(tmp_path / "recipe", content))


# --- the implicit reward ------------------------------------------------------------------------------------------------------


def pairs_of(base: Path, place: Path, **evaluate: Any) -> dict[str, Any]:
    """Red preferred to blue, for captions that are kept aside by hash."""
    for number in range(16):
        for side, colour in (("chosen", (220, 30, 30)), ("rejected", (30, 30, 220))):
            (place / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), tuple(min(255, part + number) for part in colour)).save(place / side / f"{number}.png")
        (place / "chosen" / f"{number}.txt").write_text(f"a circle, number {number}", encoding="utf-8")
    content = recipe(base, pairs={"source": "folders", "folder": str(place)})
    content["train"] |= {"steps": 8, "batch_size": 8, "micro_batch_size": 8}
    content["prepare"] = {"caption_dropout": 0.5, "flip": True}
    content["evaluate"] = {"held_out": 0.4, "judges": [{"name": "saturation"}], **evaluate}
    return content


def test_a_model_that_did_not_move_prefers_neither(base, tmp_path):
    content = pairs_of(base, tmp_path / "my_pairs", implicit_reward={"draws": 1})
    content["train"]["optimizer"] = {"learning_rate": 1e-12}
    content["train"]["steps"] = 1
    run = tmp_path / "run"
    assert polyalign("align", write_recipe(tmp_path / "recipe", content), run) == 0
    found = json.loads((run / "evaluation.json").read_text())["implicit_reward"]
    assert abs(found["mean_margin"]) < 1e-6  # the same draws, captions and pictures for policy and reference


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_implicit_reward_is_measured_on_the_pairs_kept_aside(base, tmp_path, train):
    content = pairs_of(base, tmp_path / "my_pairs", implicit_reward={"draws": 3, "pairs": 4})
    content["model"]["train"] = train
    if train == "full":
        content["train"] |= {"reference": {"seat": "frozen"}}
    run = tmp_path / "run"
    assert polyalign("align", write_recipe(tmp_path / "recipe", content), run) == 0
    found = json.loads((run / "evaluation.json").read_text())["implicit_reward"]
    assert (found["pairs"], found["draws"], found["ties_left_out"]) == (4, 3, 0)
    assert found["accuracy"] >= 0.75 and found["mean_margin"] > 0  # large steps tell red from blue
    low, high = found["interval"]
    assert 0.0 <= low <= found["accuracy"] <= high <= 1.0
    assert "The model's own reward" in (run / "report.html").read_text(encoding="utf-8")


def test_the_implicit_reward_is_off_by_default_and_refused_without_pairs_aside(base, tmp_path):
    plain = resolved(tmp_path / "plain", pairs_of(base, tmp_path / "my_pairs"))
    assert plain.evaluate.implicit_reward is None and "implicit_reward" not in plain.evaluate.model_dump(mode="json")
    refuse_early(plain)
    content = recipe(base)
    content["evaluate"]["implicit_reward"] = {"draws": 2}
    with pytest.raises(UserError, match="keeps none aside"):
        refuse_early(resolved(tmp_path / "none", content))
    assert not RunFolder(tmp_path / "nowhere", planning=True).path.exists()
