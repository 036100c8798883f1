"""The ratio of attention to the target: worked out by hand, against planted attention, and the released code's mapping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image import grid, picture_in_picture, sequence
from polyalign.modalities.vlm.attention_ratio import (
    THRESHOLDS,
    Looked,
    answer_rows,
    auc,
    box_densities,
    image_attention,
    looked,
    looked_elsewhere,
    middle_layer,
)
from polyalign.modalities.vlm.token_geometry import Geometry, anyres, cropped, padded, stretched

PICTURES = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue", "yellow", "cyan", "black", "brown")]
LLAVA = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def layout_of(count: int, target: int) -> dict[str, Any]:
    return grid.arranged((PICTURES * 2)[:count]).layout([target], 1)


def planted(geometry: Geometry, box: Sequence[float], share: float) -> Tensor:
    """Attention of which ``share`` lies evenly on the tokens of ``box`` and the rest evenly on all others."""
    inside = geometry.shares([box])[:, 0] > 0.999
    return torch.where(inside, share / inside.sum(), (1 - share) / (~inside).sum())


class TestRows:
    def test_of_an_answer(self) -> None:
        assert list(answer_rows(10, 4)) == [10, 11, 12]
        assert list(answer_rows(10, 1)) == [9]
        with pytest.raises(UserError, match="without tokens"):
            answer_rows(10, 0)

    def test_middle_layer(self) -> None:
        assert middle_layer(32) == 16 and middle_layer(28) == 14

    def test_means_by_hand(self) -> None:
        rows = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.1, 0.4]])
        first, second = image_attention(rows, [range(0, 2), [3]])
        torch.testing.assert_close(first, torch.tensor([0.2, 0.2]))
        torch.testing.assert_close(second, torch.tensor([0.4]))

    def test_nothing_recorded(self) -> None:
        with pytest.raises(UserError, match="at least one query"):
            image_attention(torch.zeros(0, 4), [range(2)])
        with pytest.raises(UserError, match=r"image 2 has 2 token\(s\) in a sequence of 4; were they cut off"):
            image_attention(torch.ones(1, 4), [range(2), range(3, 5)])


class TestSequence:
    LAYOUT = sequence.arranged(PICTURES[:3]).layout([1], 1)

    def test_by_hand(self) -> None:
        """Means .1, .3, .1 of pictures of 2, 1 and 4 tokens."""
        attention = [torch.tensor([0.05, 0.15]), torch.tensor([0.3]), torch.full((4,), 0.1)]
        found = looked(self.LAYOUT, attention, [])
        torch.testing.assert_close(found.shares, torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64))
        assert found.ratio == pytest.approx(0.6) and found.target_is_first

    def test_numbers_must_fit(self) -> None:
        with pytest.raises(UserError, match="a sequence of 3 images, and attention to 2"):
            looked(self.LAYOUT, [torch.ones(2)] * 2, [])
        with pytest.raises(UserError, match="Image1: 2 image tokens"):
            looked(self.LAYOUT, [torch.ones(2)] * 3, [stretched((60, 40), 2, 2)] * 3)


class TestGrid:
    @pytest.mark.parametrize("count", [2, 3, 4, 6, 9])
    def test_even_attention_gives_even_shares(self, count: int) -> None:
        layout, size = layout_of(count, 0), grid.canvas(count)
        for geometry in (padded(size, 24, 24), stretched(size, 34, 66), anyres(size, LLAVA, tile=336, per_side=24)):
            found = looked(layout, [torch.ones(len(geometry))], [geometry])
            torch.testing.assert_close(found.shares, torch.full((count,), 1 / count, dtype=torch.float64))

    @pytest.mark.parametrize("kind", ["padded", "qwen", "anyres"])
    @pytest.mark.parametrize(("count", "target"), [(2, 1), (3, 0), (6, 4), (9, 8)])
    def test_planted_attention_is_found(self, count: int, target: int, kind: str) -> None:
        layout, size = layout_of(count, target), grid.canvas(count)
        geometry = {
            "padded": padded(size, 24, 24),
            "qwen": stretched(size, round(size[1] / 28), round(size[0] / 28)),
            "anyres": anyres(size, LLAVA, tile=336, per_side=24),
        }[kind]
        found = looked(layout, [planted(geometry, layout["places"][target]["cell"], 0.9)], [geometry])
        assert found.target_is_first and found.ratio > 0.5 and not looked_elsewhere(found)
        for other in set(range(count)) - {target}:
            away = looked(layout, [planted(geometry, layout["places"][other]["cell"], 0.9)], [geometry])
            assert not away.target_is_first and looked_elsewhere(away) and looked_elsewhere(away, "not_first")

    def test_the_released_mapping_is_wrong_where_a_collage_is_padded(self) -> None:
        """Attention on the lower part of the first of 2 x 3 cells: in the padded square it lies in the upper half of the map,
        and attention on the white above counts for the upper row."""
        layout, size = layout_of(6, 0), grid.canvas(6)
        geometry = padded(size, 24, 24)
        above = planted(geometry, (0, -300, 1424, 0), 0.9)
        wrong = looked(layout, [above], [geometry], compat=True)
        torch.testing.assert_close(wrong.shares[:3].sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=0.1)
        right = looked(layout, [above], [geometry])
        torch.testing.assert_close(right.shares, torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0, atol=0.03)

    def test_compat_by_hand(self) -> None:
        """A map of 4 x 4 whose lower right quarter holds 4 of 16."""
        found = looked(layout_of(4, 3), [torch.ones(16)], [], compat=True)
        assert found.ratio == pytest.approx(0.25)
        with pytest.raises(UserError, match="15 image tokens are no square map"):
            looked(layout_of(4, 3), [torch.ones(15)], [], compat=True)

    def test_a_cell_that_the_processor_cuts_away(self) -> None:
        """CLIP's middle of 1424 x 488 is the second of three images."""
        size = grid.canvas(3)
        geometry = cropped(size, 24, 24, shortest=336, crop=(336, 336))
        with pytest.raises(UserError, match="cuts Image1, Image3 away"):
            looked(layout_of(3, 0), [torch.ones(576)], [geometry])

    def test_another_processor(self) -> None:
        with pytest.raises(UserError, match="the collage: 576 image tokens, .* has 100"):
            looked(layout_of(2, 0), [torch.ones(576)], [stretched(grid.canvas(2), 10, 10)])

    def test_densities_by_hand(self) -> None:
        shares = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.25]], dtype=torch.float64)
        found = box_densities(torch.tensor([0.1, 0.4, 0.8]), shares)
        torch.testing.assert_close(found, torch.tensor([0.3 / 1.5, 0.4 / 0.75], dtype=torch.float64), rtol=1e-6, atol=0)


