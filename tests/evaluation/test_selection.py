"""How pairs were drawn from questions: telling words, and their distance from those of all questions."""

from __future__ import annotations

import math

import pytest

from polyalign.evaluation.selection import selection, telling_word


@pytest.mark.parametrize(
    ("chosen", "rejected", "word"),
    [
        ("The square is red.", "The square is blue.", "red"),
        ("No, there is no dog.", "Yes, there is a dog.", "no"),
        ("two dogs and a cat", "two dogs", "and"),
        ("The dog.", "the dog sleeps", None),
        ("", "a dog", None),
    ],
)
def test_the_telling_word(chosen: str, rejected: str, word: str | None) -> None:
    assert telling_word(chosen, rejected) == word


def test_the_distance_by_hand() -> None:
    """Pairs say no three times of four, questions once of two: a quarter of the pairs would have to be others."""
    counts = {"questions": 12, "right": 8, "pairs": 5, "pairs_of_right": 1}
    found = selection(**counts, words={"yes": 5, "no": 5}, words_of_pairs={"no": 3, "yes": 1})
    assert {name: found[name] for name in counts} == counts
    assert found["words"]["pairs"] == 4 and found["words"]["distance"] == 0.25
    assert found["words"]["by_chance"] == pytest.approx(math.sqrt(2 * 0.25 / (4 * math.pi)), abs=1e-4)
    assert found["words"]["most"] == [["no", 0.75, 0.5], ["yes", 0.25, 0.5]]


def test_the_same_shares_have_no_distance_and_nothing_counted_has_none() -> None:
    counts = {"questions": 4, "right": 4, "pairs": 2, "pairs_of_right": 2}
    even = selection(**counts, words={"a": 2, "b": 2}, words_of_pairs={"a": 1, "b": 1})["words"]
    assert even["distance"] == 0.0 and even["most"] == []
    assert selection(**counts, words={}, words_of_pairs={})["words"] is None
