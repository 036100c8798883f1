import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation import judges
from polyalign.evaluation.image_statistics import IMAGE_STATISTICS, clipping, high_frequency, saturation


@dataclass(frozen=True)
class Spec:
    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def picture(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


NEEDED = {
    "reference_style": "folder",
    "reference_name": "folder",
    "laion_aesthetics": "head",
    "mixture": "judges",
    "caption_bridge": "pictures",
    "http": "url",
    "objects": "synonyms",
    "text_rules": "rules",
    "reward_model": "model",
    "implicit_reward_text": "policy",
    "http_text": "url",
    "http_sound": "url",
    "bert_similarity": "model",
}
# Their versions are hashes of what they would fetch.
PUBLISHED = ("clip_score", "pickscore", "hpsv2", "hpsv2.1", "imagereward", "geneval", "clap", "clap_order", "ast_order")


def test_every_judge_of_the_table_can_be_built_or_says_which_option_it_needs():
    for name in judges.JUDGES:
        if name in NEEDED:
            with pytest.raises(UserError, match=NEEDED[name]):
                judges.build(Spec(name))
            continue
        judge = judges.build(Spec(name))
        assert judge.name == name and (name in PUBLISHED or judge.version)


def test_saturation_of_known_colours():
    # pure red 1, grey 0, (200, 100, 100) half, black 0 by definition
    assert saturation(picture([[[255, 0, 0], [90, 90, 90], [200, 100, 100], [0, 0, 0]]])) == pytest.approx(1.5 / 4)


def test_high_frequency_of_known_patterns():
    rows, columns = np.indices((16, 16))
    grey = np.repeat(((rows + columns) % 2 * 255)[..., None], 3, axis=-1)
    assert high_frequency(picture(grey)) == pytest.approx(1.0)
    assert high_frequency(picture(np.full((16, 16, 3), 77))) == 0.0
    wave = 127.5 + 100 * np.sin(2 * np.pi * columns / 16)  # one period in sixteen pixels: far below the limit
    assert high_frequency(picture(np.repeat(wave[..., None], 3, axis=-1))) < 0.001
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 1)).repeat(3, axis=-1)
    assert high_frequency(picture(noise)) == pytest.approx(0.75, abs=0.03)


def test_clipping_counts_channel_values_at_the_ends():
    assert clipping(picture([[[0, 128, 255], [1, 254, 128]]])) == pytest.approx(2 / 6)


def test_panel_is_the_weighted_sum():
    image = picture([[[255, 0, 0], [200, 100, 100]]])
    panel = judges.panel([Spec("saturation"), Spec("clipping", weight=-2.0)])
    expected = IMAGE_STATISTICS["saturation"](image) - 2 * IMAGE_STATISTICS["clipping"](image)
    assert panel.score([{"prompt": "x"}], [image]) == [pytest.approx(expected)]
    assert panel.name == "saturation + -2 clipping"
    assert type(judges.panel([Spec("saturation")])).__name__ == "SaturationJudge"
    assert judges.parts(panel) == ["saturation", "clipping"]
    assert judges.parts(judges.panel([Spec("clipping", weight=-1.0)])) == ["clipping"]
    assert judges.parts(judges.build(Spec("clipping"))) == ["clipping"]
    silent = judges.panel([Spec("saturation", weight=0.0), Spec("clipping", weight=2.0)])
    assert judges.parts(silent) == ["clipping"]
    assert judges.Panel([silent, panel], [1, 1]).parts == ["clipping", "saturation", "clipping"]
    with pytest.raises(UserError, match="no judge is named"):
        judges.panel([])


def test_unknown_names_and_refused_options_are_explained():
    with pytest.raises(UserError, match="did you mean 'saturation'"):
        judges.build(Spec("saturatoin"))
    with pytest.raises(UserError, match="cannot be made with the options"):
        judges.build(Spec("clipping", options={"colour": "red"}))
    with pytest.raises(UserError) as raised:
        judges.build(Spec("rouge_l", options={"mesure": "f1"}))
    assert "it has no option mesure; its options: measure, summary, split, reference, label" in str(raised.value)


