"""What is kept for evaluation: no conversation is on both sides, and conversations that end alike are not one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.held_out import TrainingPairs, evaluation_conditions, split_pairs, tell_kept_aside

COUNT = 40


def store_of(folder: Path, conditions: list[dict[str, Any]]) -> PairStore:
    scores = {"chosen_scores": {"user": 1.0}, "rejected_scores": {"user": 0.0}}
    rows = [
        {"pair_id": str(index), "condition": condition, "chosen": "a", "rejected": "b", **scores, "provenance": {}}
        for index, condition in enumerate(conditions)
    ]
    store = PairStore(folder, "text")
    store.write_shard(0, rows)
    return store


def conversation(index: int, last: str = "Go on.") -> dict[str, Any]:
    before = [{"role": "user", "content": f"Tell me of {index}"}, {"role": "assistant", "content": "Well"}]
    return {"prompt": last, "messages": [*before, {"role": "user", "content": last}]}


def wanted(**changes: Any) -> Any:
    return SimpleNamespace(**{"prompts": None, "held_out": 0.3, "seeds_per_prompt": 2, **changes})


def none_asked(_prompts: Any, _seed: int) -> list[dict[str, Any]]:
    raise AssertionError("the recipe names no prompts")


def test_conversations_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    store = store_of(tmp_path, [conversation(index) for index in range(COUNT)])
    trained, kept = split_pairs(wanted(), 1, store)
    assert sorted(trained + kept) == list(range(COUNT)) and 4 < len(kept) < 25
    asked = evaluation_conditions(wanted(), 1, store, none_asked)
    assert len(asked) == 2 * len(kept) and asked[0] == asked[1] == conversation(kept[0])
    assert len(TrainingPairs(store, trained)) == len(trained)


def test_how_many_are_kept_aside_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell_kept_aside(wanted(), [0, 2, 3], [1])
    assert capsys.readouterr().err == "evaluate.held_out = 0.3 keeps 1 of 4 pairs (25%) aside for evaluation\n"
    tell_kept_aside(wanted(prompts="given"), [0, 1], [])
    assert capsys.readouterr().err == ""


def test_one_conversation_stays_on_one_side_however_it_is_spaced(tmp_path: Path) -> None:
    both = [one for index in range(COUNT) for one in (conversation(index), conversation(index, "  go  ON."))]
    _, kept = split_pairs(wanted(), 1, store_of(tmp_path, both))
    assert len(kept) % 2 == 0 and all(index + 1 in kept for index in kept if index % 2 == 0)


def test_only_the_same_conversation_is_an_overlap(tmp_path: Path) -> None:
    store = store_of(tmp_path, [conversation(index) for index in range(3)])
    asked = evaluation_conditions(wanted(prompts="new"), 1, store, lambda prompts, seed: [conversation(7)])
    assert asked == [conversation(7)] * 2
    with pytest.raises(UserError, match="1 of these prompts are also prompts of the pairs"):
        evaluation_conditions(wanted(prompts="old"), 1, store, lambda prompts, seed: [conversation(7), conversation(2)])


@pytest.mark.parametrize(("share", "words"), [(0.0, "keeps none of the 5 pairs"), (0.999999, "keeps all of the 5 pairs")])
def test_an_empty_side_is_refused(share: float, words: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, [{"prompt": str(index)} for index in range(5)])
    with pytest.raises(UserError, match=words):
        split_pairs(wanted(held_out=share), 0, store)
