"""Losing images and contexts: what each kind does, that the draws are keyed, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.multi_image import grid, picture_in_picture, sequence
from polyalign.datasets.multi_image.rows import check_row, count_images
from polyalign.datasets.multi_image.sources import Questions
from polyalign.modalities.vlm.negative_config import METHODS, ImageNegativeConfig
from polyalign.modalities.vlm.negatives import (
    context_negative,
    diffused,
    diffused_picture,
    image_negative,
    noise_for,
    noised_for_sampling,
    official_other,
    with_negatives,
)


def gradient(width: int = 400, height: int = 300) -> Image.Image:
    """Every pixel another colour, so that a part shows where it is from."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across % 256, down % 256, across // 256 * 2 + down // 256], -1).astype(np.uint8))


def row(number: int, picture: Image.Image | None = None, question: str | None = None) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": question or f"Question {number}?"}]
    images = [picture or Image.new("RGB", (8, 6), (number, 0, 0))]
    condition = {"messages": [{"role": "user", "content": content}], "images": images}
    return {"pair_id": f"p{number}", "condition": condition, "chosen": "Yes.", "rejected": "No."}


class TestDiffused:
    def test_the_schedule_ends_in_noise(self) -> None:
        pixels, noise = torch.full((3, 4, 4), 2.0), torch.zeros(3, 4, 4)
        signal = [float(diffused(pixels, noise, step).mean()) / 2 for step in (0, 500, 700, 999)]
        assert signal == sorted(signal, reverse=True) and signal[0] > 0.999 and signal[-1] < 0.3

    def test_variance_is_kept(self) -> None:
        pixels = noise_for(torch.empty(3, 64, 64), seed=0, key="x")
        noisy = diffused(pixels, noise_for(pixels, seed=0, key="y"), 400)
        assert float(noisy.var()) == pytest.approx(1.0, abs=0.05)

    def test_noise_is_keyed(self) -> None:
        same, again = (noise_for(torch.empty(3, 5, 5), seed=1, key="a") for _ in range(2))
        assert torch.equal(same, again) and not torch.equal(same, noise_for(same, seed=1, key="b"))

    def test_a_picture_keeps_its_size_and_a_little_of_itself(self) -> None:
        picture = Image.new("RGB", (40, 30), "white")
        late = diffused_picture(picture, ImageNegativeConfig(step=700), seed=0, key="a")
        early = diffused_picture(picture, ImageNegativeConfig(step=0), seed=0, key="a")
        assert late.size == early.size == (40, 30)
        assert np.asarray(early).mean() > 250 and np.asarray(late).std() > 40

    def test_no_such_step(self) -> None:
        with pytest.raises(UserError, match="steps 0 to 999, found 1000"):
            diffused(torch.zeros(1), torch.zeros(1), 1000)


class TestPictures:
    @pytest.mark.parametrize("key", [str(number) for number in range(8)])
    def test_crop_is_a_part(self, key: str) -> None:
        made = image_negative(gradient(), ImageNegativeConfig(kind="cropped"), seed=0, key=key)
        assert made.size == (320, 240)
        left, top = made.getpixel((0, 0))[:2]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        assert made.tobytes() == gradient().crop((left, top, left + 320, top + 240)).tobytes()

    def test_crop_of_an_area(self) -> None:
        sizes = {image_negative(gradient(), METHODS["mdpo"], seed=0, key=str(number)).size for number in range(40)}
        areas = [width * height / (400 * 300) for width, height in sizes]
        assert max(areas) <= 0.2 and max(areas) > 0.15 and min(areas) < 0.05 and len(sizes) > 30

    def test_small_pictures_are_cropped_as_far_as_they_go(self) -> None:
        assert image_negative(gradient(100, 500), ImageNegativeConfig(kind="cropped"), seed=0, key="a").size == (100, 240)

    def test_rotation(self) -> None:
        picture = Image.new("RGB", (41, 41), "white")
        parts = []
        for number in range(20):
            made = image_negative(picture, ImageNegativeConfig(kind="rotated"), seed=0, key=str(number))
            assert made.size == (41, 41) and made.getpixel((20, 20)) == (255, 255, 255)
            parts.append(float((np.asarray(made) == 0).mean()))
        assert 0 < min(parts) < max(parts) < 0.25  # the corners of a square turned by 10 to 80 degrees

    def test_blank_is_the_mean(self) -> None:
        made = image_negative(gradient(), ImageNegativeConfig(kind="blanked"), seed=0, key="a")
        assert made.size == (400, 300) and made.getcolors() == [(120000, (123, 117, 104))]

    def test_same_key_same_picture(self) -> None:
        for kind in ("diffused", "cropped", "rotated"):
            config = ImageNegativeConfig(kind=kind)
            one, again = (image_negative(gradient(), config, seed=3, key="a").tobytes() for _ in range(2))
            assert one == again != image_negative(gradient(), config, seed=4, key="a").tobytes()

    def test_published(self) -> None:
        assert METHODS["mcm_dpo"].step == 700 and METHODS["chip"].step == 500 and METHODS["mdpo"].area == 0.2


