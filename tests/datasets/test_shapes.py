"""The world `shapes`: what is drawn is judged right, what is not is not, and evaluation never asks what training has seen."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from polyalign.core.errors import UserError
from polyalign.datasets.worlds import shapes
from polyalign.datasets.worlds.shapes import ShapesJudge, Spec, Thing


def picture_of(things: list[Thing]) -> Image.Image:
    return Image.fromarray((shapes.draw(things) * 255).round().astype(np.uint8))


def score(prompt: str, picture: Image.Image) -> float:
    return ShapesJudge().score([{"prompt": prompt}], [picture])[0]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Spec, Image.Image]]:
    """Three hundred right pictures, every task among them."""
    rng = random.Random(11)
    specs = [shapes.random_spec(rng) for _ in range(300)]
    assert {spec.task for spec in specs} == set(shapes.TASKS)
    return [(spec, shapes.render(spec, rng)) for spec in specs]


def test_every_prompt_is_read_back() -> None:
    prompts = shapes.all_prompts()
    assert len(prompts) == len(set(prompts)) == 4 + 12 + 16 + 12 + 48 + 144
    for prompt in prompts:
        for opening in shapes.OPENINGS:
            spec = shapes.parse(opening + prompt)
            assert shapes.caption(spec, opening) == opening + prompt
            assert len(spec.shapes) == len(spec.colours) and spec.task in shapes.TASKS


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", "a circle ", "A circle", "five circles", "a red circle and a red square", "a circle left of a circle"],
)
def test_prompts_of_another_world_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="the world 'shapes' does not know the prompt"):
        shapes.parse(prompt)


def test_every_rendered_picture_is_right(drawn: list[tuple[Spec, Image.Image]]) -> None:
    judge = ShapesJudge()
    scores = judge.score([{"prompt": shapes.caption(spec)} for spec, _ in drawn], [picture for _, picture in drawn])
    assert scores == [1.0] * len(drawn)
    for spec, picture in drawn:
        verdict = judge.verdict({"prompt": shapes.caption(spec)}, picture)
        assert len(verdict.things) == len(spec.shapes) and verdict.clean


def test_detection_finds_what_was_drawn() -> None:
    rng = random.Random(5)
    for _ in range(100):
        things = shapes.arrange(shapes.random_spec(rng), rng)
        found, clean = shapes.detect(shapes.draw(things))
        assert clean
        places = sorted((thing.shape, thing.colour, thing.x, thing.y) for thing in things)
        for expected, seen in zip(
            places, sorted((thing.shape, thing.colour, thing.x, thing.y) for thing in found), strict=True
        ):
            assert seen[:2] == expected[:2]
            assert abs(seen[2] - expected[2]) <= 1 and abs(seen[3] - expected[3]) <= 1


def test_wrong_captions_are_wrong_for_a_clean_picture(drawn: list[tuple[Spec, Image.Image]]) -> None:
    """Captions with the errors of `CAPTION_NOISE`: whatever asks for something else gets 0."""
    rng = random.Random(1)
    wrong = 0
    for spec, picture in drawn:
        for _ in range(4):
            prompt = shapes.noisy_caption(spec, rng)
            asked = shapes.parse(prompt)
            if asked != spec:
                wrong += 1
                assert score(prompt, picture) == 0.0, (prompt, spec)
    assert wrong > 100


def test_caption_noise_is_as_frequent_as_it_says() -> None:
    rng = random.Random(2)
    for task in shapes.TASKS:
        specs = [shapes.parse(prompt) for prompt in shapes.all_prompts() if shapes.parse(prompt).task == task]
        noisy = [shapes.parse(shapes.noisy_caption(spec, rng)) != spec for spec in rng.choices(specs, k=1000)]
        assert abs(np.mean(noisy) - shapes.CAPTION_NOISE.get(task, 0.0)) < 0.05, task


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a circle", [Thing("circle", "red", 8, 8), Thing("square", "red", 24, 8)]),  # one too many
        ("a circle and a square", [Thing("circle", "red", 8, 8)]),  # one too few
        ("three crosses", [Thing("cross", "red", 8, 8), Thing("cross", "blue", 24, 8)]),
        ("a red circle", [Thing("circle", "yellow", 8, 8)]),
        ("a circle left of a square", [Thing("circle", "red", 24, 8), Thing("square", "red", 8, 8)]),
        ("a circle left of a square", [Thing("circle", "red", 8, 8), Thing("square", "red", 8, 24)]),  # above it
        ("a red circle and a blue square", [Thing("circle", "blue", 8, 8), Thing("square", "red", 24, 8)]),  # colours swapped
    ],
)
def test_each_task_has_its_way_to_be_wrong(prompt: str, things: list[Thing]) -> None:
    assert score(prompt, picture_of(things)) == 0.0


@pytest.mark.parametrize(
    ("relation", "place"), [("left of", (6, 15)), ("right of", (25, 17)), ("above", (15, 7)), ("below", (17, 25))]
)
def test_relations_allow_a_little_shift(relation: str, place: tuple[int, int]) -> None:
    things = [Thing("circle", "red", *place), Thing("square", "green", 16, 16)]
    assert shapes.satisfies(things, Spec("position", ("circle", "square"), (None, None), relation))
    for other in set(shapes.RELATIONS) - {relation}:
        assert not shapes.satisfies(things, Spec("position", ("circle", "square"), (None, None), other))


def test_a_diagonal_is_no_relation() -> None:
    things = [Thing("circle", "red", 8, 8), Thing("square", "green", 24, 24)]
    spec = Spec("position", ("circle", "square"), (None, None))
    assert not any(shapes.satisfies(things, replace(spec, relation=relation)) for relation in ("right of", "below"))


def test_spoilt_pictures_are_not_clean(drawn: list[tuple[Spec, Image.Image]]) -> None:
    rng = np.random.default_rng(4)
    for spec, picture in drawn[:60]:
        prompt = shapes.caption(spec)
        pixels = np.asarray(picture, dtype=np.float32)
        noisy = np.clip(pixels + rng.normal(0, 45, pixels.shape), 0, 255).astype(np.uint8)
        inverted = Image.fromarray(255 - np.asarray(picture))
        for spoilt in (Image.fromarray(noisy), picture.filter(ImageFilter.GaussianBlur(2)), inverted):
            assert score(prompt, spoilt) == -1.0


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (240, 240, 235), (214, 40, 40)])
def test_blank_pictures_are_not_clean(colour: tuple[int, int, int]) -> None:
    assert score("a red circle", Image.new("RGB", (32, 32), colour)) == -1.0


def test_noise_alone_is_not_clean() -> None:
    rng = np.random.default_rng(9)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(30)]
    assert {score("a circle", picture) for picture in pictures} == {-1.0}


def test_a_little_noise_changes_nothing(drawn: list[tuple[Spec, Image.Image]]) -> None:
    """A decoder's rounding must not decide: noise of two grey levels leaves every verdict."""
    rng = np.random.default_rng(3)
    for spec, picture in drawn[:60]:
        pixels = np.asarray(picture, dtype=np.float32)
        near = Image.fromarray(np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8))
        assert score(shapes.caption(spec), near) == 1.0


