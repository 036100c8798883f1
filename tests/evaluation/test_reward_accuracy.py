"""Accuracy of rewards on pairs, and explicit against implicit ones in and out of distribution."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.core.references import FrozenCopy
from polyalign.evaluation.implicit_reward import implicit_reward_accuracy
from polyalign.evaluation.reward_accuracy import ImplicitMargins, as_text, compare_rewards, pair_accuracy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import TinyAdapter, TinyPairs  # noqa: E402  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)


class Table:
    """A judge that looks its scores up by the output."""

    version = "1"

    def __init__(self, scores: dict[str, float], name: str = "table"):
        self.scores, self.name = scores, name

    def score(self, conditions: Any, outputs: Any) -> list[float]:
        return [self.scores[output] for output in outputs]


def pair(place: int, chosen: str, rejected: str, prompt: str | None = None) -> dict[str, Any]:
    return {
        "pair_id": f"p{place}",
        "condition": {"prompt": prompt or f"prompt {place}"},
        "chosen": chosen,
        "rejected": rejected,
    }


SCORES = {"good": 2.0, "fair": 1.0, "even": 1.0, "bad": 0.0}


def test_accuracy_ties_and_margins_by_hand() -> None:
    pairs = [pair(0, "good", "bad"), pair(1, "bad", "fair"), pair(2, "fair", "even"), pair(3, "good", "fair", "prompt 0")]
    found = pair_accuracy(Table(SCORES), pairs)
    assert found.points == (1.0, 0.0, 0.5, 1.0) and found.accuracy == 2.5 / 4
    assert (found.pairs, found.prompts, found.ties) == (4, 3, 1)
    assert found.mean_margin == (2 - 1 + 0 + 1) / 4
    assert found.interval[0] <= found.accuracy <= found.interval[1]
    assert pair_accuracy(Table(SCORES), pairs, ties="wrong").accuracy == 2 / 4
    left = pair_accuracy(Table(SCORES), pairs, ties="left_out")
    assert left.accuracy == pytest.approx(2 / 3) and left.pairs == 3 and left.points[2] is None
    assert pair_accuracy(Table(SCORES), pairs) == found
    assert "points" not in found.as_json() and json.loads(json.dumps(found.as_json())) == found.as_json()


def test_pairs_of_one_prompt_are_not_independent_evidence() -> None:
    right = [index % 10 < 8 for index in range(200)]
    alone = [pair(index, *(("good", "bad") if ok else ("bad", "good"))) for index, ok in enumerate(right)]
    together = [
        {**one, "condition": {"prompt": f"prompt {index // 10 % 4 + 4 * ok}"}}
        for (index, one), ok in zip(enumerate(alone), right, strict=True)
    ]
    narrow, wide = (pair_accuracy(Table(SCORES), pairs).interval for pairs in (alone, together))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    # the turns before the last one belong to the prompt
    turns = [
        {**one, "condition": {"prompt": "Why?", "messages": [{"role": "user", "content": str(place)}]}}
        for place, one in enumerate(alone[:6])
    ]
    assert pair_accuracy(Table(SCORES), turns).prompts == 6


def splits() -> dict[str, list[dict[str, Any]]]:
    right = {"in distribution": 90, "prompt shift": 80, "response shift": 70}
    return {
        name: [pair(place, "good", "bad") if place < count else pair(place, "bad", "good") for place in range(100)]
        for name, count in right.items()
    }


def test_explicit_against_implicit_split_by_split() -> None:
    given = splits()
    worse = {name: [*rows[10:], *(pair(place, "even", "fair") for place in range(100, 110))] for name, rows in given.items()}
    explicit = Table(SCORES, "explicit head")
    alike = compare_rewards({"EXRM": explicit, "DPORM": Table(SCORES)}, given)
    for block in alike["splits"].values():  # the same rewards: the lead is exactly nothing
        assert block["lead"]["DPORM"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert alike["scorers"]["EXRM"] == {"name": "explicit head", "version": "1"}
    outside = alike["out_of_distribution"]["accuracy"]["EXRM"]
    assert outside["mean"] == pytest.approx(0.75) and outside["drop"] == pytest.approx(0.15)
    assert outside["worst"] == {"split": "response shift", "accuracy": 0.7}
    assert outside["drop_interval"][0] > 0.0 and 0.6 < outside["interval"][0] < 0.75 < outside["interval"][1] < 0.85

    lazy = Table({**SCORES, "good": 1.0, "bad": 1.0}, "lazy")  # sees no difference at all
    report = compare_rewards({"EXRM": explicit, "lazy": lazy}, given, seed=3)
    assert report["splits"]["in distribution"]["accuracy"]["lazy"]["accuracy"] == 0.5
    lead = report["splits"]["prompt shift"]["lead"]["lazy"]
    assert lead["difference"] == pytest.approx(0.3) and lead["interval"][0] > 0.2
    mean = report["out_of_distribution"]["lead"]["lazy"]
    assert mean["difference"] == pytest.approx(0.25)
    assert mean["interval"][1] - mean["interval"][0] < lead["interval"][1] - lead["interval"][0] + 0.05
    assert json.loads(json.dumps(report)) == report
    assert compare_rewards({"EXRM": explicit, "lazy": lazy}, given, seed=3) == report
    assert compare_rewards({"EXRM": explicit}, worse, ties="wrong")["splits"]["prompt shift"]["accuracy"]["EXRM"]["ties"] == 10

    lines = as_text(report).splitlines()
    assert lines[0].split() == ["pairs", "EXRM", "lazy", "EXRM", "-", "lazy"]
    assert lines[1].startswith("in distribution") and "0.900 [" in lines[1] and "+0.400 [+" in lines[1]
    assert lines[4].startswith("mean out of distribution") and "+0.250 [+" in lines[4]
    assert lines[5].startswith("drop to it") and "+0.150 [+" in lines[5]


def test_paired_differences_are_narrower_than_those_of_strangers() -> None:
    """Two rewards that err on nearly the same pairs: their difference is known better than either accuracy."""
    rows = splits()["prompt shift"]
    outputs = {"good": 2.0, "bad": 0.0}
    rows = [
        {**row, "chosen": f"{row['chosen']} {place}", "rejected": f"{row['rejected']} {place}"}
        for place, row in enumerate(rows)
    ]
    scores = {row[side]: outputs[row[side].split()[0]] for row in rows for side in ("chosen", "rejected")}
    other = {**scores, "good 0": -1.0}
    report = compare_rewards({"a": Table(scores), "b": Table(other)}, {"in distribution": rows, "prompt shift": rows})
    low, high = report["splits"]["prompt shift"]["lead"]["b"]["interval"]
    assert report["splits"]["prompt shift"]["lead"]["b"]["difference"] == pytest.approx(0.01)
    assert 0.0 <= low and high - low < 0.05


def test_bad_input_is_named() -> None:
    pairs = [pair(0, "good", "bad"), pair(1, "good", "odd")]
    for value in (math.nan, math.inf):
        with pytest.raises(
            UserError, match=rf"'table' \(version 1\) gave {value} for the rejected output of pair 'p1', prompt"
        ):
            pair_accuracy(Table({**SCORES, "odd": value}), pairs)

    class Short(Table):
        def score(self, conditions: Any, outputs: Any) -> list[float]:
            return super().score(conditions, outputs)[:-1]

    with pytest.raises(UserError, match="gave 1 scores for 2 outputs"):
        pair_accuracy(Short(SCORES), pairs[:1])
    with pytest.raises(UserError, match="ties is 'no'; allowed: half, wrong, left_out"):
        pair_accuracy(Table(SCORES), pairs[:1], ties="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="there are none"):
        pair_accuracy(Table(SCORES), [])
    with pytest.raises(UserError, match="the same reward in all 1 pairs"):
        pair_accuracy(Table(SCORES), [pair(0, "even", "fair")], ties="left_out")
    good, judge = pairs[:1], {"a": Table(SCORES)}
    for given, said in (
        ({"prompt shift": good}, "'in distribution' is missing; given are: 'prompt shift'"),
        ({}, "is missing; given are: none"),
        ({"in distribution": good}, "no split out of distribution"),
        ({"in distribution": good, "prompt shift": []}, "'prompt shift' has no pairs"),
    ):
        with pytest.raises(UserError, match=said):
            compare_rewards(judge, given)
    with pytest.raises(UserError, match="one or more scorers"):
        compare_rewards({}, {"in distribution": good, "prompt shift": good})
    with pytest.raises(UserError, match="allowed here: half, wrong"):
        compare_rewards(judge, {"in distribution": good, "prompt shift": good}, ties="left_out")  # pyright: ignore[reportArgumentType]


def test_a_policy_in_memory_takes_part_and_agrees_with_the_other_accuracy() -> None:
    adapter = TinyAdapter()
    model = adapter.trainable(adapter.load())
    reference = FrozenCopy(adapter.load().network)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    rows = TinyPairs().rows(range(12))
    scorer = ImplicitMargins(adapter, model, reference, draws=3, batch_size=5)
    found = pair_accuracy(scorer, rows)
    expected = implicit_reward_accuracy(adapter, model, reference, rows, draws=3, batch_size=5)
    assert found.accuracy == expected["accuracy"] and found.mean_margin == pytest.approx(expected["mean_margin"])
    assert 0 < sum(point or 0.0 for point in found.points) < 12 and scorer.version == "1 tiny, 3 draws"
    with pytest.raises(UserError, match="gave a margin of nan for pair 'pair-003'"):
        scorer.margins(TinyPairs(broken=3).rows(range(6)))
