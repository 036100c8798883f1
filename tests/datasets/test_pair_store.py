"""The pair store: what goes in comes out, the bytes are a function of the rows, and broken rows are named."""

import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import decode


def picture(number, size=(8, 6)):
    return Image.new("RGB", size, (number % 256, 255 - number % 256, 7))


def row(number, **changes):
    return {
        "pair_id": f"pair-{number:03d}",
        "condition": {"prompt": f"prompt {number}", "task": "colour", "objects": [{"shape": "circle", "n": number}]},
        "chosen": picture(number),
        "rejected": picture(number + 100),
        "chosen_scores": {"shapes": 1.0},
        "rejected_scores": {"shapes": -1.0 + number / 7},
        "provenance": {
            "model": "tiny",
            "model_hash": "abc",
            "chosen_seed": 2**62 + number,
            "rejected_seed": None,
            "sampler": {"steps": 4, "guidance": 5.0},
            "judges": {"shapes": {"version": "1"}},
        },
        **changes,
    }


@pytest.fixture
def store(tmp_path):
    store = PairStore(tmp_path / "pairs")
    store.write_shard(0, [row(number) for number in range(11)])
    store.write_shard(1, [row(number) for number in range(11, 14)])
    return store


def test_rows_come_back_in_the_order_asked_for(store):
    assert len(store) == 14
    rows = store.rows([13, 0, 9])
    for found, number in zip(rows, [13, 0, 9], strict=True):
        expected = row(number)
        for name in ("pair_id", "condition", "chosen_scores", "rejected_scores", "provenance"):
            assert found[name] == expected[name]
        for side in ("chosen", "rejected"):
            assert found[side].mode == "RGB" and found[side].tobytes() == expected[side].tobytes()
    with pytest.raises(IndexError):
        store.rows([14])
    encoded = store.rows([13, 0], decode=False)
    assert [decode(found["rejected"]).tobytes() for found in encoded] == [picture(number + 100).tobytes() for number in (13, 0)]
    assert encoded[0]["condition"] == row(13)["condition"] and encoded[0]["provenance"] == row(13)["provenance"]
    assert store.conditions() == [row(number)["condition"] for number in range(14)]


def test_same_rows_same_bytes(store, tmp_path):
    other = PairStore(tmp_path / "other")
    other.write_shard(1, [row(number) for number in range(11, 14)])
    assert other.missing(3) == [0, 2]
    other.write_shard(0, [row(number) for number in range(11)])
    for index in (0, 1):
        assert other.shard_path(index).read_bytes() == store.shard_path(index).read_bytes()
    assert other.content_hash() == store.content_hash()
    other.write_shard(0, [row(0)])
    assert other.content_hash() != store.content_hash()


def test_metadata_of_a_picture_does_not_reach_the_store(tmp_path):
    marked = picture(1)
    marked.info["dpi"] = (300, 300)
    marked.info["icc_profile"] = b"profile"
    plain, other = PairStore(tmp_path / "a"), PairStore(tmp_path / "b")
    plain.write_shard(0, [row(1)])
    other.write_shard(0, [row(1, chosen=marked)])
    assert plain.content_hash() == other.content_hash()


def test_hugging_face_datasets_opens_it_with_image_columns(store, tmp_path, monkeypatch):
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    store.write_shard(2, [], judges=["shapes"])  # a shard whose prompts gave no pair
    opened = store.open()
    assert len(opened) == 14
    assert isinstance(opened.features["chosen"], datasets.Image) and isinstance(opened.features["rejected"], datasets.Image)
    assert opened[12]["rejected"].tobytes() == picture(112).tobytes()
    assert opened[12]["condition"]["prompt"] == "prompt 12"
    assert opened[12]["chosen_scores"] == {"shapes": 1.0}
    assert opened[12]["provenance"]["chosen_seed"] == 2**62 + 12
    assert store.validate() == 14 and len(store) == 14


def test_picture_files_are_kept_as_they_are(tmp_path):
    buffer = io.BytesIO()
    picture(3, (16, 16)).save(buffer, "JPEG", quality=60)
    store = PairStore(tmp_path)
    store.write_shard(0, [row(0, chosen=buffer.getvalue())])
    stored = pq.read_table(store.shard_path(0)).to_pylist()[0]
    assert stored["chosen"]["bytes"] == buffer.getvalue()
    assert store.rows([0])[0]["chosen"].size == (16, 16)


