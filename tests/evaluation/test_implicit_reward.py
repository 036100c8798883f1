"""A modality of one weight: the likelihood of a number x is -(x - w)^2 plus noise that is drawn for the pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyalign.core.adapter import Model
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.randomness import rng
from polyalign.core.references import FrozenCopy
from polyalign.core.scores import Scores, Unit
from polyalign.evaluation.implicit_reward import implicit_reward_accuracy


class Weight(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(-((x - self.value) ** 2))


class Numbers:
    """Rows hold ``chosen`` and ``rejected`` numbers; a draw adds noise to both, the same for policy and reference."""

    def __init__(self, noise: float = 0.0):
        self.noise, self.steps = noise, []

    def prepare(self, model: Model, rows: Sequence[Any], *, step: int) -> Batch:
        self.steps.append(step)
        groups = [
            Group(row["pair_id"], (Candidate(None, None), Candidate(None, None)), row.get("target", (1.0, 0.0))) for row in rows
        ]
        return Batch.of_groups(groups, {"x": torch.tensor([[row["chosen"], row["rejected"]] for row in rows])})

    def draws(self, model: Model, batch: Batch, *, step: int) -> torch.Tensor:
        return torch.stack([torch.randn(2, generator=rng(0, "numbers", name, step)) for name in batch.group_ids])

    def score(self, model: Model, batch: Batch, draws: torch.Tensor) -> Scores:
        values = model.network(batch.tensors["x"] + self.noise * draws)[..., None]
        return Scores(values, torch.ones_like(values), Unit("timestep", elements=1, steps=1))

    def load(self) -> Model:
        return Model(Weight(0.0), {}, "numbers")

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        return [float(model.network.value) for _ in conditions]

    def trainable(self, model: Model) -> Model:
        return model

    def export(self, model: Model, folder: Path) -> None:
        torch.save(model.network.state_dict(), folder / "weight.pt")


def pair(name: str, chosen: float, rejected: float, **more: Any) -> dict[str, Any]:
    return {"pair_id": name, "condition": {"prompt": name}, "chosen": chosen, "rejected": rejected, **more}


def moved(value: float) -> tuple[Model, FrozenCopy]:
    """A policy at ``value`` with a reference at 0: the reward of x is 2 x value - value^2."""
    model = Numbers().load()
    reference = FrozenCopy(model.network)
    with torch.no_grad():
        model.network.get_parameter("value").fill_(value)
    model.network.train()
    return model, reference


def test_accuracy_by_hand():
    model, reference = moved(1.0)
    rows = [pair("a", 2.0, 1.0), pair("b", 3.0, -1.0), pair("c", 0.0, 5.0), pair("d", 4.0, 4.0)]
    found = implicit_reward_accuracy(Numbers(), model, reference, rows, draws=3, batch_size=3)
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)  # equal rewards count half
    assert found["mean_margin"] == pytest.approx(2 * (1 + 4 - 5 + 0) / 4)
    assert (found["pairs"], found["draws"], found["ties_left_out"]) == (4, 3, 0)
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert model.network.training  # as it was


def test_policy_equal_to_reference_is_half_right_exactly():
    model, reference = moved(0.0)
    rows = [pair(str(index), float(index), -3.0) for index in range(9)]
    found = implicit_reward_accuracy(Numbers(noise=1.0), model, reference, rows)
    assert found["accuracy"] == 0.5 and found["mean_margin"] == 0.0 and found["interval"] == [0.5, 0.5]


def test_without_a_reference_the_likelihood_decides():
    model, _ = moved(1.0)
    found = implicit_reward_accuracy(Numbers(), model, None, [pair("a", 2.0, 5.0), pair("b", 9.0, 1.0)])
    assert found["accuracy"] == 0.5 and found["mean_margin"] == pytest.approx((15 - 64) / 2)


def test_ties_are_left_out_and_the_target_says_who_was_chosen():
    model, reference = moved(1.0)
    rows = [pair("a", 1.0, 2.0, target=(0.1, 0.9)), pair("b", 1.0, 2.0, target=(0.5, 0.5))]
    found = implicit_reward_accuracy(Numbers(), model, reference, rows)
    assert (found["accuracy"], found["pairs"], found["ties_left_out"]) == (1.0, 1, 1)
    with pytest.raises(ValueError, match="all 1 pairs are ties"):
        implicit_reward_accuracy(Numbers(), model, reference, rows[1:])
    with pytest.raises(ValueError, match="0 pairs"):
        implicit_reward_accuracy(Numbers(), model, reference, [])


class Padded(Numbers):
    """A second unit under the mask, whose value is minus infinity, as padding of an impossible token has it."""

    def score(self, model: Model, batch: Batch, draws: torch.Tensor) -> Scores:
        found = super().score(model, batch, draws)
        values = torch.cat([found.values, torch.full_like(found.values, -torch.inf)], -1)
        mask = torch.cat([found.mask.bool(), torch.zeros_like(found.mask).bool()], -1)
        return Scores(values, mask, found.unit)


def test_nothing_under_the_mask_counts():
    model, reference = moved(1.0)
    rows = [pair("a", 2.0, 1.0), pair("b", 0.0, 5.0)]
    plain = implicit_reward_accuracy(Numbers(), model, reference, rows, draws=2)
    assert implicit_reward_accuracy(Padded(), model, reference, rows, draws=2) == plain


def test_more_draws_are_right_more_often_and_are_the_same_every_time():
    model, reference = moved(1.0)
    rows = [pair(str(index), 1.0, 0.0) for index in range(200)]
    adapter = Numbers(noise=2.0)
    found = implicit_reward_accuracy(adapter, model, reference, rows, batch_size=64)
    assert found["accuracy"] > found["accuracy_of_one_draw"] + 0.1
    assert found == implicit_reward_accuracy(Numbers(noise=2.0), model, reference, rows, batch_size=7)
    assert sorted(set(adapter.steps)) == list(range(-10, 0))  # steps that training never takes
