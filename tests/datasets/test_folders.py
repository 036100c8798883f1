"""The user's own pictures: what is imported, and that everything wrong is said before anything is written."""

import io
import json

import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.folders import import_folders, read_folders
from polyalign.datasets.pairs import PairStore


def save(path, number, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 20, 30)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Three pairs, with the three ways to give a caption."""
    folder = tmp_path / "mine"
    for place, (chosen, rejected) in enumerate(
        [("cat.png", "cat.jpg"), ("red dog.JPG", "red dog.webp"), ("été.webp", "été.png")]
    ):
        save(folder / "chosen" / chosen, 200 - place, (6, 8))
        save(folder / "rejected" / rejected, place)
    write(folder / "chosen" / "cat.txt", "a cat\n")
    write(folder / "red dog.txt", "\ufeffa red\n dog ")
    write(
        folder / "captions.jsonl", json.dumps({"file_name": "été.webp", "prompt": "summer", "task": "season", "mood": ["warm"]})
    )
    (folder / "chosen" / ".DS_Store").write_bytes(b"x")
    (folder / "rejected" / "Thumbs.db").write_bytes(b"x")
    return folder


def problems(folder):
    with pytest.raises(UserError) as caught:
        read_folders(folder)
    return str(caught.value)


def test_import_keeps_the_files_and_says_where_they_are_from(folder, tmp_path):
    store = PairStore(tmp_path / "pairs")
    summary = import_folders(folder, store)
    assert store.validate() == summary["pairs"] == 3
    assert json.loads((store.folder / "summary.json").read_text(encoding="utf-8")) == summary
    cat, dog, summer = store.rows(range(3))
    assert [row["pair_id"] for row in (cat, dog, summer)] == ["cat", "red dog", "été"]
    assert [row["condition"]["prompt"] for row in (cat, dog, summer)] == ["a cat", "a red dog", "summer"]
    assert summer["condition"] == {"prompt": "summer", "task": "season", "mood": ["warm"]}
    assert cat["chosen"].size == (6, 8) and cat["rejected"].size == (6, 6)
    assert cat["chosen"].getpixel((0, 0)) == (200, 20, 30)
    assert (cat["chosen_scores"], cat["rejected_scores"]) == ({"user": 1.0}, {"user": 0.0})
    origin = dog["provenance"]["sampler"]
    assert (origin["source"], origin["chosen"], origin["rejected"]) == (
        "folders",
        "chosen/red dog.JPG",
        "rejected/red dog.webp",
    )
    assert len(origin["chosen_sha256"]) == 64 and str(tmp_path) not in json.dumps(dog["provenance"])


def test_import_twice_is_the_same_store_and_drops_shards_that_were_too_many(folder, tmp_path):
    store = PairStore(tmp_path / "pairs")
    import_folders(folder, store)
    first = store.content_hash()
    store.write_shard(1, store.rows([0]))
    import_folders(folder, store)
    assert store.content_hash() == first


def test_identical_pictures_are_left_out_and_counted(folder, tmp_path):
    save(folder / "chosen" / "same.png", 9)
    save(folder / "rejected" / "same.webp", 9)
    Image.new("RGB", (6, 6), (9, 20, 30)).save(folder / "rejected" / "same.webp", lossless=True)
    write(folder / "same.txt", "twice")
    summary = import_folders(folder, PairStore(tmp_path / "pairs"))
    assert (summary["pairs"], summary["duplicates_dropped"], summary["duplicates"]) == (3, 1, ["same"])


def test_everything_wrong_is_said_at_once_and_nothing_is_written(folder, tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 70).save(whole, "JPEG")
    (folder / "rejected" / "cat.jpg").write_bytes(whole.getvalue()[:-300])
    (folder / "chosen" / "red dog.JPG").write_bytes(b"")
    save(folder / "chosen" / "alone.png", 1)
    save(folder / "rejected" / "lonely.png", 1)
    for side, number in (("chosen", 1), ("rejected", 2)):
        save(folder / side / "mute.png", number)
        save(folder / side / "blank.png", number)
    write(folder / "blank.txt", " \n")
    write(folder / "chosen" / "notes.md", "")
    save(folder / "chosen" / "cat.webp", 3)
    (folder / "rejected" / "more").mkdir()
    message = problems(folder)
    for part in (
        "9 problem(s), nothing was imported",
        "rejected/cat.jpg: a picture that does not decode",
        "chosen/red dog.JPG: not a picture",
        "chosen/alone.png has no rejected/alone.*",
        "rejected/lonely.png has no chosen/lonely.*",
        "mute: no caption; expected chosen/mute.txt",
        "blank.txt: the caption is empty",
        "chosen/notes.md is none of",
        "chosen/cat.webp has the name of chosen/cat.png",
        "rejected/more is not a file",
    ):
        assert part in message
    store = PairStore(tmp_path / "pairs")
    with pytest.raises(UserError):
        import_folders(folder, store)
    assert store.shards() == []


def test_broken_caption_lines(folder):
    lines = [
        '{"file_name": "cat.png", "prompt": "a tiger"}',
        '{"file_name": "../chosen/cat.png", "prompt": "x"}',
        '{"file_name": "/etc/passwd", "prompt": "x"}',
        '{"file_name": "C:\\\\cat.png", "prompt": "x"}',
        '{"file_name": "été", "caption": "summer"}',
        '{"file_name": "été.png", "caption": "winter"}',
        '{"file_name": "red dog.JPG"}',
        '{"prompt": "x"}',
        "nonsense",
        '{"file_name": "ghost.png", "prompt": "x"}',
    ]
    write(folder / "captions.jsonl", "\n".join(lines))
    message = problems(folder)
    assert "cat: captions.jsonl says 'a tiger', the .txt file 'a cat'" in message
    for number in (2, 3, 4):
        assert f"captions.jsonl line {number}: file_name" in message
    assert "is a path; give the name alone" in message
    assert "line 6: 'été' was named before" in message
    assert "line 7: no 'prompt'" in message
    assert "line 8: expected an object" in message
    assert "line 9: Expecting value" in message
    assert "names 'ghost', which is in neither" in message


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    secret = tmp_path / "secret.png"
    save(secret, 50)
    write(tmp_path / "secret.txt", "secret words")
    for side in ("chosen", "rejected"):
        (folder / side / "link.png").symlink_to(secret)
        save(folder / side / "word.png", len(side))
    (folder / "word.txt").symlink_to(tmp_path / "secret.txt")
    message = problems(folder)
    assert "chosen/link.png is a link that leads out of the folder" in message
    assert "rejected/link.png is a link that leads out of the folder" in message
    assert "word.txt is a link that leads out of the folder" in message
    assert "secret words" not in message
    inside = tmp_path / "inside"
    save(inside / "chosen" / "a.png", 1)
    (inside / "rejected").symlink_to(folder / "rejected")
    assert "rejected/ is a link that leads out of the folder" in problems(inside)


def test_links_inside_the_folder_are_fine(folder):
    (folder / "chosen" / "again.png").symlink_to("cat.png")
    save(folder / "rejected" / "again.png", 77)
    write(folder / "again.txt", "again")
    pairs, _ = read_folders(folder)
    assert "again" in [pair.name for pair in pairs]


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no chosen/ and no rejected/"):
        read_folders(tmp_path)
    (tmp_path / "chosen").mkdir()
    (tmp_path / "rejected").mkdir()
    assert "there are no pictures" in problems(tmp_path)
