"""POPE, MME and HallusionBench from small files in their own formats, with figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm import hallusion_bench, mme, pope
from polyalign.evaluation.vlm.sheets import Question, Sheet


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pope(folder, split="random", labels="yyynnn", images=(1, 1, 1, 2, 2, 2)):
    rows = [
        {"question_id": number, "image": f"{image}.jpg", "text": "Is there a dog?", "label": {"y": "yes", "n": "no"}[label]}
        for number, (label, image) in enumerate(zip(labels, images, strict=True))
    ]
    _lines(folder / f"coco_pope_{split}.json", rows)


def _values(scores, group):
    return {name: one.value for name, one in scores.groups[group].items()}


def test_pope(tmp_path):
    _pope(tmp_path)
    sheet = pope.read(tmp_path)
    texts = ["Yes", "yes, there is", "No", "There is a dog", "No.", "a sofa"]
    said = {f"random/{number}": text for number, text in enumerate(texts)}
    scores = pope.score(sheet, said)
    # TP 2, FN 1, FP 1, TN 1, and one answer that says neither: of 6 right 3
    assert scores.counts["random"] == {"tp": 2, "fp": 1, "tn": 1, "fn": 1, "unread": 1}
    assert _values(scores, "random") == pytest.approx(
        {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6}
    )
    assert list(scores.unread) == ["random/5"]
    assert scores.notes == ["1 of 6 answers are read in another way by POPE's own scorer (--reader pope)"]
    figure = scores.groups["random"]["accuracy"]
    assert (figure.rows, figure.clusters) == (6, 2)
    assert figure.interval == pytest.approx((1 / 3, 2 / 3))  # the images have 2 and 1 of 3: both means can be drawn


def test_pope_as_published_takes_everything_else_as_yes(tmp_path):
    _pope(tmp_path)
    said = dict.fromkeys((f"random/{number}" for number in range(6)), "")
    published = _values(pope.score(pope.read(tmp_path), said, reader="pope"), "random")
    assert published == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0})
    ours = pope.score(pope.read(tmp_path), said)
    assert _values(ours, "random") == {"accuracy": 0.0, "precision": None, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    assert ours.groups["random"]["precision"].interval is None


def test_pope_splits_share_images(tmp_path):
    _pope(tmp_path)
    _pope(tmp_path, "popular")
    sheet = pope.read(tmp_path)
    said = {question.id: question.truth for question in sheet.questions}
    scores = pope.score(sheet, said)
    assert list(scores.groups) == ["random", "popular", "all"]
    everything = scores.groups["all"]["accuracy"]
    assert (everything.value, everything.rows, everything.clusters) == (1.0, 12, 2)
    assert everything.interval == pytest.approx((0.3424, 1.0), abs=1e-4)  # Wilson's for 2 images of 2, not [1, 1]


def test_questions_of_ones_own_need_no_split():
    sheet = Sheet((Question("a", "yes", "1.png"), Question("b", "no", "2.png")), ())
    scores = pope.score(sheet, {"a": "yes", "b": "yes"})
    assert list(scores.groups) == ["all"] and scores.groups["all"]["precision"].value == 0.5


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pope.json", "{}", "named like coco_pope_random.json"),
        ("coco_pope_random.json", "no json", "neither a JSON list nor JSON lines"),
        ("coco_pope_random.json", "", "is empty"),
        ("coco_pope_random.json", '{"question_id": 1, "image": "a", "text": "?"}', "has no 'label'"),
        ("coco_pope_random.json", '{"question_id": 1, "image": "a", "text": "?", "label": "Yes"}', "label is 'Yes'; allowed"),
        ("coco_pope_random.json", '{"question_id": 1, "image": "a", "text": "?", "label": "no"}\n' * 2, "the id 'random/1'"),
        ("coco_pope_random.json", "[1]", "a JSON object is expected, found int"),
    ],
)
def test_pope_refuses_other_files(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        pope.read(tmp_path)


def test_unknown_reader(tmp_path):
    _pope(tmp_path)
    with pytest.raises(UserError, match="reader is 'guess'; allowed for yes and no: words, pope"):
        pope.score(pope.read(tmp_path), {}, reader="guess")


def _mme(folder, name, images, truths=("Yes", "No")):
    lines = [f"{image}.jpg\tIs it {number}?\t{truth}\n" for image in images for number, truth in enumerate(truths)]
    (folder / f"{name}.txt").write_text("".join(lines))


def test_mme(tmp_path):
    _mme(tmp_path, "existence", "ab")
    _mme(tmp_path, "OCR", "c")
    _mme(tmp_path, "code_reasoning", "d")
    sheet = mme.read(tmp_path)
    said = {question.id: question.truth for question in sheet.questions} | {"existence/b.jpg/2": "yes"}
    scores = mme.score(sheet, said)
    assert _values(scores, "existence") == pytest.approx({"accuracy": 3 / 4, "accuracy_plus": 1 / 2, "score": 125.0})
    assert _values(scores, "OCR")["score"] == 200.0
    assert _values(scores, "perception") == {"score": 325.0} and _values(scores, "cognition") == {"score": 200.0}
    assert scores.groups["perception"]["score"].interval == (250.0, 400.0)  # existence: a has 200, b 50 points
    assert "perception is the sum of 2 of 10 subtasks, at most 400 points" in scores.notes
    assert scores.groups["OCR"]["score"].interval is None  # one image has no spread


def test_mme_needs_pairs_of_one_image(tmp_path):
    _mme(tmp_path, "existence", "ab", truths=("Yes",))
    with pytest.raises(UserError, match="'a.jpg' has 1 questions; every image of MME has two"):
        mme.read(tmp_path)
    (tmp_path / "existence.txt").write_text("a.jpg\tIs it?\tmaybe\n")
    with pytest.raises(UserError, match="line 1 is not image, question and Yes or No"):
        mme.read(tmp_path)
    with pytest.raises(UserError, match="MME's subtasks is expected"):
        mme.read(tmp_path / "nothing")


def _hallusion(folder, places):
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")
    rows = [dict(zip(keys, place.split(), strict=True)) | {"question": "Is it?", "visual_input": "1"} for place in places]
    (folder / "HallusionBench.json").write_text(json.dumps(rows))


def test_hallusion_bench(tmp_path):
    _hallusion(
        tmp_path,
        ["VD illusion 0 0 0 1", "VD illusion 0 0 1 0", "VD illusion 0 1 0 0", "VD illusion 0 1 1 0"]
        + ["VS chart 0 0 0 1", "VS chart 0 1 0 1", "VS chart 0 2 0 0"],
    )
    sheet = hallusion_bench.read(tmp_path)
    texts = ["Yes", "No", "Yes", "No", "I cannot tell without the picture.", "Yes", "No"]
    said = {question.id: text for question, text in zip(sheet.questions, texts, strict=True)}
    scores = hallusion_bench.score(sheet, said)
    # wrong: only VD set 0, figure 1, question 0. Questions of sets: VD 0 (wrong), VD 1, VS 0 -> 2/3
    assert _values(scores, "all") == pytest.approx({"aAcc": 6 / 7, "qAcc": 2 / 3, "fAcc": 3 / 4, "easy": 1.0, "hard": 2 / 3})
    assert _values(scores, "VD") == pytest.approx({"aAcc": 3 / 4, "qAcc": 1 / 2, "fAcc": 1 / 2, "easy": 1.0, "hard": 1 / 2})
    assert list(scores.unread) == [] and scores.groups["all"]["aAcc"].clusters == 2
    other = hallusion_bench.score(sheet, said, without_picture="as_others")
    assert _values(other, "VS") == pytest.approx({"aAcc": 2 / 3, "qAcc": 0.0, "fAcc": 2 / 3, "easy": 0.0, "hard": 1.0})
    assert list(other.unread) == ["VS_chart_0_0_0"]
    with pytest.raises(UserError, match="without_picture is 'never'; allowed: published, as_others"):
        hallusion_bench.score(sheet, said, without_picture="never")


def test_hallusion_bench_answers_by_its_own_keys():
    row = {"category": "VD", "subcategory": "map", "set_id": 1, "figure_id": 2, "question_id": 3}
    assert hallusion_bench.answer_id(row) == "VD_map_1_2_3" and hallusion_bench.answer_id({"set_id": 1}) is None


def test_hallusion_bench_refuses_other_rows(tmp_path):
    _hallusion(tmp_path, ["VX illusion 0 0 0 1"])
    with pytest.raises(UserError, match="category is 'VX'; allowed: VD, VS"):
        hallusion_bench.read(tmp_path)
    _hallusion(tmp_path, ["VD illusion 0 0 0 yes"])
    with pytest.raises(UserError, match="gt_answer is 'yes'; allowed: 0, 1"):
        hallusion_bench.read(tmp_path)