class TestPictureInPicture:
    LAYOUT = picture_in_picture.arranged(Image.new("RGB", (480, 480)), Image.new("RGB", (100, 100))).layout([0], 1)

    def test_even_attention_gives_the_part_of_the_area(self) -> None:
        """0.7 x 0.7; the released code takes 16 x 16 of 24 x 24."""
        found = looked(self.LAYOUT, [torch.ones(576)], [padded((480, 480), 24, 24)])
        assert found.ratio == pytest.approx(0.49)
        assert looked(self.LAYOUT, [torch.ones(576)], [], compat=True).ratio == pytest.approx(4 / 9)

    def test_padding_does_not_count(self) -> None:
        layout = picture_in_picture.arranged(Image.new("RGB", (480, 240)), Image.new("RGB", (48, 24))).layout([0], 1)
        geometry = padded((480, 240), 24, 24)
        attention = geometry.shares([geometry.whole])[:, 0] + 0.01
        assert looked(layout, [attention], [geometry]).ratio == pytest.approx(0.49)


class TestRule:
    @pytest.mark.parametrize(
        ("name", "count", "limit"), [(name, count, limit) for name, by in THRESHOLDS.items() for count, limit in by.items()]
    )
    def test_at_the_threshold(self, name: str, count: int, limit: float) -> None:
        def found(ratio: float) -> Looked:
            rest = torch.full((count - 1,), (1 - ratio) / (count - 1), dtype=torch.float64)
            return Looked(torch.cat([torch.tensor([ratio], dtype=torch.float64), rest]), ratio, (0,), name)

        assert looked_elsewhere(found(limit - 1e-6)) and not looked_elsewhere(found(limit + 1e-6))
        assert looked_elsewhere(found(limit)) is (name == "sequence")

    def test_no_threshold(self) -> None:
        six = Looked(torch.full((6,), 1 / 6), 1 / 6, (0,), "sequence")
        with pytest.raises(UserError, match=r"no threshold for 1 target\(s\) among 6 images in format 'sequence'"):
            looked_elsewhere(six)
        assert looked_elsewhere(six, thresholds={"sequence": {6: 0.5}})
        two = Looked(torch.full((3,), 1 / 3), 2 / 3, (0, 1), "sequence")
        with pytest.raises(UserError, match=r"2 target\(s\) among 3 images"):
            looked_elsewhere(two)
        assert not looked_elsewhere(two, "not_first")


def test_auc() -> None:
    assert auc([0.9, 0.8], [0.1, 0.2]) == 1.0 and auc([0.5], [0.5]) == 0.5
    assert auc([0.3, 0.6], [0.2, 0.3, 0.7]) == pytest.approx((0.5 + 1 + 1 + 1) / 6)
    with pytest.raises(UserError, match="0 right and 1 wrong"):
        auc([], [0.1])
