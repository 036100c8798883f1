"""MODPO's margins: judged once, kept, weighted when they are read, and what they do to the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.scores import Scores, Unit
from polyalign.datasets.pairs import PairStore
from polyalign.modalities import margins
from polyalign.modalities.margins import WithMargins, judge_margins


class Count:
    """How often a letter occurs. ``asked`` counts outputs."""

    version = "1"

    def __init__(self, letter: str, broken_after: float = float("inf")):
        self.name, self.letter, self.asked, self.broken_after = f"count-{letter}", letter, 0, broken_after

    def score(self, conditions: Sequence[Any], outputs: Sequence[str]) -> list[float]:
        self.asked += len(outputs)
        if self.asked > self.broken_after:
            raise KeyboardInterrupt
        assert len(conditions) == len(outputs)
        return [float(text.count(self.letter)) for text in outputs]


def store_of(folder: Path, count: int = 5) -> PairStore:
    store = PairStore(folder, "text")
    provenance = {"model": "m", "chosen_seed": 0, "rejected_seed": 1}
    rows = [
        {
            "pair_id": f"p{index}",
            "condition": {"prompt": f"question {index}"},
            "chosen": "a" * index + "b",
            "rejected": "b" * (index + 2),
            "chosen_scores": {"j": 1.0},
            "rejected_scores": {"j": 0.0},
            "provenance": provenance,
        }
        for index in range(count)
    ]
    store.write_shard(0, rows)
    return store


def test_margins_are_the_weighted_sums_of_all_judges(tmp_path: Path) -> None:
    store = store_of(tmp_path / "pairs")
    scores = judge_margins(store, [Count("a"), Count("b")], tmp_path / "margins")
    assert scores["p3"] == {"count-a": (3.0, 0.0), "count-b": (1.0, 5.0)}
    data = WithMargins(store, scores, {"count-a": 2.0, "count-b": -0.5})
    assert len(data) == 5
    assert [row["margins"] for row in data.rows([3, 0])] == [(5.5, -2.5), (-0.5, -1.0)]
    assert data.rows([3])[0]["chosen"] == "aaab"
    with pytest.raises(UserError, match="'p0' has no margin of count-c"):
        WithMargins(store, scores, {"count-c": 1.0}).rows([0])


def test_nothing_is_judged_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margins, "PART", 2)
    store = store_of(tmp_path / "pairs")
    with pytest.raises(KeyboardInterrupt):
        judge_margins(store, [Count("a", broken_after=5)], tmp_path / "margins")
    again = Count("a")
    found = judge_margins(store, [again], tmp_path / "margins")
    assert again.asked == 6 and found == judge_margins(store, [Count("a")], tmp_path / "whole")
    idle = Count("a")
    assert judge_margins(store, [idle], tmp_path / "margins") == found and idle.asked == 0


def test_scores_of_other_pairs_or_judges_are_refused(tmp_path: Path) -> None:
    judge_margins(store_of(tmp_path / "pairs"), [Count("a")], tmp_path / "margins")
    with pytest.raises(UserError, match="holds scores of other pairs or judges: judges was"):
        judge_margins(store_of(tmp_path / "pairs"), [Count("b")], tmp_path / "margins")
    with pytest.raises(UserError, match="pairs was"):
        judge_margins(store_of(tmp_path / "more", 6), [Count("a")], tmp_path / "margins")
    (tmp_path / "margins" / "margins.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        judge_margins(store_of(tmp_path / "pairs"), [Count("a")], tmp_path / "margins")


def test_judges_that_cannot_give_margins_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "pairs")
    with pytest.raises(UserError, match="give at least one of margins.judges"):
        judge_margins(store, [], tmp_path / "margins")
    with pytest.raises(UserError, match="two of margins.judges are called 'count-a'"):
        judge_margins(store, [Count("a"), Count("a")], tmp_path / "margins")
    ranking = Count("a")
    ranking.relative = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="gives none a score of its own"):
        judge_margins(store, [ranking], tmp_path / "margins")
    broken = Count("a")
    broken.score = lambda conditions, outputs: [float("nan")] * len(outputs)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="scores must be finite numbers; pairs judged before are kept"):
        judge_margins(store, [broken], tmp_path / "margins")


def test_margins_enter_the_loss_on_the_scale_of_the_reward(tmp_path: Path) -> None:
    store = store_of(tmp_path / "pairs")
    scores = judge_margins(store, [Count("a"), Count("b")], tmp_path / "margins")
    rows = WithMargins(store, scores, {"count-a": 0.3, "count-b": 0.1}).rows(range(5))
    given = torch.tensor([row["margins"] for row in rows])
    values = torch.randn(5, 2, 1, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 2, 1, dtype=torch.bool)
    policy, reference = Scores(values, mask, Unit("token")), Scores(0.5 * values, mask, Unit("token"))
    spec = SPEC.validate_python({"name": "modpo", "weight": 0.25, "beta": {"value": 0.2, "convention": "nats"}})
    batch = Batch(tuple(row["pair_id"] for row in rows), torch.tensor([[1.0, 0.0]] * 5), margins=given)
    found = build(spec)({"policy": policy, "reference": reference}, batch, beta=0.2).loss
    u = (0.2 * 0.5 * values.squeeze(-1) - given) / 0.25
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(u[:, 0] - u[:, 1]))
    assert json.loads((tmp_path / "margins" / "margins.json").read_text())["judges"] == {"count-a": "1", "count-b": "1"}
