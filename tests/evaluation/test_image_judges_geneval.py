"""GenEval: its rules beyond the golden cases, the detector's head on logits made by hand, and a judge whose two networks are
tiny and random, in the published layouts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.prompts import load_prompts
from polyalign.evaluation import geneval, judges
from polyalign.evaluation.geneval import Detection, Thresholds
from polyalign.evaluation.geneval_folder import read_folder, write_folder, write_results
from polyalign.evaluation.image_judges.geneval import cut_out, detections

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import pictures, save_clip  # noqa: E402  # pyright: ignore[reportMissingImports]

DOG = {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}


def at(x: float, y: float, score: float = 0.9, size: float = 10.0) -> Detection:
    return Detection((x, y, x + size, y + size, score))


def no_colours(name, found):
    raise AssertionError("no colour is asked for")


def test_what_counts_of_the_detections():
    found = {"dog": [at(0, 0, 0.31), at(50, 0, 0.95), at(0, 50, 0.3)], "cat": [at(0, 0, 0.2)]}
    assert [one.box[4] for one in geneval.kept(found, "single_object")["dog"]] == [0.95, 0.31]
    assert geneval.kept(found, "counting") == {"dog": [found["dog"][1]]}
    many = {"dog": [at(20 * index, 0, 0.5 + index / 100) for index in range(20)]}
    assert [one.box[0] for one in geneval.kept(many, "colors")["dog"]] == [20.0 * index for index in range(19, 3, -1)]
    double = {"dog": [at(0, 0, 0.9), at(1, 0, 0.8), at(40, 0, 0.7)]}
    assert len(geneval.kept(double, "colors")["dog"]) == 3
    assert [one.box[0] for one in geneval.kept(double, "colors", Thresholds(overlap=0.5))["dog"]] == [0.0, 40.0]


def test_mirrored_boxes_have_mirrored_relations():
    rng = np.random.default_rng(0)
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(200):
        corners = rng.uniform(0, 400, (2, 2))
        a, b = (np.concatenate([corner, corner + rng.uniform(5, 100, 2), [0.9]]).tolist() for corner in corners)
        assert sorted(geneval.relations(b, a)) == sorted(other[relation] for relation in geneval.relations(a, b))
        assert geneval.iou(a, b) == pytest.approx(geneval.iou(b, a)) and geneval.iou(a, a) == 1.0
    # 45 degrees: both axes are at 0.707 of the distance, less the shrinking
    assert geneval.relations((100, 100, 101, 101, 1), (0, 0, 1, 1, 1)) == ["right of", "below"]


def test_wrong_metadata_is_explained():
    two = {"dog": [at(0, 0)], "cat": [at(50, 0)]}
    for metadata, said in (
        ({"include": "dog"}, "'include' must be a list"),
        ({"include": [{"class": "dog"}]}, "'include' must be a list"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "the place of an include before it"),
        ({"include": [DOG["include"][0], {"class": "cat", "count": 1, "position": ["near", 0]}]}, "a relation"),
    ):
        with pytest.raises(UserError, match=said):
            geneval.judge(two, metadata, no_colours)


def test_overall_is_the_mean_of_the_tasks():
    other = {"tag": "counting", "prompt": "a photo of two dogs"}
    found = geneval.summary([(DOG, True), (DOG, False), (DOG, True), (DOG, True), (other, False)])
    assert found["tasks"]["single_object"] == {"right": 3, "n": 4, "share": 0.75}
    assert (found["overall"], found["pictures"], found["prompts"]) == (0.375, 0.6, 0.5)
    for results in ([], [({"prompt": "a dog"}, True)]):
        with pytest.raises(UserError, match="GenEval"):
            geneval.summary(results)


def test_the_detectors_head_on_logits_made_by_hand():
    """Two queries: a dog in the left half for sure, a cat in one pixel; the third sees nothing."""
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 9.0]])
    masks = torch.full((3, 4, 8), -20.0)
    masks[0, :, :4] = 20.0
    masks[1, 1, 6] = 1.0
    sizes = ((4, 8), (4, 8), (4, 8))
    found = detections(classes, masks, ["dog", "cat"], least=0.3, sizes=sizes)
    (dog,), (cat,) = found["dog"], found["cat"]
    assert dog.box[:4] == (0, 0, 4, 4) and dog.box[4] == pytest.approx(float(classes[0].softmax(0)[0]), rel=1e-6)
    assert cat.box[:4] == (6, 1, 7, 2)
    assert cat.box[4] == pytest.approx(float(classes[1].softmax(0)[1] * torch.tensor(1.0).sigmoid()), rel=1e-6)
    assert dog.mask is not None and dog.mask.shape == (4, 8) and dog.mask[:, :4].all() and not dog.mask[:, 4:].any()
    assert set(detections(classes, masks, ["dog", "cat"], least=0.9, sizes=sizes)) == {"dog"}
    assert detections(classes, masks - 50, ["dog", "cat"], least=0.3, sizes=sizes) == {}
    # twice as large, and with padding below that is cut off before
    doubled = detections(classes, masks, ["dog", "cat"], least=0.9, sizes=((4, 8), (2, 8), (16, 64)))
    assert doubled["dog"][0].box[:4] == (0, 0, 32, 16)


def test_an_object_is_cut_out_on_grey():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:6] = True
    cut = np.asarray(cut_out(Image.new("RGB", (8, 6), "red"), Detection((2.0, 2.0, 7.0, 5.0, 0.9), mask)))
    assert cut.shape == (3, 5, 3)
    assert (cut[:2, 1:4] == (255, 0, 0)).all() and (cut[2] == 0x99).all() and (cut[:, 0] == 0x99).all()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    """A Mask2Former with three classes and a CLIP, tiny and random."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        **{"out_features": ["stage1", "stage2", "stage3", "stage4"]},
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "dog", 1: "mouse", 2: "cat"},
        label2id={"dog": 0, "mouse": 1, "cat": 2},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    save_clip(folder / "clip")
    return {"detector": str(folder / "detector"), "model": str(folder / "clip")}