class TestRows:
    def test_all_terms_of_mcm_dpo(self) -> None:
        rows = [row(number) for number in range(12)]
        for made in (with_negatives(rows, seed=0, image=METHODS["mcm_dpo"], context=True) for _ in range(2)):
            for given, found in zip(rows, made, strict=True):
                check_row(found)
                assert found["condition"] is given["condition"] and "rejected_images" not in given
                (picture,), (losing,) = found["condition"]["images"], found["rejected_images"]
                assert losing.size == picture.size and losing.tobytes() != picture.tobytes()
                assert found["rejected_messages"] != given["condition"]["messages"]
                assert found["rejected_messages"] in [other["condition"]["messages"] for other in rows]

    def test_deterministic_in_any_number_of_rows(self) -> None:
        config = METHODS["mcm_dpo"]
        first = [
            made["rejected_images"][0].tobytes() for made in with_negatives([row(n) for n in range(3)], seed=0, image=config)
        ]
        more = [
            made["rejected_images"][0].tobytes() for made in with_negatives([row(n) for n in range(6)], seed=0, image=config)
        ]
        assert first == more[:3] and len(set(more)) == 6

    def test_swapped_is_another_picture_and_context_another_text(self) -> None:
        same = Image.new("RGB", (8, 6), "red")
        rows = [row(n, same, "What?") for n in range(30)] + [row(99, Image.new("RGB", (3, 3)), "Who?")]
        for made in list(with_negatives(rows, seed=0, image=ImageNegativeConfig(kind="swapped"), context=True))[:30]:
            assert made["rejected_images"][0].size == (3, 3)
            assert made["rejected_messages"][0]["content"][1]["text"] == "Who?"

    def test_nothing_to_take(self) -> None:
        rows = [row(number, Image.new("RGB", (2, 2)), "What?") for number in range(3)]
        with pytest.raises(UserError, match="none of the other 2 row.s. has another context"):
            list(with_negatives(rows, seed=0, context=True))
        with pytest.raises(UserError, match="none of the other 2 row.s. has another image"):
            list(with_negatives(rows, seed=0, image=ImageNegativeConfig(kind="swapped")))
        with pytest.raises(UserError, match=r"1 row\(s\); a losing context"):
            official_other(0, 1)

    def test_only_the_target_of_several_images_loses(self, colours: Questions) -> None:
        rows = sequence.build(colours, seed=0, counts={3: 1})
        for kind in ("blanked", "swapped"):
            for made in with_negatives(rows, seed=0, image=ImageNegativeConfig(kind=kind)):
                (target,) = made["condition"]["layout"]["targets"]
                pairs = zip(made["condition"]["images"], made["rejected_images"], strict=True)
                changed = [place for place, (one, other) in enumerate(pairs) if one.tobytes() != other.tobytes()]
                assert changed == [target]

    def test_compat_draws_as_the_original(self) -> None:
        rows = [row(number) for number in range(37)]
        made = with_negatives(rows, seed=0, context=True, compat=True)
        names = [found["rejected_messages"][0]["content"][1]["text"] for found in made]
        assert names[:4] == ["Question 24?", "Question 8?", "Question 3?", "Question 15?"]

    def test_wrong_rows(self) -> None:
        broken = row(1)
        broken["condition"]["images"] = []
        with pytest.raises(UserError, match=r"p1: 1 image placeholder\(s\)"):
            list(with_negatives([broken, row(2)], seed=0, context=True))
        text = {"condition": {"messages": [{"role": "user", "content": "Hi"}], "images": []}, "chosen": "Ho"}
        with pytest.raises(UserError, match="row 0: no image, and a losing image is asked for"):
            list(with_negatives([text], seed=0, image=METHODS["chip"]))

    def test_a_context_with_another_number_of_images(self) -> None:
        wanted = {"messages": [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "Both?"}]}]}
        other = row(3)["condition"]
        found = context_negative(wanted, other)
        assert count_images(found) == 2 and found[0]["content"][-1]["text"] == "Question 3?"
        plain = context_negative(wanted, {"messages": [{"role": "user", "content": "Hello?"}]})
        assert [part["type"] for part in plain[0]["content"]] == ["image", "image", "text"]

    def test_swapped_alone(self) -> None:
        with pytest.raises(UserError, match="no negative of a picture alone"):
            image_negative(gradient(), ImageNegativeConfig(kind="swapped"), seed=0, key="a")


