"""Where each token looks, against the processors themselves: a white box in a black picture appears in the same tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.token_geometry import Geometry, anyres, check_tokens, cropped, padded, stretched, tiled

SIZES = [(96, 50), (51, 97), (64, 64), (160, 40)]
PLAIN = {"do_normalize": False}


def picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    drawn = Image.new("RGB", size, "black")
    ImageDraw.Draw(drawn).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return drawn


def box_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Right of and below the middle, so that exchanged axes and directions are noticed."""
    return size[0] // 2, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4


def brightness(pixels: Tensor, side: int) -> Tensor:
    """(..., 1, rows, columns) the mean of each patch of pixel values (..., 3, H, W)."""
    return torch.nn.functional.avg_pool2d(pixels.float().mean(dim=-3, keepdim=True), side)


def agrees(geometry: Geometry, box: tuple[int, int, int, int], seen: Tensor) -> None:
    """What is seen is the shares, but for the blur of resizing and the rounding of sizes to whole pixels."""
    share = geometry.shares([box])[:, 0]
    assert len(share) == len(seen) == len(geometry)
    assert (share - seen.double()).abs().max() < 0.25 and (share - seen.double()).abs().mean() < 0.03
    assert seen.max() > 0.5


@pytest.mark.parametrize("size", SIZES)
def test_stretched_as_qwen(size: tuple[int, int]) -> None:
    processor = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 64 * 4, "longest_edge": 64 * 200}, **PLAIN
    )
    found = processor(picture(size, box_of(size)), return_tensors="pt")
    _, height, width = found["image_grid_thw"][0].tolist()
    geometry = stretched(size, height // 2, width // 2)
    seen = found["pixel_values"].reshape(len(geometry), -1).mean(dim=1)  # four patches of a token stand together
    agrees(geometry, box_of(size), seen)


@pytest.mark.parametrize("size", SIZES)
def test_padded_as_llava(size: tuple[int, int]) -> None:
    processor = transformers.LlavaImageProcessor(
        do_pad=True, size={"height": 96, "width": 96}, crop_size={"height": 96, "width": 96}, image_mean=[0.0] * 3, **PLAIN
    )
    pixels = processor(picture(size, box_of(size)), return_tensors="pt")["pixel_values"][0]
    agrees(padded(size, 12, 12), box_of(size), brightness(pixels, 8).flatten())


@pytest.mark.parametrize("size", SIZES[:3])
def test_cropped_as_clip(size: tuple[int, int]) -> None:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 72}, **PLAIN)
    pixels = processor(picture(size, box_of(size)), return_tensors="pt")["pixel_values"][0]
    agrees(cropped(size, 8, 9, shortest=80, crop=(72, 64)), box_of(size), brightness(pixels, 8).flatten())


@pytest.mark.parametrize("size", SIZES)
def test_tiles_as_internvl(size: tuple[int, int]) -> None:
    processor = transformers.GotOcr2ImageProcessor(
        size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=6, **PLAIN
    )
    found = processor(picture(size, box_of(size)), return_tensors="pt")
    tiles = int(found["num_patches"][0])
    shapes = {1: (1, 1), 3: (1, 2) if size[0] > size[1] else (2, 1), 5: (1, 4) if size[0] > size[1] else (4, 1)}
    geometry = tiled(size, *shapes[tiles], per_tile=(6, 6))
    agrees(geometry, box_of(size), brightness(found["pixel_values"], 8).flatten())


@pytest.mark.parametrize("size", SIZES[:2])
def test_tiles_as_idefics(size: tuple[int, int]) -> None:
    processor = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, return_row_col_info=True, **PLAIN
    )
    found = processor(picture(size, box_of(size)), return_tensors="pt")
    rows, columns = int(found["rows"][0][0]), int(found["cols"][0][0])
    assert rows * columns > 1
    geometry = tiled(size, rows, columns, per_tile=(8, 8))
    agrees(geometry, box_of(size), brightness(found["pixel_values"][0], 8).flatten())


RESOLUTIONS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def llava_next(size: tuple[int, int]) -> Tensor:
    """Brightness of the tokens as LLaVA-NeXT packs them: its own processor and its own packing, brightness for features."""
    processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=RESOLUTIONS, **PLAIN
    )
    found = processor(picture(size, box_of(size)), return_tensors="pt")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=4, **sizes),
        text_config=transformers.LlamaConfig(vocab_size=8, num_key_value_heads=1, **sizes),
        image_grid_pinpoints=RESOLUTIONS,
        image_token_index=7,
    )
    features = brightness(found["pixel_values"][0], 4).flatten(1).unsqueeze(-1)  # (tiles, 64, 1)
    packed, _ = transformers.LlavaNextModel(config).pack_image_features(
        [features], found["image_sizes"], "default", torch.zeros(1)
    )
    return packed[0][:, 0]


@pytest.mark.parametrize("size", [*SIZES, (100, 90), (37, 90)])
def test_anyres_as_llava_next(size: tuple[int, int]) -> None:
    agrees(anyres(size, [(a, b) for a, b in RESOLUTIONS], tile=32, per_side=8), box_of(size), llava_next(size))


def test_anyres_scaled_down() -> None:
    """OneVision: 4 x 4 tiles of 8 x 8 tokens to the worth of 9 tiles, ratio 4/3."""
    geometry = anyres((128, 128), [(128, 128)], tile=32, per_side=8, at_most=9)
    assert [(view.rows, view.columns) for view in geometry.views] == [(8, 8), (24, 24)]
    assert len(geometry) == 64 + 24 * 25


class TestShares:
    def test_by_hand(self) -> None:
        """Two tokens of 10 x 10; the box takes half of the first and a tenth of the second."""
        shares = stretched((20, 10), 1, 2).shares([(5, 0, 11, 10), (0, 0, 20, 10), (30, 0, 40, 10)])
        torch.testing.assert_close(shares, torch.tensor([[0.5, 1, 0], [0.1, 1, 0]], dtype=torch.float64))

    def test_ends_of_rows_show_nothing(self) -> None:
        geometry = anyres((64, 32), [(32, 64)], tile=32, per_side=2)
        shares = geometry.shares([geometry.whole])[:, 0]
        assert shares.tolist() == [1.0] * 4 + [1, 1, 1, 1, 0] * 2

    def test_padding_of_a_wide_collage(self) -> None:
        """The specification's figures: 48 % of the map of a 1 x 2 collage and 66 % of a 1 x 3 collage are padding."""
        for size, part in (((936, 488), 0.48), ((1424, 488), 0.66)):
            geometry = padded(size, 24, 24)
            assert 1 - geometry.shares([geometry.whole]).mean() == pytest.approx(part, abs=0.005)

    def test_boxes_that_tile_a_picture_sum_to_its_share(self) -> None:
        geometry = padded((90, 31), 7, 5)
        parts = geometry.shares([(0, 0, 40, 31), (40, 0, 90, 20), (40, 20, 90, 31)]).sum(dim=1)
        torch.testing.assert_close(parts, geometry.shares([geometry.whole])[:, 0])

    def test_another_number_of_tokens(self) -> None:
        with pytest.raises(UserError, match="Image2: 577 image tokens, and the processor's geometry .* has 576"):
            check_tokens(padded((10, 20), 24, 24), 577, "Image2")
