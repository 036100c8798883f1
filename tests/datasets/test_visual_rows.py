"""Preferences about pictures: every published form reads to the same rows, and bad ones are named and lose nothing."""

import json

import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.table import ANSWER_SOURCES, import_format, listed_files
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import content_digest, encode_png
from polyalign.datasets.visual_prompts import load_visual_prompts


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 10), (number * 50, 9, 9)).save(tmp_path / f"{number}.png")
    Image.new("RGB", (20, 10), (5, 5, 200)).save(tmp_path / "photo.jpg")
    return tmp_path


def lines(folder, *rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def read(folder, *rows, **given):
    store = PairStore(folder / "store", "text", pictured=True)
    import_format("rows", lines(folder, *rows), store, formats=ANSWER_SOURCES, **given)
    assert store.validate() == len(store)
    return store.rows(range(len(store)), decode=False)


def said(role, content):
    return {"role": role, "content": content}


IMAGE = {"type": "image"}


def words(content):
    return {"type": "text", "text": content}


def test_trl_conversations_keep_the_places_of_their_images(folder):
    prompt = [said("user", [IMAGE, words("and"), IMAGE, words("which?")])]
    chosen, rejected = [said("assistant", [words("first")])], [said("assistant", "second")]
    (row,) = read(folder, {"images": ["0.png", "1.png"], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert row["condition"]["messages"] == prompt
    assert row["condition"]["prompt"] == "and which?"
    assert (row["chosen"], row["rejected"]) == ("first", "second")
    assert [image["bytes"] for image in row["condition"]["images"]] == [(folder / f"{n}.png").read_bytes() for n in (0, 1)]
    assert "rejected_images" not in row


def test_rlhf_v_and_its_packed_form_read_alike(folder):
    packed = json.dumps({"question": "What?", "chosen": "A", "rejected": "B"})
    plain, unpacked = read(
        folder,
        {"image": "photo.jpg", "question": "What?", "chosen": "A", "rejected": "B", "ds_name": "x"},
        {"image": {"path": "photo.jpg"}, "text": packed, "ds_name": "x"},
    )
    assert plain["condition"] == unpacked["condition"]
    assert plain["condition"]["messages"] == [said("user", [IMAGE, words("What?")])]
    assert plain["condition"]["images"][0]["bytes"] == (folder / "photo.jpg").read_bytes()  # not encoded anew


def test_re_align_has_a_losing_image(folder):
    shared = said("user", "<image>\nWhat is it?")
    conversations = {"chosen": [shared, said("assistant", "a cat")], "rejected": [shared, said("assistant", "a dog")]}
    (row,) = read(folder, {"image": "0.png", "retrieved_image": "1.png", **conversations})
    assert [image["bytes"] for image in row["rejected_images"]] == [(folder / "1.png").read_bytes()]
    assert row["condition"]["messages"][0]["content"][0] == IMAGE


def test_losing_messages_come_with_a_row(folder):
    losing = [said("user", [IMAGE, words("Another post")])]
    row = {"image": "0.png", "prompt": "A post", "chosen": "a", "rejected": "b", "rejected_messages": losing}
    assert read(folder, row)[0]["rejected_messages"] == losing


def test_all_bad_rows_are_named_at_once_and_good_ones_are_kept_when_asked(folder):
    good = {"image": "0.png", "prompt": "a", "chosen": "b", "rejected": "c"}
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:200])
    bad = [
        {**good, "image": "../elsewhere.png"},
        {**good, "prompt": "<image> <image> a"},
        {**good, "image": "cut.jpg"},
        {**good, "image": "missing.png"},
        {**good, "chosen": " "},
        {**good, "retrieved_image": ["0.png", "1.png"]},
        {**good, "text": 3, "rejected": None},
    ]
    with pytest.raises(UserError) as caught:
        read(folder, good, *bad)
    message = str(caught.value)
    for wanted in (
        "line 2: image[0]: '../elsewhere.png' lies outside",
        "line 3: 2 place(s) for images (<image>) in the prompt, and 1 image(s)",
        "line 4: image[0]: ",
        "line 5: image[0]: there is no file 'missing.png'",
        "line 6: column 'chosen': the answer is empty",
        "line 7: 2 losing image(s), and 1 image(s)",
        "line 8: ",
    ):
        assert wanted in message, wanted
    assert len(read(folder, good, *bad, on_bad_row="drop")) == 1


def test_the_pictures_that_rows_name_are_listed(folder):
    file = lines(
        folder, {"images": ["0.png", "1.png"], "prompt": "a", "chosen": "b", "rejected": "c", "retrieved_image": "2.png"}
    )
    found = listed_files("rows", file, ANSWER_SOURCES)
    assert sorted(path.name for path in found) == ["0.png", "1.png", "2.png"]


def row_of(number, **more):
    picture = Image.new("RGB", (6, 4), (number, 0, 0))
    return {
        "pair_id": f"{number}",
        "condition": {"prompt": "q", "messages": [said("user", [IMAGE, words("q")])], "images": [picture]},
        "chosen": "a",
        "rejected": "b",
        "chosen_scores": {"user": 1.0},
        "rejected_scores": {"user": 0.0},
        "provenance": {"model": "m", "sampler": {}, "judges": {}},
        **more,
    }


def test_a_store_keeps_pictures_of_conditions_and_what_loses(tmp_path):
    store = PairStore(tmp_path / "pairs", "text", pictured=True)
    losing = [said("user", [IMAGE, words("other")])]
    given = [row_of(0), row_of(1, rejected_images=[Image.new("RGB", (6, 4), "blue")], rejected_messages=losing)]
    store.write_shard(0, given)
    first, second = store.rows([0, 1])
    assert store.validate() == 2
    assert first["condition"]["images"][0]["bytes"] == encode_png(given[0]["condition"]["images"][0])
    assert "rejected_images" not in first and "rejected_messages" not in first
    assert second["rejected_messages"] == losing
    assert store.conditions()[1]["images"] == second["condition"]["images"]
    assert content_digest(given[0]["condition"]["images"][0]) == content_digest(first["condition"]["images"][0])


def test_another_store_takes_them_over_and_datasets_opens_them(tmp_path):
    store = PairStore(tmp_path / "pairs", "text", pictured=True)
    store.write_shard(0, [row_of(1, rejected_images=[Image.new("RGB", (6, 4), "blue")])])
    second = PairStore(tmp_path / "second", "text", pictured=True)
    import_format("store", store.folder, second, formats=ANSWER_SOURCES)
    assert second.rows([0])[0]["rejected_images"] == store.rows([0])[0]["rejected_images"]
    opened = second.open()[0]
    assert opened["images"][0].size == (6, 4)
    assert opened["rejected_images"][0].getpixel((0, 0)) == (0, 0, 255)


def test_a_store_with_too_few_pictures_is_refused(tmp_path):
    store = PairStore(tmp_path / "pairs", "text", pictured=True)
    two = [said("user", [IMAGE, IMAGE, words("q")])]
    row = row_of(0)
    store.write_shard(0, [row | {"condition": row["condition"] | {"messages": two}}])
    with pytest.raises(UserError, match=r"column 'images': 2 place\(s\) for images in the messages, and 1 image"):
        store.validate()


def test_questions_are_read_from_lines(folder):
    file = lines(
        folder, {"prompt": "What?", "image": "0.png", "label": "x"}, {"messages": [said("user", "Hello")]}, name="q.jsonl"
    )
    first, second = load_visual_prompts(file)
    assert first["messages"] == [said("user", [IMAGE, words("What?")])]
    assert first["label"] == "x"
    assert second["images"] == [] and second["prompt"] == "Hello"
    with pytest.raises(UserError, match=r"1 broken entry:\n.*line 1: 1 place\(s\) for images in the messages, and 0"):
        load_visual_prompts(lines(folder, {"messages": [said("user", [IMAGE, words("q")])]}, name="q.jsonl"))


def test_rows_without_any_picture_are_refused_and_some_are_counted(folder, capsys):
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r"none of the first 2 row\(s\) has a picture: .*columns found are prompt, chosen, rej"):
        read(folder, {**plain, "img": "0.png"}, {**plain, "images": []})
    assert len(read(folder, plain, {**plain, "image": "0.png"})) == 2
    assert "1 of 2 rows have no picture and are read as text alone" in capsys.readouterr().err
    assert json.loads((folder / "store" / "summary.json").read_text())["without_picture"] == 1


def test_a_losing_image_is_another_one(folder):
    row = {"image": "0.png", "rejected_images": ["0.png"], "prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match="line 1: the losing image is the image itself"):
        read(folder, row)
