"""The figures that ``polyalign diagnose`` reads from metrics.jsonl."""

from __future__ import annotations

import math

import pytest
import torch

from polyalign.core.algorithm import with_likelihood_figures
from polyalign.core.diagnostics import margin_figures, token_figures
from polyalign.core.objectives import Outcome
from polyalign.core.scores import Scores, Unit
from polyalign.core.tracking import figures_of


def test_margins_by_hand() -> None:
    found = margin_figures(torch.tensor([0.0, 1.0, 4.7, -4.7, -1.0]))
    assert found["margins/size"].tolist() == pytest.approx([0.0, 1.0, 4.7, 4.7, 1.0])
    assert found["margins/ties"].tolist() == [1, 0, 0, 0, 0]
    assert found["margins/satisfied"].tolist() == [0, 0, 1, 0, 0]
    assert found["margins/reversed"].tolist() == [0, 0, 0, 1, 0]


def scores(values: list[list[float]], kind: str = "token") -> Scores:
    tensor = torch.tensor([values])
    return Scores(tensor, torch.tensor([[[True, True], [True, False]]]), Unit(kind))  # pyright: ignore[reportArgumentType]


def test_tokens_are_means_under_the_mask_and_lengths_are_counted() -> None:
    policy = scores([[-1.0, -3.0], [-4.0, math.inf]])
    found = token_figures({"policy": policy})
    assert found["logps_per_token/policy"].tolist() == [[-2.0, -4.0]] and found["tokens"].tolist() == [[2.0, 1.0]]


def test_they_get_the_names_of_metrics_jsonl() -> None:
    seats = {"policy": scores([[-1.0, -3.0], [-4.0, 0.0]]), "reference": scores([[-2.0, -2.0], [-3.0, 0.0]])}
    outcome = with_likelihood_figures(Outcome(torch.zeros(1), {"margin": torch.tensor([5.0])}), seats)
    found = figures_of(outcome.statistics)
    expected = {
        "logps_per_token/policy_chosen": -2.0,
        "logps_per_token/policy_rejected": -4.0,
        "logps_per_token/reference_chosen": -2.0,
        "logps_per_token/reference_rejected": -3.0,
        "tokens/chosen": 2.0,
        "tokens/rejected": 1.0,
        "margins/satisfied": 1.0,
        "margins/reversed": 0.0,
        "margins/ties": 0.0,
        "margins/size": 5.0,
        "rewards/margins": 5.0,
    }
    assert {name: found[name] for name in expected} == expected


def test_errors_have_no_figures_of_tokens() -> None:
    seats = {"policy": scores([[-1.0, -3.0], [-4.0, 0.0]], "timestep")}
    found = with_likelihood_figures(Outcome(torch.zeros(1), {"margin": torch.tensor([0.5])}), seats).statistics
    assert not any(name.startswith(("tokens", "logps")) for name in found) and "margins/size" in found


def test_a_single_candidate_has_no_figures_of_another_one() -> None:
    found = figures_of({"reward": torch.tensor([[1.0], [2.0]]), "logps/policy": torch.tensor([[-1.0], [-3.0]])})
    assert found == {"rewards/chosen": 1.5, "logps/policy_chosen": -2.0}
