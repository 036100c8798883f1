import json

import pytest
from PIL import Image, ImageFont

from polyalign.core.errors import UserError
from polyalign.evaluation.before_after import BAD, CELL, FRAME, GOOD, before_after, choose, evenly, main, shares, wrapped


@pytest.mark.parametrize(
    ("won", "lost", "count", "expected"),
    [
        (50, 10, 8, (7, 1)),  # 1.33 losses
        (44, 1, 8, (7, 1)),  # 0.18 losses: one is shown all the same
        (1, 44, 8, (1, 7)),
        (30, 30, 8, (4, 4)),
        (60, 30, 8, (5, 3)),
        (50, 0, 8, (8, 0)),
        (0, 50, 8, (0, 8)),
        (3, 2, 8, (3, 2)),
        (100, 100, 2, (1, 1)),
        (0, 0, 8, (0, 0)),
    ],
)
def test_losses_are_shown_in_proportion_and_never_hidden(won, lost, count, expected):
    assert shares(won, lost, count) == expected


def test_columns_are_spread_evenly_over_what_changed():
    assert evenly(list(range(40)), 4) == [5, 15, 25, 35] and evenly([1, 2, 3], 3) == [1, 2, 3] and evenly([1], 0) == []
    gains = [1, 0, 0, -1, 1, 1, 1, 0, -1, 1]
    items = [{"prompt": str(i), "base_score": 0.0, "aligned_score": gain} for i, gain in enumerate(gains)]
    # won: 0 4 5 6 9, lost: 3 8; of four columns 4 * 2 / 7 = 1.1 is lost
    assert [item["prompt"] for item in choose(items, 4)] == ["0", "5", "9", "8"]


def test_the_picture_holds_both_rows_enlarged_crisply_and_framed(make_run, tmp_path):
    run = make_run("improved", count=60)
    block = json.loads((run / "evaluation.json").read_text())
    items = [item for item in block["items"] if item["base_score"] != item["aligned_score"]]
    written = before_after(run, tmp_path / "out.png", count=4)
    first = choose(block["items"], 4)[0]
    with Image.open(written) as picture:
        sheet = picture.convert("RGB")
    row = [sheet.getpixel((x, 20)) for x in range(sheet.width)]
    left = next(x for x, pixel in enumerate(row) if pixel in (GOOD, BAD))
    assert row[left] == BAD, "the base's output of a win is wrong"
    assert len(items) > 4 and sum(a not in (GOOD, BAD) and b in (GOOD, BAD) for a, b in zip(row, row[1:], strict=False)) == 4
    for place, side in enumerate(("base", "aligned")):
        top = 18 + place * (CELL + 2 * FRAME + 14)
        shown = sheet.crop((left + FRAME, top + FRAME, left + FRAME + CELL, top + FRAME + CELL))
        with Image.open(run / first[f"{side}_image"]) as small:
            assert shown.tobytes() == small.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST).tobytes()
        assert sheet.getpixel((left, top)) == (GOOD if first[f"{side}_score"] >= 1 else BAD)
    again = before_after(run, tmp_path / "again.png", count=4)
    assert again.read_bytes() == written.read_bytes()


def test_without_a_limit_the_higher_score_is_green(make_run, tmp_path):
    run = make_run("improved", count=60)
    path = run / "evaluation.json"
    block = json.loads(path.read_text())
    del block["judge"]["right_from"]
    for item in block["items"]:
        item["base_score"], item["aligned_score"] = 5.0, 5.5  # all won; with a limit of 1 both frames would be green
    path.write_text(json.dumps(block))
    with Image.open(before_after(run, tmp_path / "out.png", count=2)) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        rows = [[picture.getpixel((x, y)) for x in range(picture.width)] for y in (18, 18 + CELL + 2 * FRAME + 14)]
    assert {GOOD, BAD} <= colours
    assert BAD in rows[0] and GOOD not in rows[0] and GOOD in rows[1] and BAD not in rows[1]


def test_large_pictures_and_long_prompts_fit(make_run, tmp_path):
    run = make_run("improved", count=24)
    path = run / "evaluation.json"
    block = json.loads(path.read_text())
    for item in block["items"]:
        item["prompt"] = "a very " * 40 + "x" * 200
        for side in ("base", "aligned"):
            Image.new("RGB", (512, 400), (9, 9, 9)).save(run / item[f"{side}_image"])
    path.write_text(json.dumps(block))
    with Image.open(before_after(run, tmp_path / "out.png", count=2)) as picture:
        assert 2 * 256 < picture.width < 2 * 256 + 200 and picture.height < 2 * 200 + 400


def test_prompts_are_wrapped_and_cut():
    font = ImageFont.load_default(size=22)
    lines = wrapped("two red circles left of " + "w" * 60, font, 200, 4)
    assert len(lines) == 4 and lines[-1].endswith("...") and all(font.getlength(line) <= 200 for line in lines)
    assert wrapped("a cat", font, 200, 4) == ["a cat"] and wrapped("", font, 200, 4) == [""]


def test_what_cannot_be_shown_is_explained(make_run, tmp_path, capsys):
    run = make_run("improved", count=24)
    out, path = tmp_path / "out.png", run / "evaluation.json"
    with pytest.raises(UserError, match="at least 2 columns"):
        before_after(run, out, count=1)
    (run / choose(json.loads(path.read_text())["items"], 8)[0]["aligned_image"]).unlink()
    with pytest.raises(UserError, match="is absent or cannot be read"):
        before_after(run, out)
    block = json.loads(path.read_text())
    for item in block["items"]:
        item["aligned_score"] = item["base_score"]
    path.write_text(json.dumps(block))
    with pytest.raises(UserError, match="changed in none of 24"):
        before_after(run, out)
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        before_after(run, out)
    path.write_text("{}")
    with pytest.raises(UserError, match="no comparisons of single outputs"):
        before_after(run, out)
    path.unlink()
    assert main([str(run), str(out)]) != 0 and "does not exist" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_writes_the_file(make_run, tmp_path, capsys):
    assert main([str(make_run("improved", count=24)), str(tmp_path / "a" / "out.png"), "--count", "3"]) == 0
    assert (tmp_path / "a" / "out.png").is_file() and "out.png" in capsys.readouterr().out