def test_held_out_prompts_take_no_part_in_training() -> None:
    train = {condition["prompt"] for condition in shapes.prompts("train", 6000, seed=1)}
    held = {condition["prompt"] for condition in shapes.prompts("heldout", 3000, seed=2)}
    assert train.isdisjoint(held)
    assert all(not shapes.held_out(prompt) for prompt in train) and all(shapes.held_out(prompt) for prompt in held)
    assert {shapes.parse(prompt) for prompt in train}.isdisjoint(shapes.parse(prompt) for prompt in held)
    assert train | held == {opening + prompt for opening in shapes.OPENINGS for prompt in shapes.all_prompts()}


def test_each_task_holds_compositions_out_under_every_opening() -> None:
    """Another wording of a trained prompt would be no test: no composition is on both sides."""
    compositions = {
        split: [shapes.parse(condition["prompt"]) for condition in shapes.prompts(split, 360, seed=seed)]
        for seed, split in enumerate(("train", "heldout"))
    }
    assert set(compositions["train"]).isdisjoint(compositions["heldout"])
    for prompt in shapes.all_prompts():
        assert len({shapes.held_out(opening + prompt) for opening in shapes.OPENINGS}) == 1
    for task in shapes.TASKS:
        of_task = [prompt for prompt in shapes.all_prompts() if shapes.parse(prompt).task == task]
        assert sum(map(shapes.held_out, of_task)) == max(1, len(of_task) // 3)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_take_the_tasks_in_turn(split: str) -> None:
    conditions = shapes.prompts(split, 60, seed=7)
    assert [condition["task"] for condition in conditions] == list(shapes.TASKS) * 10
    assert all(shapes.parse(condition["prompt"]).task == condition["task"] for condition in conditions)
    assert conditions == shapes.prompts(split, 60, seed=7) and conditions[:20] == shapes.prompts(split, 20, seed=7)
    assert conditions != shapes.prompts(split, 60, seed=8)
    assert all(one["prompt"] != next_one["prompt"] for one, next_one in zip(conditions, conditions[1:], strict=False))


def test_wrong_use_is_explained() -> None:
    with pytest.raises(ValueError, match="splits 'train' and 'heldout', not 'test'"):
        shapes.prompts("test", 4)
    with pytest.raises(UserError, match="32 x 32 pixels, found 64 x 64"):
        score("a circle", Image.new("RGB", (64, 64)))
    with pytest.raises(UserError, match="the judge 'shapes': .* does not know the prompt 'a dog'"):
        score("a dog", picture_of([Thing("circle", "red", 8, 8)]))
    with pytest.raises(ValueError):
        ShapesJudge().score([{"prompt": "a circle"}], [])
