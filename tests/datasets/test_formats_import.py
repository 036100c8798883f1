"""What others' data become: every format read as its own tools write it, in order, in shards, after a kill too."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets import pairs
from polyalign.datasets.formats.rankings import partial_order
from polyalign.datasets.formats.table import import_format
from polyalign.datasets.pairs import PairStore


def picture(number, kind="PNG"):
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=kind)
    return buffer.getvalue()


def pickapic_rows(count, first=0):
    """Labels 1, 0, 0.5 in turn; every seventh row without a label."""
    return [
        {
            "are_different": True,
            "caption": f" prompt {number // 2} ",
            "has_label": number % 7 != 6,
            "jpg_0": picture(number, "JPEG"),
            "jpg_1": picture(1000 + number, "JPEG"),
            "label_0": [1.0, 0.0, 0.5][number % 3],
            "label_1": [0.0, 1.0, 0.5][number % 3],
            "model_0": "left",
            "model_1": "right",
        }
        for number in range(first, first + count)
    ]


def save(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(name, path, tmp_path, **options):
    store = PairStore(tmp_path / f"store-{name}")
    summary = import_format(name, path, store, options=options)
    assert store.validate() == summary["pairs"] == len(store)
    return store.rows(range(len(store)), decode=False), summary


# --- Pick-a-Pic -------------------------------------------------------------------------------------------------------------


def test_pickapic_labels_ties_and_rows_without_a_label(tmp_path):
    save(tmp_path / "data" / "train-00000-of-00002-0123456789abcdef.parquet", pickapic_rows(5), row_group_size=2)
    save(tmp_path / "data" / "train-00001-of-00002-0123456789abcdef.parquet", pickapic_rows(4, 5), row_group_size=3)
    rows, summary = read("pickapic", tmp_path / "data", tmp_path)
    kept = [number for number in range(9) if number % 3 != 2 and number % 7 != 6]
    assert [row["pair_id"] for row in rows] == [f"{number:08d}" for number in kept] == [f"{n:08d}" for n in (0, 1, 3, 4, 7)]
    assert summary["ties_dropped"] == 3 and summary["unlabelled_dropped"] == 1 and summary["rows"] == 9
    assert summary["prompts"] == 4 and summary["no_pair_prompts"] == 4
    for row, number in zip(rows, kept, strict=True):
        first = number % 3 == 0
        assert row["chosen"] == picture(number if first else 1000 + number, "JPEG")
        assert row["rejected"] == picture(1000 + number if first else number, "JPEG")
        assert row["condition"] == {"prompt": f"prompt {number // 2}"}
        origin = row["provenance"]["sampler"]
        assert (origin["chosen_model"], origin["rejected_model"]) == (("left", "right") if first else ("right", "left"))
        assert (origin["file"][:11], origin["row"]) == (f"train-0000{number // 5}", number % 5)


def test_splits_in_one_folder_are_not_mixed(tmp_path):
    save(tmp_path / "data" / "train-00000-of-00001.parquet", pickapic_rows(2))
    save(tmp_path / "data" / "validation_unique-00000-of-00001.parquet", pickapic_rows(3, 30))
    with pytest.raises(UserError, match="several splits \\(train, validation_unique\\), and no split is named"):
        read("pickapic", tmp_path / "data", tmp_path)
    rows, _ = read("pickapic", tmp_path / "data", tmp_path, split="validation_unique")
    assert rows[0]["chosen"] == picture(30, "JPEG")
    with pytest.raises(UserError, match="no split 'test'; splits here: train, validation_unique"):
        read("pickapic", tmp_path / "data", tmp_path, split="test")


@pytest.mark.parametrize("named", ["{}.parquet", "my-{}.parquet", "default/{}/0000.parquet"])
def test_splits_are_known_by_the_name_of_a_file_or_its_folder(tmp_path, named):
    for first, split in ((0, "train"), (30, "test")):
        save(tmp_path / "data" / named.format(split), pickapic_rows(2, first))
    with pytest.raises(UserError, match="several splits \\(test, train\\), and no split is named"):
        read("pickapic", tmp_path / "data", tmp_path)
    rows, _ = read("pickapic", tmp_path / "data", tmp_path, split="test")
    assert rows[0]["chosen"] == picture(30, "JPEG")


def test_parts_of_one_split_are_read_together(tmp_path):
    for first, name in enumerate(("a.parquet", "b.parquet")):
        save(tmp_path / "data" / name, pickapic_rows(1, 3 * first))
    assert len(read("pickapic", tmp_path / "data", tmp_path)[0]) == 2


def test_pickapic_as_hugging_face_saves_it(tmp_path):
    from datasets import Dataset

    Dataset.from_list(pickapic_rows(5)).save_to_disk(tmp_path / "data", num_shards=2)
    rows, summary = read("pickapic", tmp_path / "data", tmp_path)
    assert [row["pair_id"] for row in rows] == ["00000000", "00000001", "00000003", "00000004"] and summary["rows"] == 5


# --- rows -------------------------------------------------------------------------------------------------------------------


def trl_like(count):
    return {
        "prompt": [f"prompt {number}" for number in range(count)],
        "chosen": [Image.open(io.BytesIO(picture(number))) for number in range(count)],
        "rejected": [Image.open(io.BytesIO(picture(50 + number))) for number in range(count)],
        "tags": [["a", str(number)] for number in range(count)],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What Hugging Face datasets writes: one data set in two files, and one with splits."""
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    folder = tmp_path_factory.mktemp("saved")
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "tags": List(Value("string"))})
    data = Dataset.from_dict(trl_like(5), features=features)
    data.save_to_disk(folder / "one", num_shards=2)
    DatasetDict({"train": data, "test": data.select([4, 2])}).save_to_disk(folder / "splits")
    data.to_parquet(folder / "rows.parquet")
    return folder


