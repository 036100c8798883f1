"""Every filter, the counts of the audit, and the two measures of text."""

from __future__ import annotations

import math
import random

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.attention_ratio import Looked
from polyalign.modalities.vlm.filters import (
    Candidate,
    FilterConfig,
    edit_distance,
    path_perplexity,
    perplexity,
    relative_edit_distance,
    select,
)

AWAY = Looked(torch.tensor([0.3, 0.7]), 0.3, (0,), "sequence")
THERE = Looked(torch.tensor([0.9, 0.1]), 0.9, (0,), "sequence")


def pair(chosen: str = "a red bus", rejected: str = "two green cars", ppl: float = 2.0, seen: Looked = AWAY) -> Candidate:
    return Candidate(chosen, rejected, ppl, seen)


REFUSED = {
    "empty": pair(rejected=" \n"),
    "same": pair(rejected=" a  red bus"),
    "chosen_below": pair(chosen="x" * 512, rejected="y" * 400),
    "attention": pair(seen=THERE),
    "perplexity": pair(ppl=1.1),
    "length_ratio": pair(rejected="y" * 91),
    "edit_distance": pair(chosen="a red bus in a street", rejected="a red bus in a street."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_filter_refuses_its_own(name: str) -> None:
    found = select([pair(), REFUSED[name]])
    assert found.kept == [0]
    assert {key: count for key, count in found.audit.dropped.items() if count} == {name: 1}


@pytest.mark.parametrize("name", ["chosen_below", "attention", "perplexity", "length_ratio", "edit_distance"])
def test_each_can_be_turned_off(name: str) -> None:
    found = select([REFUSED[name]], FilterConfig.model_validate({name: None}))
    assert found.kept == [0] and name not in found.audit.dropped


def test_counts_add_up() -> None:
    generator = random.Random(0)
    words = ["red", "a red bus", "green", "", "two green cars", "red" * 60]
    pairs = [
        pair(generator.choice(words[:3]), generator.choice(words), generator.uniform(1, 1.3), generator.choice([AWAY, THERE]))
        for _ in range(500)
    ]
    audit = select(pairs).audit
    assert audit.pairs == 500 == audit.kept + sum(audit.dropped.values())
    assert all(audit.alone[name] >= count for name, count in audit.dropped.items())
    assert sum(audit.alone.values()) > sum(audit.dropped.values()) and 0 < audit.kept < 400
    assert audit.plain()["dropped"] == audit.dropped and audit.lines()[0] == f"500 pairs, {audit.kept} kept"


def test_bounds() -> None:
    just = {"perplexity": pair(ppl=1.1000001), "chosen_below": pair(chosen="x" * 511, rejected="y" * 511)}
    assert select([just["perplexity"], just["chosen_below"], pair(rejected="y" * 90)]).kept == [0, 1, 2]


def test_relative_rule() -> None:
    even = Looked(torch.tensor([0.51, 0.49]), 0.51, (0,), "sequence")
    assert select([pair(seen=even)]).kept == [0]
    assert select([pair(seen=even)], FilterConfig(attention="not_first")).kept == []


def test_wrong_input() -> None:
    with pytest.raises(UserError, match="row 7: the right answer is empty"):
        select([Candidate(" ", "x", 2.0, AWAY, "row 7")])
    with pytest.raises(UserError, match="row 7: the filter perplexity needs what was not recorded.*perplexity: null"):
        select([Candidate("x", "yy", None, AWAY, "row 7")])
    with pytest.raises(UserError, match="the filter attention needs"):
        select([Candidate("x", "yy", 2.0, None)])
    with pytest.raises(UserError, match="filter perplexity needs"):
        select([pair(ppl=math.nan)])


class TestPerplexity:
    def test_by_hand(self) -> None:
        assert perplexity(torch.tensor([0.5, 0.125]).log()) == pytest.approx(4.0)
        assert path_perplexity(torch.tensor([[0.0, 0.0], [0.0, 0.0]])) == pytest.approx(2.0)

    def test_no_token(self) -> None:
        with pytest.raises(UserError, match=r"shape \(0,\)"):
            perplexity(torch.zeros(0))


class TestEditDistance:
    def test_by_hand(self) -> None:
        assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 == edit_distance("abc", "")
        assert edit_distance(["a", "red", "bus"], ["a", "bus"]) == 1
        assert relative_edit_distance("", "") == 0 and relative_edit_distance("ab", "cd") == 1
        assert relative_edit_distance("abcd", "abxd") == 0.25

    def test_against_the_table(self) -> None:
        generator = random.Random(1)
        for _ in range(200):
            first, second = ("".join(generator.choices("abc", k=generator.randint(0, 12))) for _ in range(2))
            row = list(range(len(second) + 1))
            for i, one in enumerate(first, start=1):
                before, row[0] = row[0], i
                for j, other in enumerate(second, start=1):
                    before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
            assert edit_distance(first, second) == row[-1] == edit_distance(second, first)
