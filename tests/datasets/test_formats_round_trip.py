"""Store -> public format -> store: the same pairs, the same bytes, in every format that goes both ways."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.convert import main
from polyalign.datasets.formats import exporting
from polyalign.datasets.formats.exporting import export_pairs
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.table import FORMATS, exporter, import_format
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import decode, fingerprint

BOTH_WAYS = ("folders", "jsonl", "pickapic", "rows", "webdataset")


def picture(number, kind="PNG", size=(8, 6)):
    """A noisy picture's file, different for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path):
    """Seven pairs with two judges' scores, seeds, a task, nested metadata and file formats that all keep their bytes."""
    kinds = ("PNG", "JPEG", "WEBP")
    rows = [
        {
            "pair_id": f"pair/{index}",
            "condition": {"prompt": f'«Hund» "{index}" 日', "task": "colour", "wanted": {"red": [index]}},
            "chosen": picture(index, kinds[index % 3]),
            "rejected": picture(100 + index, kinds[(index + 1) % 3]),
            "chosen_scores": {"a": 1.5 + index, "b": 0.1},
            "rejected_scores": {"a": -1.0, "b": 0.1},
            "provenance": {
                "model": "base",
                "model_hash": "sha256:beef",
                "chosen_seed": index,
                "rejected_seed": None,
                "sampler": {"steps": 7},
                "judges": {"a": {"version": "2"}, "b": {"version": "1"}},
            },
        }
        for index in range(7)
    ]
    store = PairStore(tmp_path / "store")
    store.write_shard(0, rows)
    return store


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_there_and_back_is_the_same_store_byte_for_byte(store, tmp_path, name, monkeypatch):
    monkeypatch.setattr(exporting, "ROWS_PER_FILE", 3)  # three files, so that their order matters
    assert export_pairs(store, exporter(name), tmp_path / "out") == 7
    back = PairStore(tmp_path / "back")
    summary = import_format(name, tmp_path / "out", back)
    assert back.rows(range(7), decode=False) == store.rows(range(7), decode=False)
    assert back.content_hash() == store.content_hash()
    assert (summary["pairs"], summary["rows"], summary["source"], summary["judge"]["name"]) == (7, 7, name, "a + b")