def test_the_judge_runs_on_published_layouts(networks):
    judge: Any = judges.build(JudgeConfig(name="geneval", options={**networks, "side": 64}))
    assert "detector@sha256:" in judge.version and "colours clip@sha256:" in judge.version
    assert judge.classes == ["dog", "computer mouse", "cat"]
    images = pictures(((64, 64), (90, 50)))
    found = judge.detect(images[1])
    for name, objects in found.items():
        assert name in judge.classes
        for one in objects:
            assert one.mask.shape == (50, 90) and 0 < one.box[4] <= 1
            assert 0 <= one.box[0] < one.box[2] <= 90 and 0 <= one.box[1] < one.box[3] <= 50
    asked = [DOG, {**DOG, "include": [{"class": "computer mouse", "count": 1, "color": "red"}]}]
    scores = judge.score(asked, images)
    assert set(scores) <= {0.0, 1.0} and scores == judge.score(asked, images)
    colours = judge.colours(images[0], "dog", [at(0, 0, size=30), at(20, 20, size=40)])
    assert len(colours) == 2 and set(colours) <= set(geneval.COLOURS)


def test_both_names_of_cocos_classes_are_genevals(networks, tmp_path):
    shutil.copytree(networks["detector"], tmp_path / "detector")
    path = tmp_path / "detector" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "id2label": {"0": "sofa", "1": "tvmonitor", "2": "pottedplant"}, "label2id": {}}))
    options = {**networks, "detector": str(tmp_path / "detector"), "side": 64}
    judge: Any = judges.build(JudgeConfig(name="geneval", options=options))
    assert judge.classes == ["couch", "tv", "potted plant"]


def test_prompts_that_are_not_genevals_are_refused(networks):
    judge = judges.build(JudgeConfig(name="geneval", options={**networks, "side": 64}))
    for condition, said in (
        ({"prompt": "a dog"}, "'tag' and 'include' are needed"),
        ({**DOG, "include": [{"class": "unicorn", "count": 1}]}, "unknown classes .'unicorn'."),
    ):
        with pytest.raises(UserError, match=said):
            judge.score([condition], pictures(((64, 64),)))
    with pytest.raises(UserError, match="side is 8"):
        judges.build(JudgeConfig(name="geneval", options={**networks, "side": 8}))


def test_a_line_of_genevals_file_is_a_condition(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(json.dumps(DOG) + "\n")
    assert load_prompts(file) == [DOG]


def test_folders_go_out_and_come_back(tmp_path):
    other = {**DOG, "prompt": "a photo of a dög"}
    images = pictures(((8, 8),) * 3)
    write_folder(tmp_path / "out", [DOG, other, DOG], images)
    (tmp_path / "out" / "00000" / "samples" / "notes.txt").write_text("no picture")
    (tmp_path / "out" / "00000" / "samples" / "grid-0000.png").write_text("nor this")
    (tmp_path / "out" / "results").mkdir()
    found = read_folder(tmp_path / "out")
    assert [metadata for metadata, _ in found] == [DOG, DOG, other]
    assert [str(path.relative_to(tmp_path / "out")) for _, path in found] == [
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/samples/0000.png",
    ]
    opened = [np.asarray(Image.open(path)) for _, path in found]
    assert all((ours == np.asarray(images[place])).all() for ours, place in zip(opened, (0, 2, 1), strict=True))
    write_results(tmp_path / "results.jsonl", [(DOG, found[0][1], False, ("expected dog>=1, found 0",))])
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert (content["tag"], content["correct"], content["reason"]) == ("single_object", False, "expected dog>=1, found 0")
    assert json.loads(content["metadata"]) == DOG


def test_folders_that_are_none_are_explained(tmp_path):
    with pytest.raises(UserError, match="no pictures in GenEval's layout"):
        read_folder(tmp_path)
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    with pytest.raises(UserError, match="metadata.jsonl: cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "00000" / "metadata.jsonl").write_text("[1]")
    with pytest.raises(UserError, match="a JSON object is expected, found list"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        write_folder(tmp_path, [DOG], pictures(((8, 8),)))
    with pytest.raises(ValueError, match="1 pictures for 2 conditions"):
        write_folder(tmp_path / "new", [DOG, DOG], pictures(((8, 8),)))