@pytest.mark.parametrize("name", ["one", "rows.parquet"])
def test_rows_of_hugging_face(saved, tmp_path, name):
    rows, _ = read("rows", saved / name, tmp_path)
    assert [row["condition"] for row in rows] == [{"prompt": f"prompt {n}", "tags": ["a", str(n)]} for n in range(5)]
    for number, row in enumerate(rows):
        assert Image.open(io.BytesIO(row["chosen"])).tobytes() == Image.open(io.BytesIO(picture(number))).tobytes()


def test_rows_of_a_data_set_with_splits(saved, tmp_path):
    rows, _ = read("rows", saved / "splits", tmp_path, split="test")
    assert [row["condition"]["prompt"] for row in rows] == ["prompt 4", "prompt 2"]
    with pytest.raises(UserError, match="no split is named; splits here: test, train"):
        read("rows", saved / "splits", tmp_path / "other")


def test_rows_with_columns_of_other_names_and_plain_bytes(tmp_path):
    data = [{"text": "x", "win": picture(1), "lose": picture(2), "chosen": "not a picture"}]
    save(tmp_path / "mine.parquet", data)
    rows, _ = read("rows", tmp_path / "mine.parquet", tmp_path, prompt="text", chosen="win", rejected="lose")
    assert rows[0]["condition"] == {"prompt": "x", "chosen": "not a picture"} and rows[0]["chosen"] == picture(1)


def test_the_column_that_is_named_gives_the_prompt(tmp_path):
    row = {"chosen": picture(1), "rejected": picture(2), "caption": "meant", "prompt": "another"}
    save(tmp_path / "mine.parquet", [row])
    rows, _ = read("rows", tmp_path / "mine.parquet", tmp_path, prompt="caption")
    assert rows[0]["condition"] == {"prompt": "meant"}
    save(tmp_path / "empty.parquet", [row, {**row, "prompt": None}])
    with pytest.raises(UserError, match="empty.parquet row 1: column 'prompt' must be text, found nothing"):
        read("rows", tmp_path / "empty.parquet", tmp_path / "other")


