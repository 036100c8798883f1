"""The index of pictures: order, what is never found, what is kept, and every encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import BUILDERS, picture

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import encode_png
from polyalign.datasets.worlds import scenes_rows
from polyalign.datasets.worlds.scenes import see
from polyalign.modalities.content_cache import ContentCache
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.loading import TINY_BASE
from polyalign.modalities.vlm.re_align_config import ReAlignConfig
from polyalign.modalities.vlm.retrieval import Encoder, PictureIndex, encoder_of, index_of, own_encoder
from polyalign.modalities.vlm.settings import VlmModelSettings

HAS_FAISS = importlib.util.find_spec("faiss") is not None
COLOURS = [(255, 0, 0), (0, 255, 0), (250, 20, 0), (0, 0, 255), (200, 100, 0), (255, 0, 0)]


def flat(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


class MeanColour:
    """A picture's mean colour, and how many pictures were looked at."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        self.seen += len(pictures)
        return np.stack([np.asarray(one, dtype=np.float32).mean((0, 1)) for one in pictures])


def test_the_most_similar_come_first_without_oneself_and_pictures_of_the_same_pixels() -> None:
    index = index_of([flat(colour) for colour in COLOURS], Encoder("mean colour", MeanColour()))
    assert len(index) == 5
    assert np.allclose(np.linalg.norm(index.vectors, axis=1), 1.0, atol=1e-6)
    found = index.similar(0, 3)
    assert [one.place for one in found] == [2, 4, 1]
    assert found[0].cosine == pytest.approx(250 / np.hypot(250, 20), abs=1e-6)
    assert [one.place for one in index.similar(5, 9)] == [2, 4, 1, 3]
    assert [one.place for one in index.similar(0, 2, besides=[2])] == [4, 1]
    assert [one.place for one in index.similar(3, 1)] == [0]  # three are equally far: the first of them


def test_pictures_may_be_bytes_or_paths_and_the_same_pixels_are_one_row(tmp_path: Path) -> None:
    flat((9, 8, 7)).save(tmp_path / "one.bmp")
    same = [flat((9, 8, 7)), encode_png(flat((9, 8, 7))), {"bytes": None, "path": str(tmp_path / "one.bmp")}]
    index = index_of([*same, flat((1, 2, 3))], Encoder("mean colour", MeanColour()))
    assert index.member == [0, 0, 0, 1]
    assert [one.place for one in index.similar(1, 5)] == [3]


def test_vectors_are_computed_once_for_the_same_pictures_and_encoder(tmp_path: Path) -> None:
    pictures, look = [flat(colour) for colour in COLOURS], MeanColour()
    first = index_of(pictures, Encoder("a", look), cache=ContentCache(tmp_path))
    assert look.seen == 5
    again = index_of(pictures, Encoder("a", look), cache=ContentCache(tmp_path))
    assert look.seen == 5 and np.array_equal(first.vectors, again.vectors) and first.member == again.member
    index_of(pictures, Encoder("b", look), cache=ContentCache(tmp_path))
    index_of(pictures[:-2], Encoder("a", look), cache=ContentCache(tmp_path))
    assert look.seen == 5 + 5 + 4


def test_what_cannot_be_indexed_is_refused() -> None:
    with pytest.raises(UserError, match="no pictures"):
        index_of([], Encoder("mean colour", MeanColour()))
    with pytest.raises(UserError, match="picture 1: the picture cannot be decoded"):
        index_of([flat((1, 2, 3)), encode_png(picture(0))[:60]], Encoder("mean colour", MeanColour()))
    with pytest.raises(UserError, match="no vector that has a direction"):
        index_of([flat((0, 0, 0))], Encoder("mean colour", MeanColour()))


