import json
import math

import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation.judges import Panel
from polyalign.evaluation.paired import by_task, evaluate_paired


class Length:
    """Scores a text by its length, so that the tests can state the scores."""

    name = "length"
    version = "2"

    def score(self, conditions, outputs):
        return [float(len(output)) for output in outputs]


class Constant:
    name = "constant"
    version = "1"

    def __init__(self, value):
        self.value = value

    def score(self, conditions, outputs):
        return [self.value] * len(outputs)


CONDITIONS = [{"prompt": "p0", "task": "short"}, {"prompt": "p1", "task": "long"}, {"prompt": "p2", "task": "long"}]
BASE, ALIGNED = ["a", "aa", "aaa"], ["aaa", "aa", "a"]


def test_the_block_is_the_contract():
    report = evaluate_paired(
        BASE, ALIGNED, CONDITIONS, [7, 8, 9], [Length(), Constant(1.0)], seed=0, arms={"sft": ["aaaa", "aaa", "aaaa"]}
    )
    assert report["judge"] == {"name": "length", "version": "2", "parts": ["length"]}
    assert report["prompts"] == 3
    rate = report["win_rate"]
    assert (rate["wins"], rate["losses"], rate["ties"], rate["rate"], rate["rate_with_ties"]) == (1, 1, 1, 0.5, 0.5)
    assert set(rate) == {"wins", "losses", "ties", "rate", "wilson", "rate_with_ties", "bootstrap", "sign_test_p", "prompts"}
    assert report["scores"]["base"]["mean"] == 2.0 and len(report["scores"]["aligned"]["interval"]) == 2
    assert report["tasks"] == {
        "short": {"base": 1.0, "aligned": 3.0, "n": 1},
        "long": {"base": 2.5, "aligned": 1.5, "n": 2},
    }
    assert report["other_judges"]["constant"]["ties"] == 3 and report["other_judges"]["constant"]["parts"] == ["constant"]
    assert report["arms"]["sft"]["wins"] == 3 and report["arms"]["sft"]["aligned_over_this"]["losses"] == 3
    assert report["items"][0] == {
        "prompt": "p0",
        "seed": 7,
        "task": "short",
        "base_score": 1.0,
        "aligned_score": 3.0,
        "base_text": "a",
        "aligned_text": "aaa",
    }
    assert report["lengths"]["words"] == {"base": 1, "aligned": 1, "change": 0, "interval": [0, 0], "base_spread": 0}
    assert "artefacts" not in report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_weighted_judge_names_its_parts_and_a_judge_its_limits():
    class Marked(Length):
        broken_below, right_from = 1, 3

    report = evaluate_paired(BASE, ALIGNED, CONDITIONS, [7, 8, 9], [Marked(), Panel([Length()], [-1])], seed=0)
    expected = {"name": "length", "version": "2", "parts": ["length"], "broken_below": 1.0, "right_from": 3.0}
    assert report["judge"] == expected
    assert report["other_judges"]["-1 length"]["parts"] == ["length"]


def test_the_same_seed_gives_the_same_numbers():
    first, second = (evaluate_paired(BASE, ALIGNED, CONDITIONS, [7, 8, 9], [Length()], seed=4) for _ in range(2))
    assert first == second


def test_pictures_get_their_statistics():
    grey, red = Image.new("RGB", (8, 8), (120, 120, 120)), Image.new("RGB", (8, 8), (255, 0, 0))
    report = evaluate_paired([grey, grey], [red, red], CONDITIONS[:2], [0, 1], [Constant(0.0)], seed=0)
    block = report["artefacts"]["saturation"]
    assert (block["base"], block["aligned"], block["change"], block["interval"]) == (0.0, 1.0, 1.0, [1.0, 1.0])
    assert block["base_spread"] == 0.0 and report["artefacts"]["clipping"]["aligned"] == 1.0


def test_what_cannot_be_compared_is_explained():
    with pytest.raises(UserError, match="3 prompts, 2 aligned"):
        evaluate_paired(BASE, ALIGNED[:2], CONDITIONS, [7, 8, 9], [Length()], seed=0)
    with pytest.raises(UserError, match="3 prompts, 1 sft"):
        evaluate_paired(BASE, ALIGNED, CONDITIONS, [7, 8, 9], [Length()], seed=0, arms={"sft": ["a"]})
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate_paired([], [], [], [], [Length()], seed=0)
    with pytest.raises(UserError, match="at least one judge"):
        evaluate_paired(BASE, ALIGNED, CONDITIONS, [7, 8, 9], [], seed=0)
    with pytest.raises(UserError, match="gave nan for output 0, prompt 'p0'"):
        evaluate_paired(BASE, ALIGNED, CONDITIONS, [7, 8, 9], [Constant(math.nan)], seed=0)


def test_a_benchmarks_category_groups_as_a_task_does():
    conditions = [{"prompt": "a", "category": "Arts"}, {"prompt": "b", "task": "count", "category": "Arts"}, {"prompt": "c"}]
    found = by_task(conditions, [0.0, 1.0, 0.0], [1.0, 1.0, 0.0])
    assert found == {"Arts": {"base": 0.0, "aligned": 1.0, "n": 1}, "count": {"base": 1.0, "aligned": 1.0, "n": 1}}
