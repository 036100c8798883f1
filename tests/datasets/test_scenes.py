"""The world of scenes: pictures that are seen as they were drawn, questions, the exact judge, rows and folders."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.multi_image import grid, picture_in_picture, sequence
from polyalign.datasets.multi_image.rows import check_row
from polyalign.datasets.multi_image.sources import Questions, read_questions
from polyalign.datasets.pictures import encode_png
from polyalign.datasets.worlds import scenes, scenes_questions, scenes_rows
from polyalign.datasets.worlds.scenes import COLOURS, Scene
from polyalign.datasets.worlds.scenes_questions import TASKS, Question, asked, noisy_answer, parse, verdict
from polyalign.datasets.worlds.shapes import Thing
from polyalign.evaluation.judges import build, refuse_conditions
from polyalign.evaluation.vlm import chair, pope
from polyalign.evaluation.vlm.answers import yes_or_no

PAIR = Scene((Thing("square", "red", 8, 8), Thing("circle", "blue", 24, 7)))
TWO_SQUARES = Scene((Thing("square", "red", 8, 8), Thing("square", "blue", 24, 24)))


def drawn(count: int, split: str | None = None) -> list[Scene]:
    draws = random.Random(5)
    return [scenes.scene(split, draws) for _ in range(count)]


# --- pictures ----------------------------------------------------------------------------------------------------------------


def test_a_scene_is_seen_exactly_as_it_was_drawn_also_when_enlarged_or_compressed(tmp_path: Path) -> None:
    for number, scene in enumerate(drawn(150)):
        picture = scene.draw()
        assert picture.size == (32, 32) and scenes.see(picture) == scene
        assert scenes.see(picture.resize((448, 448), Image.Resampling.LANCZOS)) == scene
        if number < 20:
            picture.resize((128, 128)).save(tmp_path / "one.jpg")
            assert scenes.see(Image.open(tmp_path / "one.jpg")).names == scene.names


def test_what_the_world_does_not_draw_is_refused() -> None:
    with pytest.raises(UserError, match="row 1, column 1"):
        scenes.see(Image.new("RGB", (32, 32), "red"))
    assert scenes.see(Scene(()).draw()) == Scene(())


def test_a_third_of_the_compositions_is_held_out_and_never_drawn_for_training() -> None:
    every, train, held_out = (scenes.compositions(split) for split in (None, "train", "heldout"))
    assert len(every) == 24 + 276 + 2024 and len(held_out) == 8 + 92 + 674
    assert set(train) | set(held_out) == set(every) and not set(train) & set(held_out)
    assert not any(scenes.held_out(scene.names) for scene in drawn(300, "train"))
    assert all(scenes.held_out(scene.names[::-1]) for scene in drawn(300, "heldout"))
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        scenes.scene("test", random.Random(0))


# --- questions and the judge -------------------------------------------------------------------------------------------------


def test_every_question_is_understood_from_its_text_and_its_answer_is_right() -> None:
    draws, counts = random.Random(1), Counter()
    for scene in drawn(200):
        for task in TASKS:
            question = scenes_questions.ask(scene, task, draws)
            if question is None:
                continue
            answer = question.answer(scene)
            assert answer is not None and parse(question.text(draws)) == question
            assert parse(f"USER: In Image3, {question.text(draws)[0].lower()}{question.text(draws)[1:]}") == question
            assert verdict(question, scene, answer) == "right"
            assert verdict(question, scene, answer.upper().rstrip(".")) == "right"
            counts[task] += 1
    assert counts["what"] == counts["exists"] == counts["count"] == 200 and min(counts.values()) > 150
    with pytest.raises(ValueError, match="does not know the question 'What is the time"):
        parse("What is the time?")


def test_half_of_the_objects_asked_for_are_there_and_half_of_the_others_are_alike() -> None:
    draws, there, alike = random.Random(2), [], []
    for scene in drawn(600):
        question = scenes_questions.ask(scene, "exists", draws)
        assert question is not None
        there.append(question.about in scene.names)
        if not there[-1]:
            alike.append(question.about in scenes_questions.alike(scene.names))
    assert sum(there) / len(there) == pytest.approx(0.5, abs=0.07)
    assert 0.6 < sum(alike) / len(alike) < 0.95  # some of those drawn from all objects are alike by chance
    assert "red circle" in scenes_questions.alike(PAIR.names) and "green cross" not in scenes_questions.alike(PAIR.names)


RIGHT, WRONG, FALSE = "right", "wrong", "hallucinated"


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        (Question("what"), "There is a red square and a blue circle.", RIGHT),
        (Question("what"), "a blue circle, a red square", RIGHT),
        (Question("what"), "There is a red square.", WRONG),  # the circle is forgotten
        (Question("what"), "a red square, a red square and a blue circle", WRONG),
        (Question("what"), "There is a red square and a blue circle and a square.", WRONG),
        (Question("what"), "There is a red circle and a blue square.", FALSE),  # bound to one another wrongly
        (Question("what"), "There is a red square, a blue circle and a cross.", FALSE),
        (Question("what"), "", WRONG),
        (Question("colour", "square"), "The square is red.", RIGHT),
        (Question("colour", "square"), "Red", RIGHT),
        (Question("colour", "square"), "The square is blue.", WRONG),  # the other object's colour
        (Question("colour", "square"), "The square is green.", FALSE),
        (Question("colour", "square"), "The square is red and blue.", WRONG),
        (Question("colour", "square"), "The circle is red.", WRONG),
        (Question("shape", "red"), "The square is red.", RIGHT),
        (Question("shape", "red"), "It is a circle.", WRONG),
        (Question("shape", "red"), "It is a cross.", FALSE),
        (Question("exists", "red square"), "Yes, there is a red square.", RIGHT),
        (Question("exists", "red square"), "yes", RIGHT),
        (Question("exists", "red square"), "No.", WRONG),
        (Question("exists", "red square"), "Yes, there is a green square.", FALSE),
        (Question("exists", "blue square"), "Yes, there is a blue square.", FALSE),
        (Question("exists", "blue square"), "No, there is no blue square.", RIGHT),
        (Question("exists", "blue square"), "perhaps", WRONG),
        (Question("count", "objects"), "There are two objects.", RIGHT),
        (Question("count", "objects"), "2", RIGHT),
        (Question("count", "objects"), "There is one object.", WRONG),
        (Question("count", "objects"), "There are three objects.", FALSE),
        (Question("count", "square"), "There is one square.", RIGHT),
        (Question("count", "square"), "There is one circle.", WRONG),
        (Question("count", "cross"), "There are no crosses.", RIGHT),
        (Question("count", "cross"), "There is one cross.", FALSE),
        (Question("count", "cross"), "none", RIGHT),
        (Question("alt", "circle"), "A blue circle beside a red square.", RIGHT),
        (Question("alt", "circle"), "A red square beside a blue circle.", WRONG),  # the post is about the circle
        (Question("alt", "circle"), "A blue circle.", WRONG),
        (Question("alt", "circle"), "A green circle beside a red square.", FALSE),
    ],
)
def test_the_judge_is_exact(question: Question, answer: str, found: str) -> None:
    assert verdict(question, PAIR, answer) == found


def test_questions_without_a_single_answer_have_none() -> None:
    assert Question("colour", "square").answer(TWO_SQUARES) is None
    assert Question("shape", "green").answer(TWO_SQUARES) is None
    assert Question("alt", "square").answer(TWO_SQUARES) is None
    assert Question("count", "square").answer(TWO_SQUARES) == "There are two squares."
    with pytest.raises(ValueError, match="no single answer for a picture of red square, blue square"):
        verdict(Question("colour", "square"), TWO_SQUARES, "red")


def test_training_answers_are_wrong_as_often_as_they_should_be() -> None:
    draws, found = random.Random(3), Counter()
    for scene in drawn(1500):
        question = Question("what")
        found[verdict(question, scene, noisy_answer(question, scene, draws) or "")] += 1
        alt = scenes_questions.ask(scene, "alt", draws)
        if alt is not None:
            told = scenes_questions.told(noisy_answer(alt, scene, draws) or "")
            assert alt.about in told.objects[0].split() and len(told.objects) >= 1
        colour = scenes_questions.ask(scene, "colour", draws)
        assert colour is None or noisy_answer(colour, scene, draws) == colour.answer(scene)
    shares = scenes_questions.ERRORS
    assert found[FALSE] / 1500 == pytest.approx(shares["invented"] + shares["recoloured"], abs=0.03)
    assert 0 < found[WRONG] / 1500 < shares["forgotten"] + 0.02


# --- rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [1, 2, 3, 4])
def test_rows_follow_from_their_seed_and_no_other_picture_has_the_answer(pictures: int) -> None:
    rows = scenes_rows.rows("heldout", 24, seed=3, pictures=pictures)
    again = scenes_rows.rows("heldout", 12, seed=3, pictures=pictures)
    targets = Counter()
    for number, row in enumerate(rows):
        check_row(row)
        judged = asked(row["condition"])
        assert judged.verdict(row["chosen"]) == "right" and not judged.confused(row["chosen"])
        assert len(judged.others) == pictures - 1 and judged.question.task == row["condition"]["task"]
        assert all(scenes.held_out(scene.names) for scene in (judged.scene, *judged.others))
        assert len(row["confusions"]) >= min(1, pictures - 1)
        assert all(judged.confused(answer) for answer in row["confusions"])
        targets[row["condition"]["layout"]["targets"][0]] += 1
        if number < 12:
            assert row["chosen"] == again[number]["chosen"]
            assert [image.tobytes() for image in row["condition"]["images"]] == [
                image.tobytes() for image in again[number]["condition"]["images"]
            ]
    assert len(targets) == pictures and len({row["pair_id"] for row in rows}) == 24


def test_exercises_of_training_show_no_held_out_composition() -> None:
    draws = random.Random(0)
    for pictures in (1, 2, 3, 4) * 40:
        one = scenes_rows.exercise("train", pictures, draws)
        assert not any(scenes.held_out(scene.names) for scene in one.scenes)
    with pytest.raises(ValueError, match="about 2 picture"):
        scenes_rows.exercise("train", 2, draws, ("alt",))
    with pytest.raises(ValueError, match="1 to 4 pictures"):
        scenes_rows.exercise("train", 5, draws)


def test_collages_ask_the_same_and_are_judged_alike() -> None:
    rows, collages = (scenes_rows.rows("train", 12, pictures=3, format=format) for format in ("sequence", "grid"))
    for row, collage in zip(rows, collages, strict=True):
        assert len(collage["condition"]["images"]) == 1 and row["chosen"] == collage["chosen"]
        assert asked(collage["condition"]).scene.names == asked(row["condition"]).scene.names


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    folder = tmp_path_factory.mktemp("questions")
    return read_questions(scenes_rows.write_questions(folder / "one", "heldout", 30, seed=4))


def test_a_folder_of_questions_is_what_the_builders_take(written: Questions, tmp_path: Path) -> None:
    again = scenes_rows.write_questions(tmp_path, "heldout", 30, seed=4)
    for file in written.folder.rglob("*.*"):
        assert file.read_bytes() == (again / file.relative_to(written.folder)).read_bytes()
    assert len(written.every_picture) == 30 and len(written.items) > 100
    made = [
        *sequence.build(written, seed=0, limit=12)[:],
        *grid.build(written, seed=0, limit=6, counts={2: 1, 4: 1})[:],
        *picture_in_picture.build(written, seed=0, limit=6)[:],
    ]
    for row in made:
        judged = asked(row["condition"])
        assert judged.verdict(row["chosen"]) == "right"
        assert all(judged.verdict(answer) != "right" for answer in row["confusions"])


def test_the_judge_as_recipes_call_it(written: Questions) -> None:
    judge = scenes_questions.ScenesJudge()
    picture = PAIR.draw()
    condition = {"prompt": "What colour is the square?", "images": [picture]}
    assert judge.score([condition] * 3, ["The square is red.", "blue", "green"]) == [1.0, 0.0, -1.0]
    with pytest.raises(UserError, match="does not know the question"):
        judge.score([{**condition, "prompt": "Why?"}], ["red"])
    with pytest.raises(UserError, match=r"2 picture\(s\), and the question"):
        judge.score([{**condition, "images": [picture, picture]}], ["red"])
    with pytest.raises(UserError, match="names none of them"):
        judge.score([{"prompt": "In Image2, what colour is the square?", "images": [picture]}], ["red"])
    with pytest.raises(UserError, match="no single answer"):
        judge.score([{**condition, "prompt": "What colour is the cross?"}], ["red"])


def test_the_judge_by_its_name_takes_pictures_in_any_form_of_a_row() -> None:
    judge, picture = build(JudgeConfig(name="scenes")), PAIR.draw()
    condition = {"prompt": "What colour is the square?", "images": [picture]}
    stored = encode_png(picture)
    forms = [{**condition, "images": [form]} for form in (picture, stored, {"bytes": stored, "path": None})]
    refuse_conditions([judge], forms)
    assert judge.score(forms, ["The square is red."] * 3) == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Why?"}, "does not know the question"),
        ({"images": []}, r"0 picture\(s\)"),
        ({"images": [{"bytes": None, "path": "/etc/passwd"}]}, "image 1: expected .* only the path '/etc/passwd'"),
        ({"images": [{"bytes": b"no picture", "path": None}]}, "image 1: not a picture"),
        ({"images": [b""]}, "image 1: expected a picture"),
        ({"images": [Image.new("RGB", (32, 32), "magenta")]}, "does not know what is in the picture"),
    ],
)
def test_the_judge_refuses_before_anything_is_sampled(change: dict[str, Any], message: str) -> None:
    condition = {"prompt": "What colour is the square?", "images": [PAIR.draw()], **change}
    with pytest.raises(UserError, match=message):
        refuse_conditions([build(JudgeConfig(name="scenes"))], [condition])


# --- benchmarks --------------------------------------------------------------------------------------------------------------


def test_right_answers_score_fully_in_the_evaluators(tmp_path: Path) -> None:
    folder = scenes_rows.write_benchmarks(tmp_path, "heldout", 12, seed=1)
    sheet = pope.read(folder / "pope")
    assert len(sheet.questions) == 48 and {question.group for question in sheet.questions} == set(scenes_rows.POPE_SPLITS)
    said = {}
    for question in sheet.questions:
        seen = scenes.see(Image.open(folder / "pope" / question.images[0]))
        answer = parse(question.text or "").answer(seen)
        assert answer is not None and yes_or_no(answer) == question.truth
        said[question.id] = answer
    assert pope.score(sheet, said).groups["all"]["accuracy"].value == 1.0
    described = [json.loads(line) for line in (folder / "chair" / "captions.jsonl").read_text().splitlines()]
    objects = chair.read(folder / "chair")
    right = chair.score(objects, {one["image"]: one["reference"] for one in described}).groups["all"]
    assert right["chair_s"].value == 0.0 and right["recall"].value == 1.0
    colour = next(iter(COLOURS))
    false = next(name for name in (f"{colour} circle", f"{colour} square") if name not in described[0]["objects"])
    wrong = chair.score(objects, {described[0]["image"]: f"There is a {false}."}).groups["all"]
    assert wrong["chair_s"].value == 1.0
