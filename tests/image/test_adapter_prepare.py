"""Pictures, latents, captions and micro-conditioning."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.content_cache import ContentCache
from polyalign.modalities.image import pictures
from polyalign.modalities.image.adapter import ImageAdapter

Make = Callable[..., ImageAdapter]
Rows = list[dict[str, Any]]


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_latents_and_text_are_the_pipelines_own(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sdxl", posterior="mode")
    model = adapter.load()
    batch = adapter.prepare(model, rows, step=0)
    pixels = torch.from_numpy(np.asarray(rows[0]["chosen"], dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = model.parts["vae"].encode(pixels).latent_dist.mode() * 0.13025
    torch.testing.assert_close(batch.tensors["latents"][0, 0], expected[0])
    tokens = [
        model.parts[name](rows[0]["condition"]["prompt"], padding="max_length", max_length=24, return_tensors="pt").input_ids
        for name in ("tokenizer", "tokenizer_2")
    ]
    with torch.no_grad():
        one = model.parts["text_encoder"](tokens[0], output_hidden_states=True)
        two = model.parts["text_encoder_2"](tokens[1], output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(batch.tensors["text"][0], states[0])
    torch.testing.assert_close(batch.tensors["pooled"][0], two.text_embeds[0])


def test_sd_text_is_the_last_hidden_state(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sd15")
    model = adapter.load()
    batch = adapter.prepare(model, rows, step=0)
    ids = model.parts["tokenizer"]("a red circle", padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(batch.tensors["text"][0], model.parts["text_encoder"](ids).last_hidden_state[0])
    assert set(batch.tensors) == {"latents", "text"}


def test_cache_equals_live(make_adapter: Make, rows: Rows, tmp_path: Path) -> None:
    """A warm cache, one read back from disk, and none at all give the same batch."""
    cached = make_adapter("sdxl", flip=True, cache_folder=tmp_path / "cache")
    live = make_adapter("sdxl", flip=True, cache_bytes=0)
    model = cached.load()
    for step in range(3):
        expected = live.prepare(model, rows, step=step).tensors
        reread = make_adapter("sdxl", flip=True, cache_folder=tmp_path / "cache")
        for adapter in (cached, cached, reread):
            found = adapter.prepare(model, rows, step=step).tensors
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert live.cache.bytes == 0 and list((tmp_path / "cache").rglob("*.safetensors"))


def test_bytes_are_decoded_only_for_latents_that_are_not_there(make_adapter: Make, rows: Rows, tmp_path: Path) -> None:
    """Where the latents of these very bytes are kept, the bytes may be of no picture: nobody reads them."""
    adapter = make_adapter("sdxl", posterior="mode", cache_folder=tmp_path / "cache")
    model = adapter.load()
    content = [encoded(row[side]) for row in rows for side in ("chosen", "rejected")]
    as_bytes = [{**row, "chosen": content[2 * n], "rejected": content[2 * n + 1]} for n, row in enumerate(rows)]
    expected = make_adapter("sdxl", posterior="mode").prepare(model, rows, step=0).tensors
    found = adapter.prepare(model, as_bytes, step=0).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    spoilt = [{**row, "chosen": b"no picture"} for row in as_bytes[:1]]
    with pytest.raises(UserError, match="pair pair-0, column chosen: .*cannot be decoded"):
        adapter.prepare(model, spoilt, step=0)

    def keys(picture: bytes) -> tuple[str, ...]:
        return ("vae", model.identity, str(model.parts["vae"].dtype), fingerprint(picture), str(pictures.View(32)))

    kept = adapter.cache.get(keys(content[0]), dict)
    adapter.cache.get(keys(b"no picture"), lambda: kept)
    assert torch.equal(adapter.prepare(model, spoilt, step=0).tensors["latents"][0], found["latents"][0])


def test_pictures_that_differ_in_transparency_are_two(make_adapter: Make, rows: Rows) -> None:
    clear, solid = (Image.new("RGBA", (32, 32), (255, 0, 0, alpha)) for alpha in (0, 255))
    adapter = make_adapter("sd15", posterior="mode")
    batch = adapter.prepare(adapter.load(), [{**rows[0], "chosen": clear, "rejected": solid}], step=0)
    assert not torch.equal(batch.tensors["latents"][0, 0], batch.tensors["latents"][0, 1])


def test_posterior_is_sampled_anew_from_one_cached_posterior(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sd15")
    model = adapter.load()
    first, again, later = (adapter.prepare(model, rows, step=step).tensors["latents"] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_cache_forgets_the_least_recently_used() -> None:
    cache = ContentCache(limit_bytes=80)
    made: list[str] = []

    def entry(name: str) -> dict[str, torch.Tensor]:
        return cache.get((name,), lambda: made.append(name) or {"x": torch.zeros(10)})

    for name in ("a", "b", "a", "c", "a", "b"):
        entry(name)
    assert made == ["a", "b", "c", "b"] and cache.bytes == 80


def test_a_damaged_cache_file_is_made_again(tmp_path: Path) -> None:
    ContentCache(tmp_path).get(("a",), lambda: {"x": torch.arange(3)})
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert ContentCache(tmp_path).get(("a",), lambda: {"x": torch.arange(3)})["x"].tolist() == [0, 1, 2]
    assert ContentCache(tmp_path).get(("a",), lambda: {})["x"].tolist() == [0, 1, 2]


def test_micro_conditioning_is_each_candidates_own(make_adapter: Make, make_picture: Callable[..., Image.Image]) -> None:
    """(original height, width, crop top, left, target): a 96 by 64 picture is resized to 48 by 32 and cut at left 8."""
    row = {
        "pair_id": "p",
        "condition": {"prompt": "x"},
        "chosen": encoded(make_picture(0, (96, 64))),
        "rejected": {"bytes": encoded(make_picture(1, (40, 80))), "path": None},
    }
    adapter = make_adapter("sdxl")
    ids = adapter.prepare(adapter.load(), [row], step=0).tensors["time_ids"]
    assert ids.tolist() == [[[64, 96, 0, 8, 32, 32], [80, 40, 16, 0, 32, 32]]]


def test_flip_and_crop_are_shared_inside_a_pair(make_adapter: Make, make_picture: Callable[..., Image.Image]) -> None:
    picture = make_picture(0, (48, 40))
    row = {"pair_id": "p", "condition": {"prompt": "x"}, "chosen": picture, "rejected": picture}
    adapter = make_adapter("sdxl", flip=True, crop="random", posterior="mode")
    model = adapter.load()
    batches = [adapter.prepare(model, [row], step=step).tensors for step in range(12)]
    for batch in batches:
        assert torch.equal(batch["latents"][0, 0], batch["latents"][0, 1])
        assert torch.equal(batch["time_ids"][0, 0], batch["time_ids"][0, 1])
    corners = {tuple(batch["time_ids"][0, 0, 2:4].tolist()) for batch in batches}
    views = [pictures.view_of("p", step, seed=0, resolution=32, crop="random", flip=True) for step in range(12)]
    assert len(corners) > 3 and {view.flipped for view in views} == {False, True}


def test_a_mirrored_picture_is_mirrored_and_cut_where_it_says(make_picture: Callable[..., Image.Image]) -> None:
    picture = make_picture(0, (48, 32))
    part, corner = pictures.cut(picture, pictures.View(32, (0.0, 0.25), flipped=True))
    assert corner == (0, 4)
    assert np.array_equal(np.asarray(part), np.asarray(picture)[:, ::-1][:, 4:36])


def test_caption_dropout_is_one_draw_for_the_pair(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sd15", caption_dropout=0.5)
    model = adapter.load()
    empty = adapter.prepare(model, [{**rows[0], "condition": {"prompt": ""}}], step=0).tensors["text"][0]
    plain = make_adapter("sd15").prepare(model, rows, step=0).tensors["text"]
    dropped = 0
    for step in range(20):
        text = adapter.prepare(model, rows[:1], step=step).tensors["text"][0]
        assert torch.equal(text, empty) or torch.equal(text, plain[0])
        dropped += torch.equal(text, empty)
    assert 4 < dropped < 16


def test_dropped_sdxl_captions_are_what_the_pipeline_guides_from(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sdxl", caption_dropout=1.0)
    batch = adapter.prepare(adapter.load(), rows, step=0)
    assert not batch.tensors["text"].any() and not batch.tensors["pooled"].any()  # force_zeros_for_empty_prompt


def test_pictures_become_upright_opaque_rgb(make_picture: Callable[..., Image.Image]) -> None:
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert pictures.decode(encoded(transparent), where="x").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert pictures.decode(palette, where="x").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to see it upright
    assert pictures.decode(encoded(make_picture(0, (20, 10)), "JPEG", exif=turned), where="x").size == (10, 20)
    deep = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert pictures.decode(encoded(deep), where="x").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_names_pair_and_column(
    kind: str, make_adapter: Make, rows: Rows, make_picture: Callable[..., Image.Image]
) -> None:
    content = encoded(make_picture(0, (64, 64)), kind)
    rows[1]["rejected"] = content[: len(content) // 2]
    adapter = make_adapter("sd15")
    with pytest.raises(UserError, match=r"pair pair-1, column rejected: .*truncated or damaged"):
        adapter.prepare(adapter.load(), rows, step=0)


@pytest.mark.parametrize("broken", [b"", b"no picture", None, 7, {"bytes": None, "path": None}, "missing.png"])
def test_what_is_no_picture_is_refused(broken: Any, make_adapter: Make, rows: Rows) -> None:
    rows[0]["chosen"] = broken
    adapter = make_adapter("sd15")
    with pytest.raises(UserError, match="pair pair-0, column chosen"):
        adapter.prepare(adapter.load(), rows, step=0)


def test_a_missing_caption_names_the_pair(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("sd15")
    rows[2]["condition"] = {"prompt": None}
    with pytest.raises(UserError, match="pair pair-2: the caption is missing"):
        adapter.prepare(adapter.load(), rows, step=0)