class TestNoiseForSampling:
    def test_collage(self, colours: Questions) -> None:
        condition = grid.build(colours, seed=0, counts={4: 1})[0]["condition"]
        (noisy,) = noised_for_sampling(condition, seed=0, key="a")
        cell = condition["layout"]["places"][condition["layout"]["targets"][0]]["cell"]
        changed = (np.asarray(noisy) != np.asarray(condition["images"][0])).any(-1)
        inside = changed[cell[1] : cell[3], cell[0] : cell[2]]
        assert inside.mean() > 0.7 and changed.sum() == inside.sum()
        assert noised_for_sampling(condition, seed=0, key="a")[0].tobytes() == noisy.tobytes()

    def test_spread_of_a_picture_in_picture(self) -> None:
        arrangement = picture_in_picture.arranged(Image.new("RGB", (99, 80), "grey"), Image.new("RGB", (9, 9), "grey"))
        condition = {"images": list(arrangement.images), "layout": arrangement.layout([0], 1)}
        (noisy,) = noised_for_sampling(condition, seed=0, key="a")
        assert np.asarray(noisy).std() == pytest.approx(49, rel=0.05)
        assert np.asarray(noised_for_sampling(condition, seed=0, key="a", std=9)[0]).std() == pytest.approx(9, rel=0.05)

    def test_sequences_stay_clean(self, colours: Questions) -> None:
        condition = sequence.build(colours, seed=0, counts={2: 1})[0]["condition"]
        assert noised_for_sampling(condition, seed=0, key="a") == condition["images"]


def test_a_picture_of_which_nothing_is_taken_is_refused() -> None:
    rows = [
        {"pair_id": f"p{n}", "condition": {"messages": [asked(n)], "images": [gradient(100, 80)]}, "chosen": "a"}
        for n in (0, 1)
    ]
    with pytest.raises(UserError, match=r"p0: the losing picture \(cropped\) .* it is 100 x 80, .*negatives.image.area"):
        list(with_negatives(rows, seed=0, image=ImageNegativeConfig(kind="cropped")))
    (first, _) = with_negatives(rows, seed=0, image=ImageNegativeConfig(kind="cropped", area=0.2))
    assert first["rejected_images"][0].size < (100, 80)
    with pytest.raises(ValueError, match="degrees"):
        ImageNegativeConfig(kind="rotated", degrees=(0.0, 0.0))


def asked(number: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is number {number}?"}]}