def test_options_that_a_judge_needs_are_named_with_an_example():
    with pytest.raises(UserError) as raised:
        judges.build(Spec("text_rules"))
    said = str(raised.value)
    assert "it needs rules; its options: rules, label. For example: {name: text_rules, options: {rules: [{rule: " in said
    assert "__init__" not in said
    example = yaml.safe_load(said.partition("For example: ")[2])
    assert judges.build(Spec(**example)).name == "text_rules", "what is shown works"
    with pytest.raises(UserError, match=r"it needs url, model; .* {name: http, options: {url: ..., model: ...}}$"):
        judges.build(Spec("http"))


def test_what_else_a_judge_cannot_be_made_of_is_said_as_python_says_it():
    with pytest.raises(UserError, match="cannot be made with the options .*: .*unexpected keyword argument 'colour'"):
        judges.build(Spec("clip_score", options={"colour": "red"}))


def test_a_misspelt_judge_is_answered_with_those_of_the_outputs_at_hand_first():
    with pytest.raises(UserError) as raised:
        judges.build(Spec("sound"), "text")
    said = str(raised.value)
    assert "Known here for texts: clinical, scenes, " in said and "; for other outputs: shapes, " in said
    assert said.index("rouge_l") < said.index("for other outputs") < said.index("saturation")
    with pytest.raises(UserError, match="did you mean 'http_text'"):
        judges.build(Spec("httpt"), "text")


class Fixed:
    name, version = "fixed", "4"

    def __init__(self, *scores):
        self.scores = list(scores)

    def score(self, conditions, outputs):
        return self.scores


def test_scores_are_checked_in_one_place():
    asked = [{"prompt": "a"}, {"prompt": "b"}]
    scores = judges.checked_scores(Fixed(np.float32(0.5), 1), asked, ["x", "y"])
    assert scores == [0.5, 1.0] and all(type(score) is float for score in scores)
    with pytest.raises(UserError, match=r"the judge 'fixed' \(version 4\) gave 1 scores for 2 outputs; shards are kept"):
        judges.checked_scores(Fixed(1), asked, ["x", "y"], where="shards are kept")
    said = r"gave inf for output 1, prompt 'b', seed 9; scores must be finite numbers; shards are kept"
    with pytest.raises(UserError, match=said):
        judges.checked_scores(Fixed(1, float("inf")), asked, ["x", "y"], seeds=[8, 9], where="shards are kept")


def test_a_dotted_path_is_no_judge():
    with pytest.raises(UserError, match="there is no judge"):
        judges.build(Spec("os:system"))


def test_an_installed_package_adds_a_judge(tmp_path, monkeypatch):
    (tmp_path / "brightness_of_others.py").write_text(
        "class Brightness:\n"
        "    name, version = 'brightness', '3'\n"
        "    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def score(self, conditions, outputs):\n        return [self.scale * sum(o.getpixel((0, 0))) for o in outputs]\n"
        "class Nothing:\n    pass\n"
    )
    info = tmp_path / "brightness_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness-of-others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[polyalign.judges]\nbrightness = brightness_of_others:Brightness\nempty = brightness_of_others:Nothing\n"
        "gone = brightness_of_others:Gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"brightness", "empty"} <= set(judges.names())
    judge = judges.build(Spec("brightness", options={"scale": 0.5}))
    assert judge.score([{}], [picture([[[10, 20, 30]]])]) == [30.0]
    with pytest.raises(UserError, match="without name, version, score"):
        judges.build(Spec("empty"))
    with pytest.raises(UserError, match="does not import here"):
        judges.build(Spec("gone"))
    sys.modules.pop("brightness_of_others", None)
