"""Bad input: an error that names file and row, or, where that is asked for, a drop that is counted and listed; nothing lost."""

import io
import json
import os
import struct
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.checking import check_member, check_picture
from polyalign.datasets.formats.table import import_format
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import decode, fingerprint


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(number, kind="PNG", size=(8, 6)):
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), kind)


def png(width, height, depth, colour, rows=b""):
    """A PNG file by hand, with whatever its header claims."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif_of_another_type():
    """A JPEG turned by its EXIF, in which the resolution is bytes and no fraction."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, (72, 1)
    return saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif).replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")


def tiff_with_an_empty_second_page():
    content = bytearray(saved(Image.new("RGB", (8, 8)), "TIFF"))
    first = int.from_bytes(content[4:8], "little")
    following = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    content[following : following + 4] = len(content).to_bytes(4, "little")
    return bytes(content) + bytes(8)


FRAMES = [Image.new("RGB", (9, 9), (number * 90, 20, 30)) for number in range(3)]
BAD = {
    "CMYK": (saved(Image.new("CMYK", (8, 8), (9, 200, 30, 0)), "JPEG"), "a CMYK picture"),
    "16-bit grey": (saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999)), "16 or more bits a channel"),
    "16-bit colour": (png(4, 4, 16, 2, (b"\0" + bytes(range(24))) * 4), "16 or more bits a channel"),
    "float": (saved(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "16 or more bits a channel"),
    "animated GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "an animated picture (3 frames)"),
    "animated WebP": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "an animated picture (3 frames)"),
    "animated PNG": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "an animated picture (3 frames)"),
    "1x1": (saved(Image.new("RGB", (1, 1))), "a picture of 1 x 1 pixels; each side needs at least 2"),
    "1 x 50": (saved(Image.new("RGB", (1, 50))), "a picture of 1 x 50 pixels"),
    "140 megapixels": (png(14000, 10000, 8, 2), "a picture of 14000 x 10000 pixels (140.0 megapixels); at most 134.2"),
    "169 megapixels": (png(13000, 13000, 8, 2), "169.0 megapixels"),
    "a bomb": (png(60000, 60000, 8, 2), "exceeds limit"),
    "cut off": (picture(1, "JPEG", (64, 64))[:-300], "a picture that does not decode"),
    "cut off PNG": (picture(1, "PNG", (64, 64))[:-3000], "a picture that does not decode"),
    "damaged EXIF": (exif_of_another_type(), "a picture that does not decode"),
    "damaged TIFF": (tiff_with_an_empty_second_page(), "not a picture in a format that can be read"),
    "text": (b"<html>404</html>", "not a picture in a format that can be read (16 bytes)"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture in a format"),
    "empty": (b"", "must hold a picture"),
}


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "empty"])
def test_pictures_that_are_refused(kind):
    content, said = BAD[kind]
    with pytest.raises(ValueError) as caught:
        check_picture(content)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [Image.new(mode, (5, 4)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
    ids=lambda image: image.mode,
)
def test_pictures_that_are_fine(image):
    content = saved(image)
    assert check_picture(content) == fingerprint(decode(content))


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def row(number, **change):
    good = {"jpg_0": picture(number), "jpg_1": picture(500 + number), "label_0": 1.0, "caption": f"p {number}"}
    return {**good, **change}


def fails(name, path, tmp_path, **options):
    store = PairStore(tmp_path / "store")
    with pytest.raises(UserError) as caught:
        import_format(name, path, store, **options)
    return str(caught.value)


# --- rows of parquet --------------------------------------------------------------------------------------------------------


def test_every_bad_picture_is_named_by_file_and_row_and_can_be_dropped(tmp_path):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    save(path, [row(0), *(row(1 + at, jpg_1=content) for at, (content, _) in enumerate(BAD.values())), row(90)])
    message = fails("pickapic", path, tmp_path)
    assert f"{path}: {len(BAD)} bad row(s); shards finished before are kept" in message
    for at, (_, said) in enumerate(BAD.values()):
        assert f"train-00000-of-00001.parquet row {1 + at}: " in message and said in message
    assert "pairs.on_bad_row: drop" in message
    assert PairStore(tmp_path / "store").shards() == []
    store = PairStore(tmp_path / "store")
    summary = import_format("pickapic", path, store, on_bad_row="drop")
    assert store.validate() == summary["pairs"] == 2 and summary["rows_dropped"] == len(BAD)
    assert [entry["place"] for entry in summary["dropped"]] == [f"{path.name} row {1 + at}" for at in range(len(BAD))]
    for entry, (_, said) in zip(summary["dropped"], BAD.values(), strict=True):
        assert said in entry["problem"]
    assert json.loads((store.folder / "summary.json").read_text(encoding="utf-8")) == summary


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_0": 0.7}, "label_0 must be 0, 0.5 or 1, found 0.7"),
        ({"label_0": None}, "label_0 must be 0, 0.5 or 1, found None"),
        ({"label_0": float("nan")}, "found nan"),
        ({"caption": "  "}, "'prompt' is empty"),
        ({"caption": None}, "no 'prompt'"),
        ({"jpg_0": None}, "column 'jpg_0' must hold a picture"),
    ],
)
def test_rows_of_pickapic(tmp_path, change, said):
    save(tmp_path / "t.parquet", [row(0), row(1, **change)])
    message = fails("pickapic", tmp_path / "t.parquet", tmp_path)
    assert "t.parquet row 1: " in message and said in message
    summary = import_format("pickapic", tmp_path / "t.parquet", PairStore(tmp_path / "dropped"), on_bad_row="drop")
    assert (summary["pairs"], summary["rows_dropped"], summary["dropped"][0]["place"]) == (1, 1, "t.parquet row 1")


