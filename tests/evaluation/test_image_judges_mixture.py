"""Mixtures of judges, and a held-out judge: one that the evaluation asks and that no pair was decided by."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation import judges
from polyalign.evaluation.image_statistics import clipping, saturation
from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.report.collect import collect
from polyalign.evaluation.report.verdict import decide, is_better, is_worse

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import conditions, pictures, save_clip  # noqa: E402  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Spec:
    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def mixture(parts: Any, **options: Any):
    return judges.build(Spec("mixture", options={"judges": parts, **options}))


def test_a_mixture_is_the_weighted_sum_of_standardised_scores():
    images = pictures()
    parts = [
        {"name": "saturation", "mean": 0.5, "deviation": 0.1},
        {"name": "clipping", "weight": -2, "deviation": 0.25},
        {"name": "high_frequency", "weight": 0},
    ]
    made = mixture(parts)
    expected = [(saturation(image) - 0.5) / 0.1 - 2 * clipping(image) / 0.25 for image in images]
    assert made.score(conditions(), images) == pytest.approx(expected)
    assert made.name == "mixture(saturation + -2 clipping + 0 high_frequency)"
    assert judges.parts(made) == ["saturation", "clipping"]
    assert made.version == "1 (saturation 1 - 0.5) / 0.1 + -2 (clipping 1 - 0) / 0.25 + 0 (high_frequency 1 - 0) / 1"
    assert mixture(parts, label="taste").name == "taste"


def test_with_its_defaults_it_is_the_recipes_list_and_mixtures_nest():
    images, asked = pictures(), conditions()
    parts = [Spec("saturation"), Spec("clipping", weight=-0.5)]
    listed = judges.panel(parts).score(asked, images)
    plain = [{"name": part.name, "weight": part.weight} for part in parts]
    assert mixture(plain).score(asked, images) == pytest.approx(listed)
    nested = mixture([{"name": "mixture", "weight": 3, "options": {"judges": plain}}])
    assert nested.score(asked, images) == pytest.approx([3 * score for score in listed])
    assert judges.parts(nested) == ["saturation", "clipping"]


def test_wrong_mixtures_are_explained():
    for parts, said in (
        ([], "at least one judge"),
        ("saturation", "at least one judge"),
        ([{"weight": 1}], r"judges\[0\].name"),
        ([{"name": "saturation"}, {"name": "clipping", "deviation": 0}], r"judges\[1\].deviation: .*greater than 0"),
        ([{"name": "saturation", "std": 2}], r"judges\[0\].std.*allowed keys: name, weight, options, mean, deviation"),
        ([{"name": "saturatoin"}], "did you mean 'saturation'"),
    ):
        with pytest.raises(UserError, match=said):
            mixture(parts)


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory) -> tuple[Any, Any]:
    """Two judges that see pictures differently: CLIPs of other random weights."""
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for seed, label in enumerate(("trained on", "held out")):
        save_clip(folder / str(seed), seed)
        options = {"model": str(folder / str(seed)), "formula": "cosine", "label": label}
        made.append(judges.build(Spec("clip_score", options=options)))
    return made[0], made[1]


def test_a_held_out_judge_shows_reward_hacking(two_clips, tmp_path):
    """Pictures chosen so that the judge of the pairs likes them and another does not: the evaluation reports both, with what
    each is made of, and the report says so."""
    trained_on, held_out = two_clips
    images = pictures([(28, 28)] * 30, seed=9)
    asked = conditions([f"{first} {second}" for first in "abcde" for second in "vwxyz"])
    base, aligned = [], []
    for condition in asked:
        liked, wanted = (np.array(judge.score([condition] * len(images), images)) for judge in two_clips)
        order = np.argsort((liked - liked.mean()) / liked.std() - (wanted - wanted.mean()) / wanted.std())
        base.append(images[order[0]])
        aligned.append(images[order[-1]])
    report = evaluate_paired(base, aligned, asked, list(range(len(asked))), [trained_on, held_out], seed=0, artefacts={})
    assert report["judge"]["name"] == "trained on" and report["judge"]["version"] == trained_on.version
    assert is_better(report["win_rate"])
    other = report["other_judges"]["held out"]
    assert is_worse(other) and other["version"] == held_out.version != trained_on.version
    assert not set(other["parts"]) & set(report["judge"]["parts"])
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    verdict = decide(collect(tmp_path))
    assert (verdict.state, verdict.rule.name) == ("over-optimised", "a second judge disagrees")
    alone = evaluate_paired(base, aligned, asked, list(range(len(asked))), [trained_on], seed=0, artefacts={})
    (tmp_path / "evaluation.json").write_text(json.dumps(alone))
    assert decide(collect(tmp_path)).state == "improved"  # without the held-out judge nobody notices


def test_two_judges_of_one_name_are_refused():
    images = pictures()
    twice = [judges.build(Spec("saturation"))] * 2
    with pytest.raises(UserError, match="two judges of the evaluation are called 'saturation'"):
        evaluate_paired(images, images, conditions(), [0, 1, 2], twice, seed=0)


def test_flat_pictures_do_not_upset_a_mixture():
    flat = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white", "red")]
    scored = mixture([{"name": "saturation"}, {"name": "high_frequency"}]).score(conditions(), flat)
    assert scored == [0.0, 0.0, 1.0]
