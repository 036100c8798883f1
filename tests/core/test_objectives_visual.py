"""Objectives on the same answer under other pictures: by hand, and in terms of rows that are compared with code of authors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.explain import objective_card
from polyalign.core.objectives import TABLE, Outcome, build
from polyalign.core.objectives.serves import Offer, Plan, refuse_unless_served
from polyalign.core.scores import DenseStatistics, Scores

sys.path.insert(0, str(Path(__file__).resolve().parent))

from objective_cases import TOKENS, batch, spec  # noqa: E402  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)
DOUBLE = torch.float64
MASK = torch.tensor([[[True] * 4, [True] * 3 + [False], [True] * 4]]).expand(5, 3, 4)
BETA = 0.7


def values(seed: int, candidates: int = 3) -> Tensor:
    drawn = torch.randn(5, candidates, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return -drawn.abs() * MASK[:, [0, 1, *range(2, 3)] + [2] * (candidates - 3)]


def outcome(name: str, places: tuple[int, ...] = (0, 1, 2), **options: object) -> tuple[Outcome, Tensor, Tensor]:
    """The outcome on some of the candidates, with the gradients by the values and by the KL of their tokens."""
    index = list(places)
    policy, kl = values(1)[:, index].requires_grad_(True), values(3).abs()[:, index].requires_grad_(True)
    mask = MASK[:, index]
    seats = {
        "policy": Scores(policy, mask, TOKENS, dense=DenseStatistics(kl=kl)),
        "reference": Scores(values(2)[:, index], mask, TOKENS),
    }
    target = [[1.0] + [0.0] * (len(index) - 1)] * 5
    found = build(spec(name, **options))(seats, batch(target), beta=BETA)
    found.loss.sum().backward()
    assert policy.grad is not None
    return found, policy.grad, torch.zeros_like(kl) if kl.grad is None else kl.grad


def ratios() -> Tensor:
    return ((values(1) - values(2)) * MASK).sum(-1)


def test_mdpo_is_three_logistic_losses() -> None:
    a, rejected, cropped = ratios().unbind(1)
    parts = [torch.log1p(torch.exp(-BETA * d)) for d in (a - rejected, a - cropped, a)]
    found, gradient, _ = outcome("mdpo")
    torch.testing.assert_close(found.loss, sum(parts))
    slopes = [-BETA * torch.sigmoid(-BETA * d) for d in (a - rejected, a - cropped, a)]
    torch.testing.assert_close(gradient[:, 0, 0], slopes[0] + slopes[1] + slopes[2])
    torch.testing.assert_close(gradient[:, 1, 0], -slopes[0])
    torch.testing.assert_close(gradient[:, 2, 0], -slopes[1])
    torch.testing.assert_close(
        outcome("mdpo", delta=0.4, anchored=0.5, visual=0.25)[0].loss,
        parts[0] + 0.25 * parts[1] + 0.5 * torch.log1p(torch.exp(0.4 - BETA * a)),
    )


def test_mdpo_without_its_anchor_is_re_align() -> None:
    one, two = outcome("mdpo", anchored=0.0, visual=0.5), outcome("rdpo", visual=0.5)
    torch.testing.assert_close(one[0].loss, two[0].loss)
    torch.testing.assert_close(one[1], two[1])
    assert list(one[0].statistics) == list(two[0].statistics)


def test_chip_by_hand() -> None:
    a, rejected, noised = ratios().unbind(1)
    kl = (values(3).abs() * MASK).sum(-1)
    margin = (a - rejected) + (a - noised) - 0.3 * (kl[:, 1] - kl[:, 0])
    found, gradient, by_kl = outcome("chip", alpha=0.3)
    torch.testing.assert_close(found.loss, torch.log1p(torch.exp(-BETA * margin)))
    slope = -BETA * torch.sigmoid(-BETA * margin)
    torch.testing.assert_close(gradient[:, 0, 0], 2 * slope)
    torch.testing.assert_close(gradient[:, 2, 0], -slope)
    assert by_kl[:, 0].eq(0).all(), "the winner's KL is frozen"
    assert by_kl[:, 2].eq(0).all(), "there is none under the noised image"
    torch.testing.assert_close(by_kl[:, 1, 0], -0.3 * slope)


def test_chip_without_images_is_tdpo2_and_without_both_is_dpo() -> None:
    for options, other, given in (({}, "tdpo2", {"alpha": 0.3}), ({"alpha": 0.0}, "dpo", {})):
        one = outcome("chip", **{"alpha": 0.3, **options}, visual=0.0)
        two = outcome(other, (0, 1), **given)
        torch.testing.assert_close(one[0].loss, two[0].loss)
        torch.testing.assert_close(one[1][:, :2], two[1])
        torch.testing.assert_close(one[2][:, :2], two[2])
        assert one[1][:, 2].eq(0).all()


def test_chip_without_a_kl_is_mcm_dpo_with_two_comparisons() -> None:
    policy, reference = values(1).clone(), values(2).clone()
    eight = [0, 1, 2, 2, 1, 1, 2, 2]
    mask = MASK[:, eight]
    seats = {name: Scores(part[:, eight], mask, TOKENS) for name, part in (("policy", policy), ("reference", reference))}
    chosen = spec("mcm_dpo", weights=[1, 1, 0, 0, 0, 0, 0], normaliser=1.0)
    found = build(chosen)(seats, batch([[1.0] + [0.0] * 7] * 5), beta=BETA)
    torch.testing.assert_close(found.loss, outcome("chip", alpha=0.0)[0].loss)


@pytest.mark.parametrize("name", ["rdpo", "mdpo", "chip", "mcm_dpo", "branches"])
def test_the_winners_own_likelihood_can_be_added(name: str) -> None:
    places = (0, 1, 2) if name != "mcm_dpo" else (0, 1, 2, 2, 1, 1, 2, 2)
    plain, added = outcome(name, places)[0].loss, outcome(name, places, sft=0.1)[0].loss
    torch.testing.assert_close(added - plain, -0.1 * values(1)[:, 0].mean(-1))
    anchored = outcome(name, places, anchor=0.2)[0].loss
    torch.testing.assert_close(anchored - plain, -0.2 * BETA * values(1)[:, 0].sum(-1))


def test_mia_dpo_is_dpo_with_the_mean_cross_entropy_of_the_winner() -> None:
    a, rejected, _ = ratios().unbind(1)
    expected = torch.log1p(torch.exp(-BETA * (a - rejected))) - 0.1 * values(1)[:, 0].mean(-1)
    torch.testing.assert_close(outcome("dpo", (0, 1), sft=0.1)[0].loss, expected)


@pytest.mark.parametrize("name", ["rdpo", "mdpo", "chip", "branches"])
def test_starts_where_all_pictures_are_alike(name: str) -> None:
    same = {seat: Scores(values(1), MASK, TOKENS, dense=DenseStatistics(kl=0 * values(3))) for seat in ("policy", "reference")}
    found = build(spec(name))(same, batch([[1.0, 0.0, 0.0]] * 5), beta=BETA)
    terms = {"rdpo": 2, "mdpo": 3, "chip": 1, "branches": 2}[name]
    torch.testing.assert_close(found.loss, torch.full((5,), terms * math.log(2.0), dtype=DOUBLE))
    assert found.statistics["margin"].eq(0.0).all()


def test_who_cannot_give_what_they_need_is_told() -> None:
    plan = Plan("adapter_off", cut=True)
    text = Offer("a text recipe", "token", frozenset({"value", "per_unit", "dense_kl"}))
    for name in ("mdpo", "chip"):
        with pytest.raises(UserError, match=f"{name} needs a third candidate for every pair, the chosen answer under another"):
            refuse_unless_served(build(spec(name)), text, plan, key="objective")
    seeing = Offer("a VLM recipe", "token", frozenset({"value"}), frozenset({"visual triples"}))
    refuse_unless_served(build(spec("mdpo")), seeing, plan, key="objective")
    refuse_unless_served(build(spec("chip", alpha=0.0)), seeing, plan, key="objective")
    with pytest.raises(UserError, match="chip needs dense_kl"):
        refuse_unless_served(build(spec("chip")), seeing, plan, key="objective")
    live = Offer("a VLM recipe", "token", frozenset({"value", "dense_kl"}), frozenset({"visual triples"}))
    with pytest.raises(UserError, match="train.reference.seat: cached"):
        refuse_unless_served(build(spec("chip")), live, Plan("cached", cut=False), key="objective")


def test_the_cards_say_what_they_train() -> None:
    assert "chosen answer under another image" in objective_card(TABLE["mdpo"])
    assert "dense_kl" in objective_card(TABLE["chip"]) and "sg K_w" in objective_card(TABLE["chip"])


EIGHT = (0, 1, 2, 2, 1, 1, 2, 2)
MCM = ("response", "image", "image+response", "context", "context+response", "context+image", "context+image+response")
SAME = {
    "dpo": ((0, 1), {"response": 1.0}, {}, "dpo", {}),
    "dpo, joint": ((0, 1), {"response": 3.0}, {"joint": True}, "dpo", {}),
    "cdpo": ((0, 1), {"response": 1.0}, {"label_smoothing": 0.2}, "cdpo", {"label_smoothing": 0.2}),
    "cdpo, joint": ((0, 1), {"response": 1.0}, {"label_smoothing": 0.2, "joint": True}, "cdpo", {"label_smoothing": 0.2}),
    "rdpo": ((0, 1, 2), {"response": 1.0, "image": 0.4}, {"sft": 0.1}, "rdpo", {"visual": 0.4, "sft": 0.1}),
    "rdpo, smoothed": (
        (0, 1, 2),
        {"response": 1.0, "image": 1.0},
        {"label_smoothing": 0.1, "anchor": 0.3},
        "rdpo",
        {"label_smoothing": 0.1, "anchor": 0.3},
    ),
    "mdpo": (
        (0, 1, 2),
        {"response": 1.0, "image": 0.5},
        {"anchored": 0.8, "delta": 0.3},
        "mdpo",
        {"visual": 0.5, "anchored": 0.8, "delta": 0.3},
    ),
    "chip without its KL": (
        (0, 1, 2),
        {"response": 1.0, "image": 0.5},
        {"joint": True, "normaliser": 1.0},
        "chip",
        {"alpha": 0.0, "visual": 0.5},
    ),
    "mcm_dpo": (EIGHT, dict(zip(MCM, (1.0, 0.5, 0.2, 0.5, 0.2, 0.2, 0.2), strict=True)), {"joint": True}, "mcm_dpo", {}),
    "mcm_dpo as its code divides": (
        EIGHT,
        dict(zip(MCM, (1.0, 0.5, 0.2, 0.5, 0.2, 0.2, 0.1), strict=True)),
        {"joint": True, "normaliser": 2.8},
        "mcm_dpo",
        {"weights": [1.0, 0.5, 0.2, 0.5, 0.2, 0.2, 0.1], "normaliser": 2.8},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_branches_with_the_terms_of_a_row_are_that_row(case: str) -> None:
    places, terms, options, other, given = SAME[case]
    one, two = outcome("branches", places, terms=terms, **options), outcome(other, places, **given)
    torch.testing.assert_close(one[0].loss, two[0].loss)
    torch.testing.assert_close(one[1], two[1])
    assert one[0].statistics.keys() == two[0].statistics.keys()
    if case not in ("dpo, joint", "cdpo, joint", "mcm_dpo"):  # the mean over losers is not the weighted one
        torch.testing.assert_close(one[0].statistics["margin"], two[0].statistics["margin"])


def test_branches_in_another_order_are_the_same_comparisons() -> None:
    terms = {"response": 1.0, "image": 0.3}
    for joint in (False, True):
        one = outcome("branches", (0, 1, 2), terms=terms, joint=joint)
        two = outcome("branches", (0, 2, 1), terms=dict(reversed(terms.items())), joint=joint)
        torch.testing.assert_close(one[0].loss, two[0].loss)
        torch.testing.assert_close(one[1], two[1][:, [0, 2, 1]])


def test_branches_are_called_by_what_loses_in_them_and_each_has_one_weight() -> None:
    found = spec("branches", terms={"response + image": 0.2, "response": 1})
    assert list(found.terms) == ["image+response", "response"]
    assert build(found).branches == ("image+response", "response")
    assert build(spec("branches")).branches == ("response", "image")
    assert build(spec("mcm_dpo")).branches == () == build(spec("dpo")).branches
    for options, words in {
        "nothing": ({"terms": {}}, "at least 1"),
        "no weight": ({"terms": {"image": 0.0}}, "greater than 0"),
        "twice": ({"terms": {"image+response": 1.0, "response+image": 1.0}}, "once more"),
        "twice in one": ({"terms": {"image+image": 1.0}}, "each once, joined by"),
        "empty": ({"terms": {"image+": 1.0}}, "names no branch"),
        "chosen": ({"terms": {"chosen": 1.0}}, "nothing loses in chosen"),
        "normaliser": ({"normaliser": 2.0}, "set 'joint: true'"),
        "delta": ({"delta": 0.1}, "give 'anchored' a weight"),
    }.values():
        with pytest.raises(ValidationError, match=words):
            spec("branches", **options)


def test_who_has_no_branches_is_told() -> None:
    text = Offer("a text recipe", "token", frozenset({"value", "per_unit"}))
    with pytest.raises(UserError, match="branches needs a candidate for every branch that its terms name, and a text recipe"):
        refuse_unless_served(build(spec("branches")), text, Plan("adapter_off", cut=True), key="objective")