def test_transparency_is_laid_on_white(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    store = PairStore(tmp_path)
    store.write_shard(0, [row(0, chosen=buffer.getvalue())])
    assert store.rows([0])[0]["chosen"].getpixel((0, 0)) == (255, 255, 255)


def test_left_overs_of_a_killed_run_are_ignored_and_removed(store):
    left = store.folder / ".pairs-00002.parquet.123.tmp"
    left.write_bytes(b"half")
    (store.folder / "pairs-copy.parquet").write_bytes(b"not ours")
    assert store.validate() == 14 and store.missing(3) == [2]
    store.clear()
    assert sorted(path.name for path in store.folder.iterdir()) == ["pairs-copy.parquet"]


def test_different_judges_cannot_share_a_store_row(tmp_path):
    store = PairStore(tmp_path)
    with pytest.raises(ValueError, match="judges"):
        store.write_shard(0, [row(0), row(1, chosen_scores={"other": 1.0})])
    with pytest.raises(ValueError, match="judge"):
        store.write_shard(0, [])
    assert store.shards() == []


def test_no_store_here(tmp_path):
    with pytest.raises(UserError, match="no pair store here"):
        len(PairStore(tmp_path))


def test_every_broken_row_is_named(store):
    png = io.BytesIO()
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    noise.save(png, "PNG")
    jpeg = io.BytesIO()
    noise.save(jpeg, "JPEG")
    store.write_shard(
        1,
        [
            row(20, chosen=png.getvalue()[:-400]),
            row(21, rejected=jpeg.getvalue()[:-400]),
            row(22, condition={"prompt": "  "}),
            row(3),
            row(24, chosen_scores={"shapes": float("nan")}),
            row(25, chosen=b"GIF? no"),
            row(26),
        ],
    )
    with pytest.raises(UserError) as caught:
        store.validate()
    message = str(caught.value)
    assert "6 problem(s)" in message
    shard = "pairs-00001.parquet"
    assert f"{shard} row 0 (pair_id 'pair-020'), column 'chosen': a picture that does not decode" in message
    assert f"{shard} row 1 (pair_id 'pair-021'), column 'rejected': a picture that does not decode" in message
    assert f"{shard} row 2 (pair_id 'pair-022'), column 'condition': the caption (prompt) is missing" in message
    assert f"{shard} row 3 (pair_id 'pair-003'), column 'pair_id': was used before, at pairs-00000.parquet row 3" in message
    assert f"{shard} row 4 (pair_id 'pair-024'), column 'chosen_scores': judge 'shapes' gave nan" in message
    assert f"{shard} row 5 (pair_id 'pair-025'), column 'chosen': not a picture" in message
    with pytest.raises(UserError, match="row 1 .*'pair-021'.*'rejected'"):
        store.rows([12])
    assert store.rows([17])[0]["pair_id"] == "pair-026"
    assert store.rows([12], decode=False)[0]["rejected"] == jpeg.getvalue()[:-400]


def test_missing_and_wrongly_typed_columns_and_damaged_shards_are_named(store):
    table = pq.read_table(store.shard_path(1))
    pq.write_table(table.drop_columns(["rejected"]).set_column(0, "pair_id", pa.array([1, 2, 3])), store.shard_path(1))
    whole = store.shard_path(0).read_bytes()
    store.shard_path(2).write_bytes(whole[: len(whole) // 2])
    store.shard_path(4).write_bytes(whole)
    with pytest.raises(UserError) as caught:
        store.validate()
    message = str(caught.value)
    assert "shard pairs-00003.parquet is missing" in message
    assert "pairs-00001.parquet: column 'pair_id' must be string, found int64" in message
    assert "pairs-00001.parquet: column 'rejected' is missing" in message
    assert "pairs-00002.parquet: not a readable parquet file" in message


def test_a_full_disk_keeps_what_was_finished(store):
    """The temporary name is laid on /dev/full, whose every write fails as on a full disk."""
    before = store.content_hash()
    (store.folder / f".pairs-00002.parquet.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="disk is full.*pairs-00002.parquet.* kept"):
        store.write_shard(2, [row(30)])
    assert sorted(path.name for path in store.folder.iterdir()) == ["pairs-00000.parquet", "pairs-00001.parquet"]
    assert store.content_hash() == before and store.validate() == 14
    store.write_shard(2, [row(30)])
    assert store.validate() == 15
