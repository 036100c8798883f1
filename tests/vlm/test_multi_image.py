"""The builders: counts, geometry, wording, boxes, and that a row depends on nothing but its seed and its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from colour_questions import COLOURS, write_colours
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image import grid, hard, picture_in_picture, sequence
from polyalign.datasets.multi_image.drawing import shares
from polyalign.datasets.multi_image.named import lowered
from polyalign.datasets.multi_image.rows import check_row
from polyalign.datasets.multi_image.sources import Questions, plain, read_questions


def colour_at(image: Image.Image, box: list[int]) -> tuple[int, ...]:
    """The colour in the middle of a box."""
    return image.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))  # pyright: ignore[reportReturnType]


def words(row: dict) -> str:
    """The first message as one text, images as <image>."""
    parts = row["condition"]["messages"][0]["content"]
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)


def rgb(name: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))  # pyright: ignore[reportReturnType]


class TestShares:
    def test_published_counts_come_back(self) -> None:
        assert shares(sequence.COUNTS, 2195) == {2: 1200, 3: 350, 4: 350, 5: 295}
        assert shares(grid.COUNTS, 8000) == {2: 3800, 3: 1100, 4: 1100, 6: 1100, 9: 900}

    def test_sum_is_kept(self) -> None:
        for total in range(30):
            given = shares(sequence.COUNTS, total)
            assert sum(given.values()) == total
            assert all(abs(given[n] - total * part / 2195) < 1 for n, part in sequence.COUNTS.items())

    @pytest.mark.parametrize("counts", [{}, {2: 0}, {2: -1, 3: 4}])
    def test_no_shares(self, counts: dict[int, float]) -> None:
        with pytest.raises(UserError, match="expected numbers of images with the share"):
            shares(counts, 5)


class TestSequence:
    def test_wording(self, colours: Questions) -> None:
        rows = sequence.build(colours, seed=3, counts={3: 1})
        row = rows[0]
        target = row["condition"]["layout"]["targets"][0]
        expected = f"Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image{target + 1}, what colour is it?"
        assert words(row) == expected
        assert row["chosen"] == "red" and len(rows) == 12

    def test_target_is_the_items_picture(self, colours: Questions) -> None:
        for row, colour in zip(sequence.build(colours, seed=0), COLOURS, strict=True):
            layout, images = row["condition"]["layout"], row["condition"]["images"]
            (target,), (box,) = layout["targets"], layout["target_boxes"]
            assert layout["places"][target] == {"image": target, "box": box}
            assert box == [0, 0, *images[target].size]
            assert colour_at(images[target], box) == rgb(colour) and row["chosen"] == colour
            shown = [colour_at(image, [0, 0, *image.size]) for image in images]
            assert len(set(shown)) == len(shown)  # no picture twice
            beside = {tuple(rgb(answer)) for answer in row["confusions"]}
            assert beside == set(shown) - {rgb(colour)}
            check_row(row)

    def test_counts_by_source(self, tmp_path: Path) -> None:
        folder = write_colours(tmp_path, 40)
        rows = sequence.build(read_questions(folder), seed=1)
        assert rows.summary() == {"rows": 40, "images": shares(sequence.COUNTS, 40), "sources": {"coco": 40}}

    def test_slots_are_even(self, tmp_path: Path) -> None:
        folder = write_colours(tmp_path, 400)
        plans = sequence.build(read_questions(folder), seed=1, counts={4: 1}).plans
        slots = Counter(plan.slot for plan in plans)
        assert set(slots) == {0, 1, 2, 3} and max(slots.values()) < 140
        drawn = Counter(name for plan in plans for place, name in enumerate(plan.pictures) if place != plan.slot)
        assert len(drawn) > 360  # 1,200 draws of 400 pictures: e^-3 of them, 20, are never drawn

    def test_same_seed_same_rows_in_any_order(self, colours: Questions) -> None:
        first, second = sequence.build(colours, seed=5), sequence.build(colours, seed=5)
        backwards = [second[place] for place in reversed(range(12))][::-1]
        for one, other in zip(first, backwards, strict=True):
            images = one["condition"].pop("images"), other["condition"].pop("images")
            assert one == other and [i.tobytes() for i in images[0]] == [i.tobytes() for i in images[1]]
        assert sequence.build(colours, seed=6).plans != first.plans

    def test_later_turns(self, tmp_path: Path) -> None:
        folder = write_colours(tmp_path, 3)
        turns = [("<image>\nWhat is it?", "A square."), ("Is it big?", "No.")]
        said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
        entries = [{"id": "x", "image": f"coco/{number}.png", "conversations": said} for number in range(3)]
        (tmp_path / "llava.json").write_text(json.dumps([*entries, {"conversations": said[2:]}]), encoding="utf-8")
        questions = read_questions(tmp_path / "llava.json")
        assert questions.text_only == 1 and len(questions.items) == 3 and folder == questions.folder
        row = sequence.build(questions, seed=0, counts={2: 1}, turns=2)[0]
        assert [message["role"] for message in row["condition"]["messages"]] == ["user", "assistant", "user"]
        name = row["condition"]["layout"]["targets"][0] + 1
        assert words(row).endswith(f"In Image{name}, what is it?")
        assert row["condition"]["messages"][2]["content"][0]["text"] == f"In image{name}, is it big?"
        assert row["chosen"] == "No." and row["confusions"] == []
        assert sequence.build(questions, seed=0, counts={2: 1})[0]["chosen"] == "A square."


class TestGrid:
    @pytest.mark.parametrize(
        ("count", "size"), [(2, (936, 488)), (3, (1424, 488)), (4, (936, 976)), (6, (1424, 976)), (9, (1424, 1464))]
    )
    def test_geometry(self, colours: Questions, count: int, size: tuple[int, int]) -> None:
        row = grid.build(colours, seed=0, counts={count: 1}, limit=1)[0]
        (sheet,) = row["condition"]["images"]
        layout = row["condition"]["layout"]
        assert sheet.size == size == grid.canvas(count) and len(layout["places"]) == count
        for place in layout["places"]:
            left, top, right, bottom = place["cell"]
            assert (right - left, bottom - top) == (448, 448)
            assert place["box"][:2] == [left, top] and max(place["box"][2] - left, place["box"][3] - top) == 448
            pixels = np.asarray(sheet)[top:bottom, left:right]
            inside = np.asarray(sheet)[top : place["box"][3], left : place["box"][2]]
            assert (inside == inside[0, 0]).all() and (pixels != 255).any(-1).sum() <= inside.shape[0] * inside.shape[1]
        (target,) = layout["targets"]
        assert colour_at(sheet, layout["target_boxes"][0]) == rgb(row["chosen"])
        assert words(row) == f"<image>\nIn Image{target + 1}, what colour is it?"
        check_row(row)

    def test_names_stand_above_their_cells(self, colours: Questions) -> None:
        sheet = np.asarray(grid.build(colours, seed=0, counts={4: 1}, limit=1)[0]["condition"]["images"][0])
        for left, top, _, _ in grid.cells(4):
            strip = sheet[top - 40 : top, left : left + 448]
            assert (strip < 100).all(-1).sum() > 200 and (strip[:, :19] == 255).all() and (strip[:, 200:] == 255).all()

    def test_five_images_make_no_collage(self, colours: Questions) -> None:
        with pytest.raises(UserError, match="a collage of 5 images is not known; allowed are 2, 3, 4, 6, 9"):
            grid.build(colours, seed=0, counts={5: 1})

    def test_font(self, colours: Questions, tmp_path: Path) -> None:
        (tmp_path / "font.ttf").write_bytes(b"no font")
        with pytest.raises(UserError, match="does not open as a TrueType font"):
            grid.build(colours, seed=0, counts={2: 1}, font=tmp_path / "font.ttf")[0]


class TestPictureInPicture:
    def test_geometry(self) -> None:
        assert picture_in_picture.inset_box((640, 480), (500, 300)) == (110, 45, 390, 255)
        assert picture_in_picture.inset_box((300, 900), (640, 480)) == (264, 72, 376, 408)

    def test_rows(self, colours: Questions) -> None:
        rows = picture_in_picture.build(colours, seed=2)
        openings = set()
        for row, colour in zip(rows, COLOURS, strict=True):
            (sheet,), layout = row["condition"]["images"], row["condition"]["layout"]
            assert layout["targets"] == [0] and layout["places"][1]["box"] == [0, 0, *sheet.size]
            assert colour_at(sheet, layout["target_boxes"][0]) == rgb(colour) != sheet.getpixel((0, 0))
            opening, question = words(row).removeprefix("<image>\n").split(", ", 1)
            assert opening in picture_in_picture.PHRASINGS and question == "what colour is it?"
            openings.add(opening)
            check_row(row)
        assert len(openings) > 6

    def test_phrasings(self) -> None:
        assert len(set(picture_in_picture.PHRASINGS)) == 90
        assert {"Regarding the central image", "For the subplot in the center"} <= set(picture_in_picture.PHRASINGS)

    def test_coordinates_are_left_out(self, tmp_path: Path) -> None:
        write_colours(tmp_path, 4)
        lines = (tmp_path / "questions.jsonl").read_text().splitlines()
        boxed = json.loads(lines[0]) | {"answer": "At [0.11, 0.2, .5, 1]."}
        vg = json.loads(lines[1]) | {"source": "vg"}
        (tmp_path / "questions.jsonl").write_text("\n".join([json.dumps(boxed), json.dumps(vg), *lines[2:]]))
        questions = read_questions(tmp_path)
        rows = picture_in_picture.build(questions, seed=0)
        assert [plan.item.number for plan in rows.plans] == [2, 3]
        only = Questions(questions.folder, questions.items[:2])
        with pytest.raises(UserError, match="cannot be asked of a picture in a picture"):
            picture_in_picture.build(only, seed=0)


class TestHard:
    @pytest.mark.parametrize("arrangement", ["sequence", "grid"])
    def test_search(self, colours: Questions, arrangement: hard.Format) -> None:
        rows = hard.search(colours, seed=0, arrangement=arrangement, counts={2: 1, 4: 1})
        assert rows.summary()["images"] == {2: 6, 4: 6}
        for row, colour in zip(rows, COLOURS, strict=True):
            layout = row["condition"]["layout"]
            (target,) = layout["targets"]
            place = layout["places"][target]
            assert colour_at(row["condition"]["images"][place["image"]], place["box"]) == rgb(colour)
            assert row["chosen"] == f"Image{target + 1}" and layout["level"] == 3
            assert sorted([row["chosen"], *row["confusions"]]) == [f"Image{n + 1}" for n in range(len(layout["places"]))]
            ending = f'For one of the images the answer to the question "What colour is it?" is "{colour}". Which image is it?'
            assert words(row).endswith("\n" + ending)
            check_row(row)

    def test_compare(self, tmp_path: Path) -> None:
        rows = hard.compare(read_questions(write_colours(tmp_path, 36)), seed=0)
        verdicts = Counter()
        for row in rows:
            layout = row["condition"]["layout"]
            seen = [colour_at(row["condition"]["images"][t], layout["places"][t]["box"]) for t in layout["targets"]]
            names = [f"Image{target + 1}" for target in layout["targets"]]
            told = dict(part.split(": ") for part in row["chosen"].split(". ")[:2])
            assert [rgb(told[name]) for name in names] == seen and list(told) == names
            agree = seen[0] == seen[1]
            assert row["chosen"].endswith("They agree." if agree else "They differ.")
            ending = f"Compare {names[0]} and {names[1]}: what colour is it? Answer for each image and say whether the answers "
            assert words(row).endswith(ending + "agree.") and layout["level"] == 2
            assert row["chosen"] not in row["confusions"] and len(row["confusions"]) == 3 - agree
            verdicts[agree] += 1
            check_row(row)
        assert verdicts[True] > 9 and verdicts[False] > 9 and len({row["pair_id"] for row in rows}) == 36

    def test_instructions_of_how_to_answer_are_left_out(self, tmp_path: Path) -> None:
        write_colours(tmp_path, 2)
        lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
        for line in lines:
            line["question"] = "What colour is it?\nAnswer the question using a single word."
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        questions = read_questions(tmp_path)
        assert "using a single word" not in words(hard.compare(questions, seed=0, counts={2: 1})[0])
        assert 'question "What colour is it?" is "red"' in words(hard.search(questions, seed=0, counts={2: 1})[0])

    def test_equal_answers_in_other_words_are_no_confusion(self, tmp_path: Path) -> None:
        write_colours(tmp_path, 2)
        lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
        lines[0]["answer"], lines[1]["answer"] = "A bus.", "bus"
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (row, _) = hard.compare(read_questions(tmp_path), seed=0, counts={2: 1})
        assert row["chosen"].endswith("They agree.") and [answer[-12:] for answer in row["confusions"]] == ["They differ."]

    def test_answers_that_may_mean_the_same_are_never_set_against_each_other(self, tmp_path: Path) -> None:
        write_colours(tmp_path, 2)
        lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
        lines[0]["answer"], lines[1]["answer"] = "red", "a dark red"
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for level in (hard.search, hard.compare):
            with pytest.raises(UserError, match="data that ask the same of many pictures"):
                level(read_questions(tmp_path), seed=0)

    def test_a_picture_with_two_answers_is_not_used(self, tmp_path: Path) -> None:
        write_colours(tmp_path, 3)
        doubled = json.dumps({"image": "coco/0.png", "question": "What colour is it", "answer": "pink"})
        with open(tmp_path / "questions.jsonl", "a", encoding="utf-8") as file:
            file.write(doubled)
        rows = hard.search(read_questions(tmp_path), seed=0, counts={2: 1})
        assert [plan.item.number for plan in rows.plans] == [1, 2]
        assert all("coco/0.png" not in plan.pictures for plan in rows.plans)


def test_words() -> None:
    assert lowered("What is it?") == "what is it?" and lowered("") == ""
    assert plain(" The  Red Bus. ") == plain("red bus") == "red bus"
