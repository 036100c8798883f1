"""rDPO as its authors' code has it: losers are scored by the likeliest other token, and the reference has to be live."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.core.objectives import build
from polyalign.core.objectives.objective import Objective, Term
from polyalign.core.objectives.serves import Offer, Plan, refuse_unless_served
from polyalign.core.scores import DenseStatistics, Scores

sys.path.insert(0, str(Path(__file__).resolve().parent))

from objective_cases import TOKENS, batch, spec  # noqa: E402  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)
MASK = torch.tensor([[[True, True], [True, True], [True, False]]]).expand(4, 3, 2)
BETA = 0.3


def drawn(seed: int) -> torch.Tensor:
    values = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -values.abs() * MASK


def seats(policy: torch.Tensor, others: torch.Tensor) -> dict[str, Scores]:
    return {
        "policy": Scores(policy, MASK, TOKENS, dense=DenseStatistics(runner_up=others)),
        "reference": Scores(drawn(2), MASK, TOKENS, dense=DenseStatistics(runner_up=drawn(3))),
    }


TARGET = [[1.0, 0.0, 0.0]] * 4
HARDEST = build(spec("rdpo", loser_logp="hardest_negative", visual=0.5))


def test_by_hand() -> None:
    policy, others = drawn(1).requires_grad_(True), drawn(4).requires_grad_(True)
    outcome = HARDEST(seats(policy, others), batch(TARGET), beta=BETA)
    won = (policy - drawn(2))[:, 0].sum(-1)
    lost = ((others - drawn(3)) * MASK)[:, 1:].sum(-1)
    expected = torch.log1p(torch.exp(-BETA * (won - lost[:, 0]))) + 0.5 * torch.log1p(torch.exp(-BETA * (won - lost[:, 1])))
    torch.testing.assert_close(outcome.loss, expected)
    found = torch.autograd.grad(outcome.loss.sum(), [policy, others], retain_graph=True)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), [policy, others]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found[0][:, 1:].any() and not found[1][:, 0].any()
    torch.testing.assert_close(outcome.statistics["reward"][:, 1], BETA * lost[:, 0].detach())


def test_the_place_of_the_winner_is_the_targets() -> None:
    objective = Objective("pair", terms=(Term(hardest_losers=True),))
    both = {name: scores.of_candidates([1, 0]) for name, scores in seats(drawn(1), drawn(4)).items()}
    first = objective(
        {name: scores.of_candidates([0, 1]) for name, scores in seats(drawn(1), drawn(4)).items()},
        batch([[1.0, 0.0]] * 4),
        beta=BETA,
    )
    torch.testing.assert_close(objective(both, batch([[0.0, 1.0]] * 4), beta=BETA).loss, first.loss)


def test_labels_are_the_default_and_ask_for_nothing() -> None:
    paper = build(spec("rdpo"))
    assert paper.needs == {"value"} and not paper.reference_needs
    assert HARDEST.needs == {"value", "runner_up"} and HARDEST.reference_needs == {"runner_up"}
    plain = {name: Scores(scores.values, MASK, TOKENS) for name, scores in seats(drawn(1), drawn(4)).items()}
    torch.testing.assert_close(
        paper(plain, batch(TARGET), beta=BETA).loss, paper(seats(drawn(1), drawn(4)), batch(TARGET), beta=BETA).loss
    )


def test_what_cannot_give_them_is_refused() -> None:
    given = seats(drawn(1), drawn(4))
    bare = {name: Scores(scores.values, MASK, TOKENS) for name, scores in given.items()}
    with pytest.raises(UserError, match="needs runner_up .* policy seat"):
        HARDEST(bare, batch(TARGET), beta=BETA)
    with pytest.raises(UserError, match="runner_up .* from the reference as well"):
        HARDEST({"policy": given["policy"], "reference": bare["reference"]}, batch(TARGET), beta=BETA)
    offer = Offer("a VLM recipe", "token", frozenset({"value", "runner_up"}), frozenset({"visual triples"}))
    refuse_unless_served(HARDEST, offer, Plan("frozen", False), key="objective")
    with pytest.raises(UserError, match="cached has values only"):
        refuse_unless_served(HARDEST, offer, Plan("cached", False), key="objective")
