"""What a user may give that is wrong: each is refused with its place, and nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from colour_questions import write_colours
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image import grid, sequence
from polyalign.datasets.multi_image.rows import check_row
from polyalign.datasets.multi_image.sources import KEPT_PIXELS, read_questions

LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def with_entry(folder: Path, entry: dict[str, Any]) -> Path:
    """Four good entries and a bad one."""
    write_colours(folder, 4)
    with open(folder / "questions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return folder


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"image": "coco/0.png", "question": "What?", "answer": " "}, "an answer is empty"),
        ({"image": "coco/0.png", "question": "<image>", "answer": "Yes"}, "a question is empty"),
        ({"image": "coco/0.png", "question": "What?", "answer": 3}, "an answer must be text, found int"),
        ({"image": "coco/0.png", "question": "What?"}, "no 'answer' here"),
        ({"image": "coco/9.png", "question": "What?", "answer": "A"}, "no such file"),
        ({"image": "../0.png", "question": "What?", "answer": "A"}, "climbs out"),
        ({"image": "http://example.org/0.png", "question": "What?", "answer": "A"}, "is an address"),
        ({"image": "coco/0.png", "question": "<image> or <image>?", "answer": "A"}, r"2 placeholder\(s\) <image> and 1 pict"),
        ({"image": ["coco/0.png", "coco/1.png"], "question": "<image>?", "answer": "A"}, r"1 placeholder\(s\) <image> and 2"),
        ({"image": "coco/0.png", "conversations": [{**LLAVA[0], "value": "What?"}, LLAVA[1]]}, r"0 placeholder\(s\)"),
        ({"conversations": LLAVA}, r"1 placeholder\(s\) <image> and 0 picture\(s\)"),
        ({"image": "coco/0.png", "conversations": LLAVA[:1]}, "questions and answers in turn"),
        ({"image": "coco/0.png", "conversations": LLAVA[::-1]}, "must alternate between human and gpt"),
        ({"image": "coco/0.png", "question": "What?", "answer": "<image>"}, "answers are text"),
        ({"image": "coco/0.png", "question": "What?", "answer": "A", "source": 3}, "'source' must be text"),
    ],
)
def test_bad_entries(tmp_path: Path, entry: dict[str, Any], problem: str) -> None:
    folder = with_entry(tmp_path, entry)
    with pytest.raises(UserError, match=problem) as caught:
        read_questions(folder)
    assert "questions.jsonl line 5" in str(caught.value) and "pairs.multi_image.on_bad_row" in str(caught.value)
    kept = read_questions(folder, on_bad_row="drop")
    assert len(kept.items) == 4 and [one["place"] for one in kept.dropped] == ["questions.jsonl line 5"]


def test_damaged_picture(tmp_path: Path) -> None:
    folder = write_colours(tmp_path, 4)
    Image.effect_noise((200, 200), 90).convert("RGB").save(folder / "coco" / "cut.jpg")
    whole = (folder / "coco" / "cut.jpg").read_bytes()
    (folder / "coco" / "1.png").write_bytes(whole[: len(whole) // 2])
    rows = sequence.build(read_questions(folder), seed=0, counts={2: 1})
    hit = [place for place, plan in enumerate(rows.plans) if "coco/1.png" in plan.pictures]
    with pytest.raises(UserError, match=r"coco/1\.png: a picture that does not decode.*needed for questions\.jsonl line"):
        rows[hit[0]]
    dropped: list[dict[str, str]] = []
    assert len(list(rows.usable(dropped))) == 4 - len(hit) and len(dropped) == len(hit)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_large_picture_is_scaled_down_when_it_is_opened(tmp_path: Path, ending: str) -> None:
    """One of 30 megapixels, half red; lying on its side as cameras write it."""
    folder = write_colours(tmp_path, 3)
    large = Image.new("RGB", (6000, 5000), (10, 20, 200))
    large.paste((200, 30, 10), (0, 0, 3000, 5000))
    turned = Image.Exif()
    turned[0x0112] = 6
    large.save(folder / "coco" / "0.png", format={"png": "PNG", "jpg": "JPEG"}[ending], exif=turned)
    questions = read_questions(folder)
    found = questions.open("coco/0.png")
    assert found.width < found.height and 0.99 * KEPT_PIXELS < found.width * found.height <= KEPT_PIXELS
    assert found.width / found.height == pytest.approx(5 / 6, abs=1e-3)
    for place, colour in ((0.25, (200, 30, 10)), (0.75, (10, 20, 200))):
        assert found.getpixel((found.width // 2, int(found.height * place))) == pytest.approx(colour, abs=3)
    for build in (sequence.build, grid.build):
        assert len(list(build(questions, seed=0, counts={2: 1}))) == 3


def test_a_picture_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    folder = write_colours(tmp_path, 2)
    Image.new("1", (13000, 11000)).save(folder / "coco" / "0.png")
    rows = sequence.build(read_questions(folder), seed=0, counts={2: 1})
    with pytest.raises(UserError, match=r"13000 x 11000 pixels \(143.0 megapixels\); at most 134.2 megapixels"):
        rows[0]


def test_a_large_picture_that_is_cut_off_is_told(tmp_path: Path) -> None:
    folder = write_colours(tmp_path, 2)
    Image.effect_noise((5000, 4000), 90).convert("RGB").save(folder / "coco" / "0.png", format="JPEG", quality=30)
    whole = (folder / "coco" / "0.png").read_bytes()
    (folder / "coco" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"coco/0\.png: a picture that does not decode"):
        read_questions(folder).open("coco/0.png")


def test_decompression_bomb_is_never_opened(tmp_path: Path) -> None:
    folder = write_colours(tmp_path, 2)
    small = (folder / "coco" / "0.png").read_bytes()
    (folder / "coco" / "0.png").write_bytes(small[:16] + (60000).to_bytes(4, "big") * 2 + small[24:])
    with pytest.raises(UserError, match=r"coco/0\.png"):
        read_questions(folder).open("coco/0.png")


def test_too_few_pictures(tmp_path: Path) -> None:
    write_colours(tmp_path, 3)
    questions = read_questions(tmp_path)
    with pytest.raises(UserError, match=r"5 images are asked for, and source 'coco' has 3 different"):
        sequence.build(questions, seed=0)
    assert sequence.build(questions, seed=0, counts={3: 1}).summary()["images"] == {3: 3}
    with pytest.raises(UserError, match="at least one row"):
        sequence.build(questions, seed=0, counts={2: 1}, limit=0)


def test_sources_stay_apart_unless_asked(tmp_path: Path) -> None:
    write_colours(tmp_path / "data", 3)
    write_colours(tmp_path / "more", 3, "gqa")
    (tmp_path / "more" / "gqa").rename(tmp_path / "data" / "gqa")
    lines = (tmp_path / "data" / "questions.jsonl").read_text() + (tmp_path / "more" / "questions.jsonl").read_text()
    (tmp_path / "data" / "questions.jsonl").write_text(lines)
    questions = read_questions(tmp_path / "data")
    for plan in sequence.build(questions, seed=0, counts={3: 1}).plans:
        assert {name.split("/")[0] for name in plan.pictures} == {plan.item.source}
    mixed = sequence.build(questions, seed=0, counts={5: 1}, across_sources=True)
    assert all(len(set(plan.pictures)) == 5 for plan in mixed.plans)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions\.jsonl: no such file"):
        read_questions(tmp_path)
    (tmp_path / "x.json").write_text('[{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]')
    with pytest.raises(UserError, match=r"no question about a picture \(1 entries without one, 0 bad\)"):
        read_questions(tmp_path / "x.json")
    with pytest.raises(UserError, match="no such folder of pictures"):
        read_questions(tmp_path / "x.json", tmp_path / "nowhere")


def test_row_check() -> None:
    picture = Image.new("RGB", (4, 4))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    row = {"condition": {"messages": messages, "images": [picture]}, "chosen": "A cat.", "rejected": "A dog."}
    check_row(row)
    check_row({**row, "rejected_images": [picture], "rejected_messages": messages})
    for changed, problem in (
        ({"condition": {"messages": messages, "images": []}}, r"1 image placeholder\(s\) in the messages, and 0 image"),
        ({"rejected_images": [picture, picture]}, r"1 image placeholder\(s\) in the messages with rejected_images, and 2"),
        ({"rejected_messages": [{"role": "user", "content": "What?"}]}, r"0 image placeholder\(s\) in the rejected_messages"),
        ({"rejected": ""}, "row 3: rejected is empty"),
        ({"chosen": None}, "row 3: chosen must be text, found nothing"),
        ({"condition": {}}, "needs 'messages'"),
    ):
        with pytest.raises(UserError, match=problem):
            check_row({**row, **changed}, "row 3")