def test_kohya_names_keep_pictures_and_captions(store, tmp_path):
    export_pairs(store, exporter("suffixes"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:3] == ["000000.txt", "000000_l.jpg", "000000_w.png"]
    back = PairStore(tmp_path / "back")
    import_format("suffixes", tmp_path / "out", back)
    for old, new in zip(store.rows(range(7), decode=False), back.rows(range(7), decode=False), strict=True):
        assert (new["chosen"], new["rejected"]) == (old["chosen"], old["rejected"])
        assert new["condition"] == {"prompt": old["condition"]["prompt"]}


def test_every_format_that_is_written_is_tested_here():
    assert {name for name, row in FORMATS.items() if row.writes} == {*BOTH_WAYS, "suffixes"}


@pytest.mark.parametrize("name", [*BOTH_WAYS, "suffixes"])
def test_export_is_deterministic_and_leaves_nothing_beside_it(store, tmp_path, name):
    for place in ("first", "second"):
        export_pairs(store, exporter(name), tmp_path / place)
    files = [
        {path.relative_to(tmp_path / place): path.read_bytes() for path in (tmp_path / place).rglob("*") if path.is_file()}
        for place in ("first", "second")
    ]
    assert files[0] == files[1] and files[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "store"]


def test_a_gif_becomes_a_png_of_the_same_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.new("P", (5, 5), 3).save(buffer, "GIF")
    from polyalign.datasets.formats.source import Entry, Outcome, Pair, Source

    class One(Source):
        name, path = "one", tmp_path

        def identity(self):
            return {}

        def entries(self, start):
            yield from [Entry("row 0", lambda: Outcome([Pair("x", {"prompt": "p"}, buffer.getvalue(), picture(1))]))][start:]

    store = PairStore(tmp_path / "store")
    import_pairs(One(), store)
    assert store.rows([0], decode=False)[0]["chosen"] == buffer.getvalue()
    export_pairs(store, exporter("jsonl"), tmp_path / "out")
    written = (tmp_path / "out" / "pictures" / "000000-chosen.png").read_bytes()
    assert fingerprint(decode(written)) == fingerprint(decode(buffer.getvalue()))
    import_format("jsonl", tmp_path / "out", PairStore(tmp_path / "back"))


def test_what_others_read(store, tmp_path):
    for name in ("pickapic", "rows", "webdataset"):
        export_pairs(store, exporter(name), tmp_path / name)
    table = pq.read_table(tmp_path / "pickapic" / "train-00000-of-00001.parquet").to_pylist()
    assert table[2]["jpg_0"] == picture(2, "WEBP") and table[2]["label_0"] == 1.0 and table[2]["caption"] == '«Hund» "2" 日'
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    opened = load_dataset("parquet", data_dir=str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert isinstance(opened.features["chosen"], ImageColumn) and opened[0]["chosen"].size == (8, 6)
    with tarfile.open(tmp_path / "webdataset" / "pairs-000000.tar") as archive:
        assert archive.getnames()[:4] == [f"00000000.{end}" for end in ("chosen.png", "rejected.jpg", "txt", "json")]


def test_pictures_that_were_swapped_after_the_export_do_not_keep_their_scores(store, tmp_path):
    export_pairs(store, exporter("jsonl"), tmp_path / "out")
    file = tmp_path / "out" / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[4] |= {"chosen": lines[4]["rejected"], "rejected": lines[4]["chosen"]}
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError, match=r"pairs\.jsonl line 5: 'polyalign' beside this pair speaks of other pictures"):
        import_format("jsonl", tmp_path / "out", PairStore(tmp_path / "back"))
    for line in lines:
        del line["polyalign"]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    back = PairStore(tmp_path / "own")
    import_format("jsonl", tmp_path / "out", back)
    row = back.rows([4], decode=False)[0]
    assert row["chosen_scores"] == {"user": 1.0} and row["chosen"] == picture(104, "WEBP")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda known: known.update(pair_id=""), "'pair_id' is ''"),
        (lambda known: known["provenance"].update(chosen_seed="7"), "provenance 'chosen_seed' is '7'"),
        (lambda known: known["chosen_scores"].update(a=float("nan")), "chosen_scores of 'a' is nan"),
        (lambda known: known.pop("sha256"), "'sha256' is None"),
        (lambda known: known["condition"].update(prompt="another"), "'condition' holds a prompt, 'another'"),
    ],
)
def test_damaged_notes_of_an_export(store, tmp_path, change, said):
    export_pairs(store, exporter("jsonl"), tmp_path / "out")
    file = tmp_path / "out" / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    change(lines[1]["polyalign"])
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        import_format("jsonl", tmp_path / "out", PairStore(tmp_path / "back"))
    assert "pairs.jsonl line 2: 'polyalign', which an export wrote, is damaged" in str(caught.value)
    assert said in str(caught.value)


def test_export_does_not_write_over_anything(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; nothing was written"):
        export_pairs(store, exporter("jsonl"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="no pair store here"):
        export_pairs(PairStore(tmp_path / "none"), exporter("jsonl"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="'rankings' is only read"):
        exporter("rankings")


def test_command_line_both_ways(store, tmp_path, capsys):
    out, back = str(tmp_path / "out"), tmp_path / "back"
    assert main([str(store.folder), "--to", "webdataset", out]) == 0
    assert main([str(back), "--from", "webdataset", out, "--on-bad-row", "drop", "--option", "chosen=chosen"]) == 0
    printed = capsys.readouterr().out
    assert "7 pairs as webdataset" in printed and "7 pairs from 7 rows (see summary.json)" in printed
    assert PairStore(back).content_hash() == store.content_hash()
    for arguments, said in (
        (["--to", "webdatset", out], "there is no format 'webdatset'; formats: folders, "),
        (["--from", "relabel", out], "'relabel' needs judges, which a recipe names"),
        (["--from", "own_samples", out], "'own_samples' samples from a model, which a recipe names"),
        (["--to", "jsonl", out, "--on-bad-row", "drop"], "--option and --on-bad-row belong to --from"),
        (["--from", "webdataset", out, "--option", "chosen"], "write it as key=value"),
        (["--from", "webdataset", out, "--option", "chosn=x"], "no such option; its options: chosen, rejected"),
        (["--from", "webdataset", out, "--option", "chosen=3"], "options.chosen: Input should be a valid string (found 3)"),
    ):
        assert main([str(tmp_path / "x"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not Path(tmp_path / "x").exists()