def test_columns_and_files_that_are_missing_or_damaged_are_errors_even_when_rows_may_be_dropped(tmp_path):
    save(tmp_path / "a" / "x.parquet", [{"jpg_0": b"", "jpg_1": b"", "label": 1.0, "caption": "x"}])
    for policy in ("error", "drop"):
        message = fails("pickapic", tmp_path / "a", tmp_path, on_bad_row=policy)
        assert "x.parquet: no column 'label_0'; columns: jpg_0, jpg_1, label, caption" in message
    assert "no column 'prompt', 'chosen', 'rejected'" in fails("rows", tmp_path / "a", tmp_path)
    save(tmp_path / "b" / "x.parquet", [row(number) for number in range(40)])
    content = (tmp_path / "b" / "x.parquet").read_bytes()
    (tmp_path / "b" / "x.parquet").write_bytes(content[: len(content) // 2])
    assert "x.parquet: not a readable parquet file" in fails("pickapic", tmp_path / "b", tmp_path)
    assert "no such file or folder" in fails("pickapic", tmp_path / "none", tmp_path)
    (tmp_path / "c").mkdir()
    assert "no files ending in .parquet or .arrow" in fails("rows", tmp_path / "c", tmp_path)
    (tmp_path / "c" / "state.json").write_text('{"_data_files": [{"filename": "../b/x.parquet"}]}')
    assert "climbs out of its folder" in fails("rows", tmp_path / "c", tmp_path)


def test_a_path_in_a_picture_column_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(1))
    only = {"bytes": None, "path": str(tmp_path / "secret.png")}
    save(tmp_path / "t.parquet", [{"prompt": "x", "chosen": only, "rejected": {"bytes": picture(2), "path": "y.png"}}])
    assert "row 0: column 'chosen' holds only the path" in fails("rows", tmp_path / "t.parquet", tmp_path)


def test_shards_finished_before_a_bad_row_are_kept_and_gone_on_from(tmp_path):
    rows = [row(number) for number in range(300)]
    save(tmp_path / "t.parquet", [*rows[:280], row(280, label_0=2.0), *rows[281:]])
    message = fails("pickapic", tmp_path / "t.parquet", tmp_path)
    assert "1 bad row(s); shards finished before are kept" in message and "row 280: label_0" in message
    store = PairStore(tmp_path / "store")
    assert len(store) == 256
    before = store.shards()[0].stat().st_mtime_ns
    summary = import_format("pickapic", tmp_path / "t.parquet", store, on_bad_row="drop")
    assert summary["pairs"] == len(store) == 299 and store.shards()[0].stat().st_mtime_ns == before
    assert store.validate() == 299
    before = store.content_hash()
    assert "1 bad row(s) were left out here before" in fails("pickapic", tmp_path / "t.parquet", tmp_path)
    assert store.content_hash() == before
    store.shards()[0].write_bytes(b"PAR1")
    assert "pairs-00000.parquet: not a readable parquet file" in fails("pickapic", tmp_path / "t.parquet", tmp_path)


def test_nothing_left_says_why(tmp_path):
    save(tmp_path / "t.parquet", [row(0, label_0=0.5), row(1, jpg_1=picture(1)), row(2, label_0=9.0)])
    message = fails("pickapic", tmp_path / "t.parquet", tmp_path, on_bad_row="drop")
    assert "no pair is left (3 rows, 1 ties dropped, 1 rows dropped); in 1 the two pictures are identical" in message
    assert "The first row dropped: label_0 must be" in message


# --- paths ------------------------------------------------------------------------------------------------------------------

CLIMBING = {
    "../out.png": "climbs out",
    "a/../../out.png": "climbs out",
    "..\\out.png": "climbs out",
    "/etc/passwd": "is an absolute path",
    "C:\\x.png": "is an absolute path",
    "\\\\host\\x.png": "is an absolute path",
    "https://example.org/x.png": "is an address; nothing is downloaded",
    "file:///etc/passwd": "is an address",
    "data:image/png;base64,AAAA": "is an address",
    "a\0.png": "is an absolute path",
    "": "expected a path",
    "none.png": "no such file",
    "link.png": "is a link that leads out of the folder",
    "folder": "no such file",
}


@pytest.mark.parametrize("name", CLIMBING)
def test_json_lines_stay_in_their_folder(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    (folder / "1.png").write_bytes(picture(1))
    (tmp_path / "out.png").write_bytes(picture(2))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    lines = [{"prompt": "x", "chosen": "1.png", "rejected": name}, {"prompt": "y", "chosen": name, "rejected": "1.png"}]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    message = fails("jsonl", folder / "p.jsonl", tmp_path)
    assert "p.jsonl line 1: " in message and "p.jsonl line 2: " in message and message.count(CLIMBING[name]) == 2
    ranked = [{"prompt": "x", "generations": ["1.png", name], "ranking": [1, 2]}]
    (folder / "r.json").write_text(json.dumps(ranked), encoding="utf-8")
    assert CLIMBING[name] in fails("rankings", folder / "r.json", tmp_path)


@pytest.mark.parametrize("name", ["a/b.png", "./a.png", "..a/b..png", "å b.png"])
def test_paths_that_stay_inside(name):
    check_member(name)


def test_broken_lines(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    good = {"prompt": "x", "chosen": "1.png", "rejected": "2.png"}
    lines = [
        json.dumps(good),
        "{broken",
        "[1]",
        '{"prompt": "x", "chosen": "1.png"}',
        json.dumps({**good, "prompt": ""}),
        json.dumps({**good, "chosen": 7}),
        json.dumps({**good, "chosen": ["1.png"]}),
        json.dumps({**good, "prompt": "half \ud800"}),
        json.dumps(good)[:-1] + ', "x": ' + "[" * 100_000 + "}",
        json.dumps({**good, "polyalign": 3}),
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    message = fails("jsonl", tmp_path / "p.jsonl", tmp_path)
    for part in (
        "9 bad row(s)",
        "p.jsonl line 2: not JSON",
        "p.jsonl line 3: expected an object, found list",
        "p.jsonl line 4: no 'rejected'; found 'prompt', 'chosen'",
        "p.jsonl line 5: 'prompt' is empty",
        "p.jsonl line 6: expected a path below the data's folder, found 7",
        "p.jsonl line 7: expected a path below the data's folder, found ['1.png']",
        "p.jsonl line 8: text that is not Unicode: ",
        "p.jsonl line 9: JSON that is nested too deeply",
        "p.jsonl line 10: expected an object, found int",
    ):
        assert part in message
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "été"}'.encode("latin-1"))
    assert "latin.jsonl: not UTF-8 text" in fails("jsonl", tmp_path / "latin.jsonl", tmp_path)
    (tmp_path / "r.json").write_text("{}")
    assert "expected a list of objects, found dict" in fails("rankings", tmp_path / "r.json", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranking": [1]}, "'ranking' must give a number for each of the 2 pictures, found 1"),
        ({"ranking": [1, 10**400]}, "'ranking' must be of numbers"),
        ({"ranking": [1, "2"]}, "'ranking' must be of numbers (1 the best) or null, found '2'"),
        ({"ranking": None}, "expected one of 'ranking'"),
        ({"better": [[0, 1]]}, "expected one of 'ranking'"),
        ({"ranking": None, "better": [[0, 1], [1, 0]]}, "goes in a circle"),
        ({"generations": ["1.png"]}, "'generations' must be a list of at least two paths"),
        ({"prompt": None}, "no 'prompt'"),
        ({"generations": ["1.png", "tiny.png"]}, "tiny.png: a picture of 1 x 1 pixels"),
    ],
)
def test_bad_rankings(tmp_path, change, said):
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    (tmp_path / "tiny.png").write_bytes(BAD["1x1"][0])
    entry = {"prompt": "x", "generations": ["1.png", "2.png"], "ranking": [1, 2]} | change
    (tmp_path / "r.json").write_text(json.dumps([entry]))
    message = fails("rankings", tmp_path / "r.json", tmp_path)
    assert "r.json entry 0: " in message and said in message


# --- folders ----------------------------------------------------------------------------------------------------------------


def test_kohya_names_that_are_no_pairs(tmp_path):
    for name in ("a_w.png", "a_l.png", "a_l.jpg", "b_w.png", "c.png", "_w.png", "d_w.png", "d_l.png", "e_w.png", "e_l.png"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(picture(len(name) + ord(name[0])) + name.encode())
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "d.txt").write_text(" \n")
    (tmp_path / "data" / "e.txt").write_text("e")
    (tmp_path / "data" / "e_w.txt").write_text("f")
    (tmp_path / "data" / "notes.md").write_text("x")
    message = fails("suffixes", tmp_path / "data", tmp_path)
    around = (
        "a_l.png has the name of a_l.jpg",
        "b_w.png has no b_l.*",
        "c.png ends in neither _w nor _l",
        "_w.png ends in neither",
        "notes.md is none of",
    )
    for part in (*around, "5 problem(s), nothing was imported"):
        assert part in message
    for number, side in enumerate("wl"):
        (tmp_path / "data" / f"a_{side}.png").write_bytes(picture(number))
    (tmp_path / "data" / "a_l.jpg").unlink()
    summary = import_format("suffixes", tmp_path / "data", PairStore(tmp_path / "dropped"), on_bad_row="drop")
    assert (summary["pairs"], summary["rows_dropped"]) == (1, 6)
    said = [entry["place"] + ": " + entry["problem"] for entry in summary["dropped"]]
    assert "pair d: d.txt: the caption is empty" in said
    assert "pair e: e.txt and e_w.txt say different things: 'e', 'f'" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep such names out")
def test_names_that_are_not_unicode(tmp_path):
    folder = os.fsencode(tmp_path / "data")
    os.mkdir(folder)
    for name, number in ((b"\xff_w.png", 1), (b"\xff_l.png", 2), (b"a_w.png", 3), (b"a_l.png", 4)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(picture(number))
    for name in (b"\xff.txt", b"a.txt"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"words")
    assert "text that is not Unicode" in fails("suffixes", tmp_path / "data", tmp_path)
    summary = import_format("suffixes", tmp_path / "data", PairStore(tmp_path / "store"), on_bad_row="drop")
    assert summary["pairs"] == 1 and summary["dropped"][0]["place"] == "pair \\udcff"


def test_folders_may_drop_what_is_wrong_with_single_pairs(tmp_path):
    for side, first in (("chosen", 0), ("rejected", 50)):
        (tmp_path / "data" / side).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "data" / side / f"{number}.png").write_bytes(picture(first + number))
    for number in range(2):
        (tmp_path / "data" / f"{number}.txt").write_text(f"p {number}")
    (tmp_path / "data" / "chosen" / "1.png").write_bytes(BAD["CMYK"][0])
    message = fails("folders", tmp_path / "data", tmp_path)
    assert "chosen/1.png: a CMYK picture" in message and "2: no caption" in message
    store = PairStore(tmp_path / "store")
    summary = import_format("folders", tmp_path / "data", store, on_bad_row="drop")
    assert [row["pair_id"] for row in store.rows(range(len(store)))] == ["0"]
    assert summary["rows_dropped"] == 2
    assert any("chosen/1.png: a CMYK picture" in entry["problem"] for entry in summary["dropped"])


# --- tar --------------------------------------------------------------------------------------------------------------------


def sample(key, number):
    return [(f"{key}.chosen.png", picture(number)), (f"{key}.rejected.png", picture(70 + number)), (f"{key}.txt", b"p")]


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for member in members:
            name, content = member if isinstance(member, tuple) else (member, b"")
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BAD_SAMPLES = {
    "climbs": (sample("../../2", 2), "sample '../../2': member '../../2.chosen.png' climbs out of its folder"),
    "absolute": (sample("/2", 2), "member '/2.chosen.png' is an absolute path"),
    "link": ([*sample("2", 2)[:2], link("2.txt", "/etc/passwd", tarfile.SYMTYPE)], "is no plain file but a link"),
    "hard link": ([*sample("2", 2)[1:], link("2.chosen.png", "1.txt", tarfile.LNKTYPE)], "is no plain file but a link"),
    "device": ([*sample("2", 2), link("2.x", "", tarfile.CHRTYPE)], "is no plain file"),
    "one picture": (sample("2", 2)[1:], "no 2.chosen.*; fields: rejected.png, txt"),
    "two pictures": ([*sample("2", 2), ("2.chosen.jpg", b"x")], "more than one 2.chosen.*"),
    "no caption": (sample("2", 2)[:2], "no caption; expected 2.txt or 2.json"),
    "empty caption": ([*sample("2", 2)[:2], ("2.txt", b" ")], "'prompt' is empty"),
    "two captions": ([*sample("2", 2), ("2.json", b'{"prompt": "q"}')], "the .txt says 'p', the .json 'q'"),
    "broken json": ([*sample("2", 2)[:2], ("2.json", b"{")], "not JSON"),
    "not text": ([*sample("2", 2)[:2], ("2.txt", b"\xff\xfe")], "'2.txt' is not UTF-8 text"),
    "long text": ([*sample("2", 2)[:2], ("2.txt", b"x" * (1 << 20) + b"x")], "at most 1,048,576 are read"),
    "key again": (sample("1", 9), "the name '1' was used before"),
    "twice": ([*sample("2", 2), ("2.txt", b"p")], "'2.txt' is there twice"),
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_bad_samples_of_a_tar_file(tmp_path, kind):
    members, said = BAD_SAMPLES[kind]
    middle = [] if kind == "key again" else sample("3", 3)
    path = tar(tmp_path / "x.tar", [*sample("1", 1), *sample("0", 5), *members, *middle])
    message = fails("webdataset", path, tmp_path)
    assert "x.tar sample " in message and said in message
    store = PairStore(tmp_path / "dropped")
    summary = import_format("webdataset", path, store, on_bad_row="drop")
    assert summary["rows_dropped"] == 1 and said.split("sample '../../2': ")[-1] in summary["dropped"][0]["problem"]
    assert [row["pair_id"] for row in store.rows(range(len(store)))] == (["1", "0"] if not middle else ["1", "0", "3"])


def test_tar_files_that_are_none(tmp_path):
    whole = tar(tmp_path / "x.tar", [*sample("1", 1), *sample("2", 2)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(picture(72)) + 20])
    message = fails("webdataset", tmp_path / "cut.tar", tmp_path)
    assert "cut.tar" in message and ("not a readable tar file" in message or "is cut off" in message)
    (tmp_path / "no.tar").write_bytes(b"hello" * 300)
    assert "no.tar: not a readable tar file after sample 0" in fails("webdataset", tmp_path / "no.tar", tmp_path)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.txt"))
    assert "Unpack it first" in fails("webdataset", tmp_path / "x.tar.gz", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no such tar file" in fails("webdataset", tmp_path / "empty", tmp_path)
