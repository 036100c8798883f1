"""Real pictures against the base's own: what is drawn, with which seeds, and that a resumed import draws the same."""

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.formats.own_samples import Drawing, import_own_samples
from polyalign.datasets.pairs import PairStore


class Painter:
    """Draws noise by the seed; remembers what it was asked. Depends on the batch's size, as real kernels do."""

    def __init__(self):
        self.asked = []

    def __call__(self, conditions, seeds):
        self.asked.append([condition["prompt"] for condition in conditions])
        return [self.picture(seed, len(seeds)) for seed in seeds]

    @staticmethod
    def picture(seed, batch):
        noise = np.random.default_rng([seed, batch]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(noise)


@pytest.fixture
def folder(tmp_path):
    """A hundred pictures with captions; number 7 has none."""
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(100):
        Image.new("RGB", (5, 5), (number, 0, 0)).save(folder / f"{number:03d}.png")
        if number != 7:
            (folder / f"{number:03d}.txt").write_text(f"number\n {number}")
    return folder


def drawn(folder, store, painter=None, seed=3, **options):
    drawing = Drawing(painter or Painter(), "base@sha256:beef", seed, {"steps": 2})
    return import_own_samples(folder, store, drawing=drawing, **options)


def test_the_data_win_and_every_sample_has_its_own_seed(folder, tmp_path):
    store, painter = PairStore(tmp_path / "store"), Painter()
    with pytest.raises(UserError, match="007.png: no caption; expected 007.txt"):
        drawn(folder, store, painter)
    assert painter.asked == []
    summary = drawn(folder, store, painter, on_bad_row="drop")
    assert summary["pairs"] == store.validate() == 99 and summary["dropped"][0]["problem"].startswith("007.png")
    assert summary["judge"]["name"] == "data"
    assert [len(batch) for batch in painter.asked] == [64, 35] and painter.asked[0][:2] == ["number 0", "number 1"]
    row = store.rows([50])[0]
    assert row["pair_id"] == "051.png" and row["condition"] == {"prompt": "number 51"}
    assert row["chosen"].getpixel((0, 0)) == (51, 0, 0)
    seed = seed_of(3, "own_sample", 50)
    assert row["rejected"].tobytes() == Painter.picture(seed, 64).tobytes()
    provenance = row["provenance"]
    assert (provenance["model"], provenance["model_hash"]) == ("base", "sha256:beef")
    assert (provenance["chosen_seed"], provenance["rejected_seed"]) == (None, seed)
    assert provenance["sampler"]["steps"] == 2 and provenance["sampler"]["chosen"] == "051.png"
    assert (row["chosen_scores"], row["rejected_scores"]) == ({"data": 1.0}, {"data": 0.0})


def test_resumed_draws_only_what_is_missing_and_the_same(folder, tmp_path):
    (folder / "007.txt").write_text("seven")
    whole, cut, painter = PairStore(tmp_path / "whole"), PairStore(tmp_path / "cut"), Painter()
    drawn(folder, whole)
    drawn(folder, cut)
    cut.shard_path(1).unlink()
    drawn(folder, cut, painter)
    assert [len(batch) for batch in painter.asked] == [36] and cut.content_hash() == whole.content_hash()
    with pytest.raises(UserError, match="seed changed"):
        drawn(folder, cut, seed=4)


def test_folders_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        drawn(tmp_path / "none", PairStore(tmp_path / "store"))
    (folder / "notes.md").write_text("x")
    with pytest.raises(UserError, match="notes.md: neither a picture nor a caption"):
        drawn(folder, PairStore(tmp_path / "store"))