def unit_vectors(number: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(number, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.skipif(HAS_FAISS, reason="FAISS is installed")
@pytest.mark.parametrize("kind", ["faiss", "ivf"])
def test_without_faiss_its_extra_is_named(kind: str) -> None:
    with pytest.raises(UserError, match=r"polyalign\[retrieval\]"):
        PictureIndex(unit_vectors(4, 3), range(4), kind=kind)


@pytest.mark.parametrize(
    "options", [{"kind": "faiss"}, {"kind": "ivf", "probes": 2000}, {"kind": "ivf", "lists": 7, "probes": 7}]
)
def test_faiss_finds_what_numpy_finds(options: dict[str, Any]) -> None:
    pytest.importorskip("faiss")
    vectors, member = unit_vectors(2000, 32), [*range(2000), 3, 3, 7]
    exact, other = PictureIndex(vectors, member), PictureIndex(vectors, member, **options)
    for place in range(0, len(member), 13):
        for besides in ((), (place // 2, 5)):
            wanted, found = (index.similar(place, 10, besides=besides) for index in (exact, other))
            assert [one.place for one in found] == [one.place for one in wanted] and len(found) == 10
            assert np.allclose([one.cosine for one in found], [one.cosine for one in wanted], atol=1e-6)


def test_clusters_that_are_not_searched_cost_neighbours_and_never_bring_wrong_ones(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    vectors = unit_vectors(400, 16)
    exact, some = PictureIndex(vectors, range(400)), PictureIndex(vectors, range(400), kind="ivf", probes=3)
    shares = []
    for place in range(400):
        cosines = {one.place: one.cosine for one in exact.similar(place, 399)}
        found = some.similar(place, 5)
        assert all(one.cosine == pytest.approx(cosines[one.place], abs=1e-6) for one in found)
        assert [one.cosine for one in found] == sorted((one.cosine for one in found), reverse=True)
        nearest = {one.place for one in exact.similar(place, 5)}
        shares.append(len(nearest & {one.place for one in found}) / 5)
    assert 0.3 < np.mean(shares) < 1.0
    assert capfd.readouterr().err == "", "no warnings of FAISS about few pictures"
    few = PictureIndex(vectors[:2], range(2), kind="ivf")
    assert [one.place for one in few.similar(0, 5)] == [1]


@pytest.mark.parametrize("kind", ["faiss", "ivf"])
def test_of_equally_far_ones_faiss_has_the_first_too(kind: str) -> None:
    pytest.importorskip("faiss")
    vectors = np.zeros((30, 4), np.float32)
    vectors[:10, 1], vectors[10:, 0] = 1.0, 1.0
    index = PictureIndex(vectors, range(30), kind=kind, probes=30)
    assert [one.place for one in index.similar(0, 5)] == [1, 2, 3, 4, 5]
    assert [one.place for one in index.similar(29, 3)] == [10, 11, 12]
    assert len(index.similar(0, 99)) == 29


@pytest.mark.parametrize("family", BUILDERS)
def test_every_familys_own_encoder_tells_pictures_apart(family: str, tiny_vlms: Callable[[str], Path]) -> None:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms(family)), device="cpu"))
    model = adapter.load()
    pictures = [picture(0), picture(1), picture(0)]
    for part in ("tower", "projector"):
        encoder = own_encoder(adapter, model, part)
        found = encoder.embed(pictures)
        assert found.shape[0] == 3 and np.isfinite(found).all()
        assert np.array_equal(found[0], found[2]) and not np.allclose(found[0], found[1], rtol=1e-3)
        assert model.identity in encoder.identity and part in encoder.identity


def test_the_tiny_base_finds_scenes_of_the_same_objects() -> None:
    adapter = VlmAdapter(VlmModelSettings(str(TINY_BASE), device="cpu"))
    pictures = [row["condition"]["images"][0] for row in scenes_rows.rows("train", 150, pictures=1)]
    model = adapter.load()
    index = index_of(pictures, encoder_of(adapter, model, ReAlignConfig()))

    def shared(one: int, other: int) -> float:
        first, second = (set(see(pictures[place]).names) for place in (one, other))
        return len(first & second) / len(first | second)

    near = [shared(place, index.similar(place, 1)[0].place) for place in range(60)]
    far = [shared(place, index.similar(place, 149)[-1].place) for place in range(60)]
    assert np.mean(near) > 0.45 and np.mean(far) < 0.1


def test_an_encoder_may_be_any_folder(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    adapter = VlmAdapter(VlmModelSettings(str(TINY_BASE), device="cpu"))
    encoder = encoder_of(adapter, adapter.load(), ReAlignConfig(encoder="transformers", encoder_model=str(tmp_path)))
    assert encoder.embed([picture(0), picture(1)]).shape == (2, 16)
    assert "sha256" in encoder.identity
