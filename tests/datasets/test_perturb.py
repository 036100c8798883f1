"""Perturbed captions by rule, and prompts chosen by clusters."""

import numpy as np
import pytest

from polyalign.datasets.audio.clusters import clusters_of, spread
from polyalign.datasets.audio.perturb import KINDS, Caption, is_temporal, perturbations, phrases_of

OTHERS = ("a horn", "a clap", "a bell")


@pytest.mark.parametrize(
    ("text", "phrases", "connectives"),
    [
        ("a bell then a drum", ("a bell", "a drum"), ("then",)),
        (
            "A dog barks while a man speaks, followed by birds.",
            ("A dog barks", "a man speaks", "birds"),
            ("while", "followed by"),
        ),
        ("A dog, and then a cat, a cow and a pig", ("A dog", "a cat", "a cow", "a pig"), ("and then", ",", "and")),
        ("thunder", ("thunder",), ()),
    ],
)
def test_captions_are_cut_at_connectives(text, phrases, connectives):
    assert Caption.of(text) == Caption(phrases, connectives)


def test_time_is_known_by_its_words():
    assert is_temporal("A bell, Followed by a drum") and is_temporal("rain while a car passes")
    assert not is_temporal("a bell and a drum") and not is_temporal("afterwards")


def test_strategy_three_changes_the_order_adds_and_removes():
    found = perturbations("a bell then a drum", "3", 20, others=OTHERS, seed=0)
    by_kind = {kind: {one.prompt for one in found if one.kind == kind} for kind in KINDS["3"]}
    assert by_kind["order"] == {"a drum then a bell", "a bell while a drum"}
    assert by_kind["remove"] == {"a bell", "a drum"}
    assert by_kind["add"] == {
        *("a bell then a drum then a horn", "a bell then a drum then a clap"),
        *("a horn then a bell then a drum", "a clap then a bell then a drum"),
    }
    assert perturbations("a bell and a drum", "3", 5, others=OTHERS, seed=0) == []


def test_two_that_sound_together_are_not_merely_exchanged():
    found = perturbations("a bell while a drum plays", "3", 20, others=(), seed=0)
    assert "a drum plays while a bell" not in {one.prompt for one in found}
    assert "a bell then a drum plays" in {one.prompt for one in found}


def test_strategy_two_drops_replaces_and_inverts():
    found = perturbations("a loud bell before a drum", "2", 50, others=OTHERS, seed=0)
    by_kind = {kind: {one.prompt for one in found if one.kind == kind} for kind in KINDS["2"]}
    assert by_kind["drop"] == {"a loud bell", "a drum"}
    assert by_kind["invert"] == {"a quiet bell before a drum", "a loud bell after a drum"}
    assert "a loud bell before a horn" in by_kind["replace"] and "a horn before a drum" in by_kind["replace"]
    assert {one.kind for one in perturbations("thunder", "2", 5, others=OTHERS, seed=0)} == {"replace"}


def test_the_same_seed_gives_the_same_captions_and_no_two_alike():
    def made(seed):
        return perturbations("a bell then a drum", "2", 5, others=OTHERS, seed=seed)

    assert made(0) == made(0) and made(0) != made(3)
    assert len({one.prompt for one in made(0)}) == 5 and "a bell then a drum" not in {one.prompt for one in made(0)}
    with pytest.raises(ValueError, match="strategy 3 has the kinds order, add, remove"):
        perturbations("a bell", "3", 1, others=(), seed=0, kinds=["drop"])


def test_phrases_of_other_captions():
    assert phrases_of(["a bell then a drum", "a drum, rain"]) == ["a bell", "a drum", "rain"]


def test_clusters_find_what_lies_together_and_give_as_many_of_each():
    draws = np.random.default_rng(0)
    points = np.concatenate([centre + 0.05 * draws.normal(size=(size, 3)) for centre, size in ((0, 40), (4, 10), (-4, 3))])
    labels = clusters_of(points, 3, seed=1)
    assert [len(set(part.tolist())) for part in (labels[:40], labels[40:50], labels[50:])] == [1, 1, 1]
    kept = spread(points, 3, 4, seed=1)
    assert kept == sorted(kept) == spread(points, 3, 4, seed=1)
    assert [sum(low <= place < high for place in kept) for low, high in ((0, 40), (40, 50), (50, 53))] == [4, 4, 3]
    assert len(set(clusters_of(np.zeros((4, 2)), 2, seed=0))) <= 2
    with pytest.raises(ValueError, match="5 clusters of 4"):
        clusters_of(np.zeros((4, 2)), 5, seed=0)