@pytest.mark.parametrize("task", [3, ["colour", 1]])
def test_a_task_that_is_no_text_stays_what_it_is(tmp_path, task):
    write(tmp_path / "1.png", picture(1))
    write(tmp_path / "2.png", picture(2))
    write(tmp_path / "p.jsonl", json.dumps({"prompt": "x", "task": task, "chosen": "1.png", "rejected": "2.png"}))
    rows, _ = read("jsonl", tmp_path / "p.jsonl", tmp_path)
    assert rows[0]["condition"] == {"prompt": "x", "task": task}


# --- files ------------------------------------------------------------------------------------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_json_lines(tmp_path):
    for name, number in (("a/1.png", 1), ("a/2.png", 2), ("3.png", 3)):
        write(tmp_path / "data" / name, picture(number))
    lines = [
        {"prompt": "first", "chosen": "a/1.png", "rejected": "a/2.png", "task": "t"},
        {"caption": "second", "chosen": "3.png", "rejected": "./a/1.png", "model_0": {"x": 1}},
    ]
    write(tmp_path / "data" / "my.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)))
    write(tmp_path / "data" / "my.json", json.dumps(lines))
    for index, name in enumerate(("my.jsonl", "my.json")):
        rows, _ = read("jsonl", tmp_path / "data" / name, tmp_path / str(index))
        assert [row["condition"] for row in rows] == [
            {"prompt": "first", "task": "t"},
            {"prompt": "second", "model_0": {"x": 1}},
        ]
        assert rows[1]["chosen"] == picture(3) and rows[1]["rejected"] == picture(1)
        assert rows[0]["provenance"]["sampler"]["place"] == ["my.jsonl line 1", "my.json entry 0"][index]


def test_kohya_names(tmp_path):
    for name, number in (("b_w.png", 1), ("b_l.jpg", 2), ("a_w.webp", 3), ("a_l.png", 4), ("c_1_w.png", 5), ("c_1_l.png", 6)):
        write(tmp_path / "data" / name, picture(number, {"jpg": "JPEG", "webp": "WEBP"}.get(name.split(".")[1], "PNG")))
    write(tmp_path / "data" / "a.txt", "cat,\n  tabby")
    write(tmp_path / "data" / "b_w.caption", "dog")
    write(tmp_path / "data" / "c_1.txt", "cow")
    write(tmp_path / "data" / "c_1_w.txt", "cow")
    write(tmp_path / "data" / "Thumbs.db", b"x")
    rows, summary = read("suffixes", tmp_path / "data", tmp_path)
    found = [(row["pair_id"], row["condition"]["prompt"]) for row in rows]
    assert found == [("a", "cat, tabby"), ("b", "dog"), ("c_1", "cow")]
    assert rows[1]["rejected"] == picture(2, "JPEG") and summary["rows_dropped"] == 0
    for path in (tmp_path / "data").glob("*_[wl].*"):
        path.rename(path.with_name(path.name.replace("_w.", "-good.").replace("_l.", "-bad.")))
    rows, _ = read("suffixes", tmp_path / "data", tmp_path / "2", chosen="-good", rejected="-bad")
    assert [row["pair_id"] for row in rows] == ["a", "b", "c_1"] and rows[1]["chosen"] == picture(1)


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset(tmp_path):
    tar(
        tmp_path / "data" / "b.tar",
        [
            ("x/1.win.jpg", picture(1, "JPEG")),
            ("x/1.lose.png", picture(2)),
            ("x/1.json", b'{"caption": "one", "score": 3}'),
            ("x/2.LOSE.PNG", picture(3)),
            ("x/2.txt", b" two\n"),
            ("x/2.win.jpg", picture(4, "JPEG")),
            ("x/2.mask.npy", b"ignored"),
        ],
    )
    tar(tmp_path / "data" / "a.tar", [("1.win.png", picture(5)), ("1.lose.png", picture(6)), ("1.txt", b"zero")])
    rows, _ = read("webdataset", tmp_path / "data", tmp_path, chosen="win", rejected="lose")
    assert [(row["pair_id"], row["condition"]) for row in rows] == [
        ("1", {"prompt": "zero"}),
        ("x/1", {"prompt": "one", "score": 3}),
        ("x/2", {"prompt": "two"}),
    ]
    assert (rows[2]["chosen"], rows[2]["rejected"]) == (picture(4, "JPEG"), picture(3))


# --- rankings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path):
    for number in range(5):
        write(tmp_path / "data" / f"{number}.png", picture(number))
    write(tmp_path / "data" / "again.png", picture(0))
    paths = [f"{number}.png" for number in range(4)]
    entries = [
        {"id": "x", "prompt": "all differ", "generations": paths, "ranking": [2, 1, 4, 3]},
        {"prompt": "ties", "generations": paths, "ranking": [1, 2, 2, 2]},
        {"prompt": "one not ranked", "generations": paths, "ranking": [3, None, 1, 1]},
        {"prompt": "same picture", "generations": ["0.png", "again.png", "1.png"], "ranking": [1, 2, 3]},
        {"prompt": "partial", "generations": paths, "better": [[0, 1], [1, 2]]},
        {"prompt": "nothing preferred", "generations": paths, "ranking": [1, 1, 1, 1]},
    ]
    write(tmp_path / "data" / "test.json", json.dumps(entries))
    return tmp_path / "data" / "test.json"


def test_rankings_to_pairs(ranked, tmp_path):
    rows, summary = read("rankings", ranked, tmp_path)
    by_prompt = {}
    for row in rows:
        origin = row["provenance"]["sampler"]
        by_prompt.setdefault(row["condition"]["prompt"], []).append(f"{origin['chosen'][0]}>{origin['rejected'][0]}")
    assert by_prompt == {
        "all differ": ["1>2", "0>2", "1>3", "0>3", "1>0", "3>2"],
        "ties": ["0>1", "0>2", "0>3"],
        "one not ranked": ["2>0", "3>0"],
        "same picture": ["0>1"],
        "partial": ["0>1", "0>2", "1>2"],
    }
    assert rows[0]["pair_id"] == "000000-1-2" and rows[0]["condition"]["id"] == "x"
    assert rows[0]["chosen"] == picture(1) and rows[0]["rejected"] == picture(2)
    # ties: 3 + 1 + 6; undecided in the partial order: picture 3 against each of three
    assert (summary["ties_dropped"], summary["undecided"], summary["unranked"], summary["samples"]) == (10, 3, 1, 23)
    assert summary["no_pair_prompts"] == 1 and summary["same_pictures"] == 1


def test_best_against_worst_of_a_ranking(ranked, tmp_path):
    rows, summary = read("rankings", ranked, tmp_path, mode="best_worst")
    assert [row["pair_id"] for row in rows if row["condition"]["prompt"] == "all differ"] == ["000000-1-2"]
    rows, summary = read("rankings", ranked, tmp_path / "2", max_pairs_per_prompt=2)
    assert summary["over_limit"] == 4 + 1 + 0 + 0 + 1
    with pytest.raises(UserError, match="options.mode"):
        read("rankings", ranked, tmp_path / "3", mode="worst")
    with pytest.raises(UserError, match="options.max_pairs_per_prompt"):
        read("rankings", ranked, tmp_path / "3", max_pairs_per_prompt=0)


def test_partial_order_is_closed_and_has_no_circle():
    assert partial_order([[2, 0], [0, 3], [1, 3]], 4) == [(0, 3), (1, 3), (2, 0), (2, 3)]
    with pytest.raises(ValueError, match="goes in a circle: picture 0 is above 1, and 1 above 0"):
        partial_order([[0, 1], [1, 2], [2, 0]], 3)
    for wrong in ([[0, 0]], [[0, 5]], [[0]], [[True, False]], "x", [[0, 1.0]]):
        with pytest.raises(ValueError, match="'better' must be a list of"):
            partial_order(wrong, 3)


# --- going on ---------------------------------------------------------------------------------------------------------------


def lines_of_pairs(folder, count):
    for number in range(count):
        write(folder / f"{number}.png", picture(number))
    lines = [
        {"prompt": f"p {number}", "chosen": f"{number}.png", "rejected": f"{(number + 1) % count}.png"}
        for number in range(count)
    ]
    lines[70] |= {"rejected": "70.png"}  # the same picture twice
    write(folder / "pairs.jsonl", "\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    "missing", [["pairs-00001.parquet", "pairs-00002.parquet"], ["pairs-00000.parquet"], ["imported-00001.json"]]
)
def test_interrupted_and_again_gives_the_same_bytes(tmp_path, missing):
    lines_of_pairs(tmp_path / "data", 150)
    whole = PairStore(tmp_path / "whole")
    summary = import_format("jsonl", tmp_path / "data", whole)
    assert (summary["pairs"], summary["duplicates_dropped"], summary["duplicates"]) == (149, 1, ["000070"])
    assert len(whole.shards()) == 3
    cut = PairStore(tmp_path / "cut")
    import_format("jsonl", tmp_path / "data", cut)
    for name in [*missing, "summary.json"]:
        (cut.folder / name).unlink()
    (cut.folder / ".pairs-00001.parquet.77.tmp").write_bytes(b"half a shard")
    import_format("jsonl", tmp_path / "data", cut)
    assert contents(cut.folder) == contents(whole.folder)


def test_killed_in_the_middle_and_again_gives_the_same_bytes(tmp_path):
    lines_of_pairs(tmp_path / "data", 150)
    import_format("jsonl", tmp_path / "data", PairStore(tmp_path / "whole"))
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from polyalign.datasets.formats.importing import import_pairs
        from polyalign.datasets.formats.jsonl import JsonLines
        from polyalign.datasets.pairs import PairStore

        class Killed(JsonLines):
            def _read(self, pair_id, place, given):
                if pair_id == "000100":
                    os.kill(os.getpid(), signal.SIGKILL)
                return super()._read(pair_id, place, given)

        import_pairs(Killed(Path({str(tmp_path / "data")!r})), PairStore({str(tmp_path / "killed")!r}))
    """)
    import polyalign

    path = os.pathsep.join([str(Path(polyalign.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    killed = PairStore(tmp_path / "killed")
    assert [path.name for path in killed.shards()] == ["pairs-00000.parquet"]
    before = killed.shards()[0].stat().st_mtime_ns
    import_format("jsonl", tmp_path / "data", killed)
    assert contents(killed.folder) == contents(tmp_path / "whole")
    assert killed.shards()[0].stat().st_mtime_ns == before


def test_pairs_of_other_data_are_not_mixed_in(tmp_path):
    lines_of_pairs(tmp_path / "data", 80)
    store = PairStore(tmp_path / "store")
    import_format("jsonl", tmp_path / "data", store)
    before = contents(store.folder)
    import_format("jsonl", tmp_path / "data", store)
    assert contents(store.folder) == before
    lines_of_pairs(tmp_path / "data", 81)
    with pytest.raises(UserError, match="holds pairs from other data or with other settings \\(files changed\\)"):
        import_format("jsonl", tmp_path / "data", store)
    (store.folder / "import.json").unlink()
    with pytest.raises(UserError, match="holds pairs made in another way"):
        import_format("jsonl", tmp_path / "data", store)
    del before["import.json"]
    assert contents(store.folder) == before


def test_a_store_of_many_shards_is_read_with_few_open_files(tmp_path, monkeypatch):
    lines_of_pairs(tmp_path / "data", 300)
    store = PairStore(tmp_path / "store")
    import_format("jsonl", tmp_path / "data", store)
    whole = store.rows(range(299), decode=False)
    monkeypatch.setattr(pairs, "OPEN_FILES", 2)
    few = PairStore(tmp_path / "store")
    assert few.rows([298, 0, 150, 299 - 1, 70], decode=False) == [whole[at] for at in (298, 0, 150, 298, 70)]
    assert few.rows(range(299), decode=False) == whole and len(few.shards()) == 5
