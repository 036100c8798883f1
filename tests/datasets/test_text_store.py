"""The pair store with outputs that are texts, and that it tells kinds of outputs apart."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets import convert
from polyalign.datasets.outputs import KINDS, kind_of
from polyalign.datasets.pair_rows import schema_of
from polyalign.datasets.pairs import PairStore

TURNS = [{"role": "user", "content": "Größe?\n"}]


def row(index, chosen=None, rejected=None):
    return {
        "pair_id": f"pair-{index:03d}",
        "condition": {"prompt": f"Größe {index}?\n", "task": "size", "messages": TURNS, "reference": {"µg": index}},
        "chosen": f" {index} µg — 日本 🙂\n" if chosen is None else chosen,
        "rejected": " nothing" if rejected is None else rejected,
        "chosen_scores": {"user": 1.0},
        "rejected_scores": {"user": 0.0},
        "provenance": {"model": "m", "chosen_seed": index, "sampler": {"temperature": 1.0}},
    }


@pytest.fixture
def store(tmp_path):
    made = PairStore(tmp_path / "store", "text")
    made.write_shard(0, [row(index) for index in range(20)])
    made.write_shard(1, [row(20)])
    return made


def test_texts_come_back_as_they_were(store):
    assert len(store) == 21 and store.validate() == 21
    for decode in (True, False):
        found = PairStore(store.folder).rows([0, 20, 7], decode=decode)
        assert [one["chosen"] for one in found] == [row(index)["chosen"] for index in (0, 20, 7)]
    assert found[1]["condition"] == row(20)["condition"] == store.conditions()[20]


def test_the_kind_is_read_from_the_store(store, tmp_path):
    assert PairStore(store.folder).kind is KINDS["text"]
    with pytest.raises(UserError, match="a store of pairs of texts, and pairs of pictures are needed here"):
        PairStore(store.folder, "picture").validate()
    with pytest.raises(UserError, match="pairs of pictures are needed here"):
        PairStore(store.folder, "picture").rows([0])


def test_the_same_rows_give_the_same_bytes(store, tmp_path):
    other = PairStore(tmp_path / "other", "text")
    other.write_shard(0, [row(index) for index in range(20)])
    other.write_shard(1, [row(20)])
    assert other.content_hash() == store.content_hash()


def test_hugging_face_opens_it_as_text(store):
    opened = store.open()
    assert opened.features["chosen"].dtype == opened.features["rejected"].dtype == "string"
    assert opened[3]["chosen"] == row(3)["chosen"] and opened[3]["condition"]["prompt"] == "Größe 3?\n"


def test_a_shard_without_rows_keeps_its_kind(tmp_path):
    store = PairStore(tmp_path, "text")
    store.write_shard(0, [], judges=["user"])
    assert PairStore(tmp_path).kind.name == "text" and len(store) == 0


@pytest.mark.parametrize("chosen", ["", " \n", None])
def test_an_empty_answer_is_a_problem_of_its_cell(store, chosen):
    table = pq.read_table(store.shard_path(1)).to_pylist()
    table[0]["chosen"] = chosen
    pq.write_table(pa.Table.from_pylist(table, schema=schema_of(["user"], KINDS["text"])), store.shard_path(1))
    with pytest.raises(UserError, match=r"pairs-00001.parquet row 0 \(pair_id 'pair-020'\), column 'chosen'"):
        PairStore(store.folder).validate()


def test_an_output_of_another_kind_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="expected text, found bytes"):
        PairStore(tmp_path, "text").write_shard(0, [row(0, chosen=b"bytes")])
    assert not PairStore(tmp_path).shards()


def test_shards_of_two_kinds_do_not_come_together(store):
    picture = Image.new("RGB", (4, 4))
    PairStore(store.folder, "picture").write_shard(2, [row(21, chosen=picture, rejected=picture)])
    with pytest.raises(UserError, match="pairs-00002.parquet: holds pictures, and the first shard texts"):
        PairStore(store.folder).validate()


def test_columns_of_no_known_kind_are_named(tmp_path):
    table = pa.table({**{name: pa.array([1]) for name in ("pair_id", "chosen", "rejected")}})
    tmp_path.joinpath("s").mkdir()
    pq.write_table(table, tmp_path / "s" / "pairs-00000.parquet")
    with pytest.raises(UserError, match=r"'chosen' must be struct<.*\(pictures\) or string \(texts\) or .*, found int64"):
        PairStore(tmp_path / "s").validate()


def test_each_kind_is_known_again_by_its_schema():
    for kind in KINDS.values():
        assert kind_of(schema_of(["user"], kind)) is kind
        alike = next(other for other in KINDS.values() if other.arrow == kind.arrow)
        assert kind_of(schema_of(["user"], kind).remove_metadata()) is alike, (
            "without the note for datasets: the first of its type"
        )
    assert [kind.name for kind in KINDS.values() if kind.arrow == KINDS["picture"].arrow] == ["picture", "sound"]
    assert kind_of(pa.schema([("chosen", pa.int64())])) is None and kind_of(pa.schema([])) is None


def test_a_fingerprint_is_that_of_the_content():
    text = "µg 🙂"
    assert KINDS["text"].fingerprint(text) == KINDS["text"].check(text) == hashlib.sha256(text.encode()).hexdigest()
    assert KINDS["text"].empty(" \n") and not KINDS["text"].empty("a") and not KINDS["picture"].empty(Image.new("RGB", (2, 2)))


def test_a_store_that_is_told_nothing_is_for_pictures(tmp_path):
    """The schema's types and note are part of a file: without ``outputs``, they are those of pictures."""
    picture = Image.new("RGB", (4, 4), (200, 10, 10))
    store = PairStore(tmp_path)
    given = row(0, chosen=picture, rejected=Image.new("RGB", (4, 4)))
    store.write_shard(0, [given])
    schema = pq.read_schema(store.shard_path(0))
    assert schema.equals(schema_of(["user"]), check_metadata=True)
    assert str(schema.field("chosen").type) == "struct<bytes: binary, path: string>"
    assert store.rows([0])[0]["chosen"].getpixel((0, 0)) == (200, 10, 10)


def test_a_store_of_texts_is_not_written_as_pictures(store, tmp_path, capsys):
    assert convert.main([str(store.folder), "--to", "jsonl", str(tmp_path / "out")]) != 0
    assert "holds pairs of texts" in capsys.readouterr().err and not (tmp_path / "out").exists()
