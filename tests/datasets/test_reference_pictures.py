import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.reference_pictures import ReferenceNameJudge, ReferenceStyleJudge, distance


def picture(colour: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@pytest.fixture
def folder(tmp_path):
    for side, shades in {"chosen": (250, 10), "rejected": (150, 60)}.items():
        (tmp_path / side).mkdir()
        for name, colour in {"apple": (shades[0], 0, 0), "leaf": (0, shades[0], 0)}.items():
            picture(colour).save(tmp_path / side / f"{name}.png")
            (tmp_path / "chosen" / f"{name}.txt").write_text(f"a {name}")
    return str(tmp_path)


def test_distance_is_the_root_mean_square_over_pixels_and_channels():
    assert distance(np.zeros((2, 2, 3)), np.full((2, 2, 3), 0.5)) == pytest.approx(0.5)


def test_style_is_the_difference_of_the_two_distances(folder):
    judge = ReferenceStyleJudge(folder)
    outputs = [picture((250, 0, 0)), picture((150, 0, 0)), picture((200, 0, 0))]
    exact, other, between = judge.score([{"prompt": "a apple"}] * 3, outputs)
    assert exact == pytest.approx(100 / 255 / np.sqrt(3), abs=1e-6)
    assert other == pytest.approx(-exact)
    assert between == pytest.approx(0.0, abs=1e-7)


def test_a_picture_has_kept_its_name_if_the_nearest_drawing_of_all_is_its_own(folder):
    judge = ReferenceNameJudge(folder)
    assert judge.score([{"prompt": "a apple"}, {"prompt": "a leaf"}], [picture((240, 0, 0))] * 2) == [1.0, 0.0]


def test_references_are_brought_to_the_size_of_the_output(folder):
    assert ReferenceNameJudge(folder).score([{"prompt": "a leaf"}], [picture((0, 200, 0), size=20)]) == [1.0]


def test_a_prompt_without_drawings_is_refused(folder):
    with pytest.raises(UserError, match="no picture has the caption 'a car'"):
        ReferenceStyleJudge(folder).score([{"prompt": "a car"}], [picture((0, 0, 0))])


def test_captioned_pictures_alone_name_but_have_no_style(tmp_path):
    """In sub-folders too; one picture of each caption."""
    colours = {"a cat": (250, 0, 0), "a dog": (0, 0, 250)}
    for part, (caption, colour) in zip(("train", "heldout"), colours.items(), strict=True):
        (tmp_path / part).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / part / f"{part}.png")
        (tmp_path / part / f"{part}.txt").write_text(caption)
    judge = ReferenceNameJudge(str(tmp_path))
    drawn = [Image.new("RGB", (8, 8), (230, 20, 10))] * 2
    assert judge.score([{"prompt": "a cat"}, {"prompt": "a dog"}], drawn) == [1.0, 0.0]
    with pytest.raises(UserError, match="has no chosen/ and rejected/"):
        ReferenceStyleJudge(str(tmp_path))
    (tmp_path / "heldout" / "heldout.txt").write_text("a cat")
    with pytest.raises(UserError, match="has the caption of .*heldout.png, 'a cat'"):
        ReferenceNameJudge(str(tmp_path))
    (tmp_path / "heldout" / "heldout.txt").unlink()
    with pytest.raises(UserError, match="heldout.png: no caption"):
        ReferenceNameJudge(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        ReferenceNameJudge(str(tmp_path / "none"))
