"""Slots one by one: unit weights, links, offsets, terms and what may not be combined."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives import Objective, Term
from polyalign.core.objectives.links import AlphaDivergence, Identity, JensenShannon
from polyalign.core.objectives.losses import Flags, Hinge, Listwise, Logistic, Robust, Scored, Square
from polyalign.core.objectives.numerics import exponent_cap
from polyalign.core.objectives.offsets import ConstantMargin, RewardMargins
from polyalign.core.objectives.regularisers import AddedSFT, WinnerAnchor
from polyalign.core.objectives.view import NOTHING, View
from polyalign.core.objectives.weights import Mean, Sum, reduce_units
from polyalign.core.objectives.weights_tokens import LengthDesensitised
from polyalign.core.scores import DenseStatistics, Scores, Unit

torch.set_num_threads(1)
TOKENS = Unit("token")
LINKS = [Identity(), JensenShannon(), AlphaDivergence(1.0), AlphaDivergence(0.5), AlphaDivergence(0.05)]
RATIO = st.floats(-60, 60)


def scores(values, mask=None, unit: Unit = TOKENS, **extra) -> Scores:
    values = torch.as_tensor(values)
    return Scores(values, torch.ones_like(values, dtype=torch.bool) if mask is None else torch.as_tensor(mask), unit, **extra)


def pairs(size: int = 1, candidates: int = 2, **extra) -> Batch:
    target = torch.zeros(size, candidates)
    target[:, 0] = 1.0
    return Batch(tuple(str(n) for n in range(size)), target, **extra)


def number(ratio: float) -> Tensor:
    return torch.tensor(ratio, dtype=torch.float64)


def logistic_loss(link, ratios: Tensor, beta: float = 1.0) -> Tensor:
    """-log sigmoid(beta (s_0 - s_1)) of log-ratios (G, 2), through a term."""
    seats = {"policy": scores(ratios.unsqueeze(-1))}
    return Objective("f", terms=(Term(link=link),))(seats, pairs(len(ratios)), beta=beta).loss


class TestUnitWeights:
    MASK = torch.tensor([[[True, True, False], [True, False, False]]])
    VALUES = torch.tensor([[[-1.0, -2.0, -5.0], [-4.0, -7.0, -9.0]]])

    def view(self, unit: Unit = TOKENS) -> View:
        return View(scores(self.VALUES, self.MASK, unit), None, pairs(), {}, 1.0)

    def reduced(self, weights, unit: Unit = TOKENS) -> list:
        view = self.view(unit)
        return reduce_units(view.policy_values, view.policy.mask, weights(view)).tolist()

    def test_sum_and_mean_of_tokens(self):
        assert self.reduced(Sum()) == [[-3.0, -4.0]] and self.reduced(Mean()) == [[-1.5, -4.0]]

    @pytest.mark.parametrize("kind", ["timestep", "position"])
    def test_draws_of_one_estimate_are_averaged(self, kind):
        unit = Unit(kind, elements=4, steps=10)
        assert self.reduced(Sum(), unit) == self.reduced(Mean(), unit) == [[-1.5, -4.0]]

    def test_weights_may_depend_on_the_partner_as_in_ld_dpo(self):
        weighted = LengthDesensitised(0.25)
        assert weighted.needs == {"per_unit"} and self.reduced(weighted) == [[-1.5, -4.0]]

    def test_no_gradient_flows_into_weights(self):
        values = self.VALUES.clone().requires_grad_(True)
        reduce_units(values, self.MASK, values).sum().backward()
        assert values.grad is not None
        torch.testing.assert_close(values.grad, torch.where(self.MASK, self.VALUES, 0.0))

    @pytest.mark.parametrize("poison", [-math.inf, math.nan])
    def test_what_lies_under_the_mask_harms_nothing(self, poison):
        values = torch.where(self.MASK, self.VALUES, poison).requires_grad_(True)
        seats = {"policy": scores(values, self.MASK), "reference": scores(values.detach(), self.MASK)}
        outcome = Objective("dpo", terms=(Term(),), regularisers=(AddedSFT(1.0),))(seats, pairs(), beta=0.1)
        outcome.loss.sum().backward()
        assert values.grad is not None and values.grad.isfinite().all() and values.grad[~self.MASK].eq(0.0).all()
        assert outcome.loss.item() == pytest.approx(math.log(2.0) + 1.5)

    def test_an_empty_completion_scores_nothing(self):
        values = torch.tensor([[[-1.0], [-2.0]]], requires_grad=True)
        mask = torch.tensor([[[True], [False]]])
        outcome = Objective("dpo", terms=(Term(weights=Mean()),))({"policy": scores(values, mask)}, pairs(), beta=1.0)
        outcome.loss.sum().backward()
        assert outcome.statistics["policy_value"].tolist() == [[-1.0, 0.0]]
        assert values.grad is not None and values.grad[0, 1].tolist() == [0.0]


class TestLinks:
    @pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
    @settings(max_examples=40, deadline=None)
    @given(a=RATIO, b=RATIO, c=RATIO)
    def test_differences_are_antisymmetric_and_add_up(self, link, a, b, c):
        a, b, c = number(a), number(b), number(c)
        assert torch.equal(link.difference(a, b), -link.difference(b, a)) and float(link.difference(a, a)) == 0.0
        whole, parts = link.difference(a, c), link.difference(a, b) + link.difference(b, c)
        scale = sum(float(link.difference(x, y).abs()) for x, y in ((a, b), (b, c), (a, c)))
        assert abs(float(whole - parts)) <= 1e-12 * scale

    @pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
    def test_score_starts_at_zero_with_slope(self, link):
        ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        link.score(ratio).backward()
        assert abs(link.score(ratio).item()) < 1e-15
        assert ratio.grad is not None and float(ratio.grad) == pytest.approx(0.5 if link.name == "jensen_shannon" else 1.0)

    def test_scores_by_their_formulas(self):
        r, b = torch.tensor([-3.0, 0.2, 4.0], dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        cases = {
            AlphaDivergence(1.0): lambda x: -(-x).exp(),
            AlphaDivergence(0.3): lambda x: -(-0.3 * x).exp() / 0.3,
            JensenShannon(): lambda x: (2 * x.exp() / (1 + x.exp())).log(),
        }
        for link, formula in cases.items():
            torch.testing.assert_close(link.difference(r, b), formula(r) - formula(b), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
    def test_gradcheck(self, link):
        ratios = torch.tensor([-4.0, 0.3, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
        base = torch.tensor([1.0, 0.7, -1.0, -1.5], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(link.difference, (ratios, base))

    @pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
    def test_equal_ratios_still_teach(self, alpha):
        a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        b = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        AlphaDivergence(alpha).difference(a, b).backward()
        assert a.grad is not None and b.grad is not None
        assert float(a.grad) == pytest.approx(math.exp(-1.5 * alpha)) and float(b.grad) == -float(a.grad)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_smaller_gradient_of_a_wide_pair_is_not_lost(self, dtype):
        a = torch.tensor(50.0, dtype=dtype, requires_grad=True)
        AlphaDivergence(1.0).difference(a, torch.tensor(-50.0, dtype=dtype)).backward()
        assert a.grad is not None and float(a.grad) == pytest.approx(math.exp(-50.0), rel=1e-5)

    def test_alpha_towards_zero_is_the_reverse_kl_and_one_is_the_forward_kl(self):
        r, b = torch.tensor([-2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
        torch.testing.assert_close(AlphaDivergence(1e-9).difference(r, b), r - b, rtol=1e-7, atol=0.0)
        assert AlphaDivergence(1.0).name == "forward_kl"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
    def test_extremes_are_finite_and_equal_ones_are_exactly_ln_2(self, link, dtype):
        values = [-750.0, -500.0, -80.0, 0.0, 80.0, 500.0, 750.0]
        ratios = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 2).requires_grad_(True)
        loss = logistic_loss(link, ratios, beta=0.5)
        loss.sum().backward()
        assert loss.isfinite().all() and ratios.grad is not None and ratios.grad.isfinite().all()
        equal = (ratios[:, 0] == ratios[:, 1]).nonzero().squeeze(1)
        assert loss[equal].eq(torch.tensor(2.0, dtype=dtype).log()).all()

    def test_above_the_cap_the_gradient_stays(self):
        ratio = torch.tensor([-200.0, -400.0], requires_grad=True)
        AlphaDivergence(1.0).difference(ratio, torch.zeros(2)).sum().backward()
        slope = math.exp(exponent_cap(torch.float32))
        assert ratio.grad is not None
        torch.testing.assert_close(ratio.grad, torch.full((2,), slope))

    def test_the_continuation_touches_the_exponential(self):
        cap = exponent_cap(torch.float64)
        link, zero = AlphaDivergence(1.0), number(0.0)
        below, above = (float(link.difference(number(-cap + step), zero)) for step in (1e-6, -1e-6))
        assert above / below == pytest.approx(1.0 + 2e-6, rel=1e-9)

    @pytest.mark.parametrize("alpha", [0.0, -0.5, 1.2])
    def test_alpha_out_of_range(self, alpha):
        with pytest.raises(UserError, match="0 < alpha <= 1"):
            AlphaDivergence(alpha)

    def test_listwise_takes_scores_relative_to_one_candidate(self):
        ratios = torch.tensor([[-500.0, -500.0, -499.0]], requires_grad=True)
        seats = {"policy": scores(ratios.unsqueeze(-1))}
        term = Term(Listwise(), link=AlphaDivergence(0.5))
        outcome = Objective("list", terms=(term,))(seats, pairs(1, 3), beta=1.0)
        outcome.loss.sum().backward()
        assert outcome.loss.isfinite().all() and ratios.grad is not None and ratios.grad.isfinite().all()


class TestOffsets:
    def test_constant_margin_is_demanded_of_the_preferred(self):
        values = torch.tensor([[[2.0], [1.0]], [[2.0], [1.0]]], dtype=torch.float64)
        target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        term = Term(offset=ConstantMargin(0.5), reference=None)
        outcome = Objective("simpo", terms=(term,))({"policy": scores(values)}, Batch(("a", "b"), target), beta=3.0)
        assert outcome.statistics["margin"].tolist() == [2.5, -3.5]
        torch.testing.assert_close(outcome.loss, torch.nn.functional.softplus(-outcome.statistics["margin"]))

    def test_an_offset_may_carry_gradient_as_in_tdpo2(self):
        @dataclass(frozen=True)
        class KLOfTheLoser:
            needs: frozenset[str] = frozenset({"dense_kl"})
            seats: tuple[str, ...] = ()
            group_separable: bool = True

            def __call__(self, view: View) -> Tensor:
                assert view.policy.dense is not None and view.policy.dense.kl is not None
                kl = view.policy.dense.kl.sum(-1)
                return view.beta * 0.5 * torch.where(view.is_chosen, kl.detach(), kl)

        kl = torch.tensor([[[0.2], [0.6]]], dtype=torch.float64, requires_grad=True)
        values = torch.zeros(1, 2, 1, dtype=torch.float64)
        objective = Objective("tdpo2", terms=(Term(offset=KLOfTheLoser()),))
        outcome = objective({"policy": scores(values, dense=DenseStatistics(kl=kl))}, pairs(), beta=0.1)
        outcome.loss.sum().backward()
        margin = 0.05 * (0.2 - 0.6)
        assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
        assert kl.grad is not None and kl.grad[0, 0].tolist() == [0.0] and float(kl.grad[0, 1]) > 0.0
        with pytest.raises(UserError, match="needs dense_kl .* policy seat"):
            objective({"policy": scores(values)}, pairs(), beta=0.1)

    def test_margins_are_subtracted(self):
        view = View(scores(torch.zeros(1, 2, 1)), None, pairs(margins=torch.tensor([[0.5, -1.0]])), {}, 1.0)
        assert RewardMargins()(view).tolist() == [[-0.5, 1.0]]


class TestTerms:
    VALUES = torch.tensor([[[-1.0], [-3.0]]], dtype=torch.float64)

    def test_a_term_names_its_seats_and_which_it_trains(self):
        fast, slow = self.VALUES.clone().requires_grad_(True), (0.5 * self.VALUES).requires_grad_(True)
        seats = {"fast": scores(fast), "slow": scores(slow)}
        chase = Term(policy="fast", reference="slow", trains="reference", coefficient=-0.1)
        objective = Objective("ofs, slow side", terms=(chase,), policy="slow")
        assert objective.seats == ("slow", "fast")
        outcome = objective(seats, pairs(), beta=1.0)
        outcome.loss.sum().backward()
        assert fast.grad is None and slow.grad is not None and slow.grad.abs().sum() > 0
        assert outcome.loss.item() == pytest.approx(-0.1 * math.log(1 + math.exp(-1.0)))

    def test_the_reference_has_no_gradient(self):
        policy, reference = self.VALUES.clone().requires_grad_(True), self.VALUES.clone().requires_grad_(True)
        seats = {"policy": scores(policy), "reference": scores(reference)}
        objective = Objective("dpo", terms=(Term(),), regularisers=(WinnerAnchor(0.1),))
        objective(seats, pairs(), beta=1.0).loss.sum().backward()
        assert reference.grad is None and policy.grad is not None

    def test_terms_and_coefficients_add_up(self):
        seats = {"policy": scores(self.VALUES)}
        mixed = Objective("mpo", terms=(Term(coefficient=0.8), Term(Hinge(), coefficient=0.2)))
        separate = [Objective("a", terms=(Term(),)), Objective("b", terms=(Term(Hinge()),))]
        one, two = (objective(seats, pairs(), beta=0.3).loss for objective in separate)
        torch.testing.assert_close(mixed(seats, pairs(), beta=0.3).loss, 0.8 * one + 0.2 * two)

    def test_a_pointwise_loss_sees_absolute_scores(self):
        @dataclass(frozen=True)
        class NCA(Flags):
            name: str = "nca"
            shift_invariant: bool = False

            def __call__(self, scored: Scored) -> Tensor:
                win, lose = scored.absolute.unbind(1)
                soft = torch.nn.functional.softplus
                return soft(-win) + 0.5 * soft(win) + 0.5 * soft(lose)

        outcome = Objective("nca", terms=(Term(NCA()),))({"policy": scores(self.VALUES)}, pairs(), beta=1.0)
        expected = math.log(1 + math.e) + 0.5 * math.log(1 + math.exp(-1)) + 0.5 * math.log(1 + math.exp(-3))
        assert outcome.loss.item() == pytest.approx(expected)
        with pytest.raises(UserError, match="forward_kl link .* unknown constant .* nca loss does not cancel"):
            Term(NCA(), link=AlphaDivergence(1.0))

    def test_a_batch_coupled_loss_is_marked_and_takes_no_sample_weight(self):
        @dataclass(frozen=True)
        class AOT(Flags):
            name: str = "aot"
            group_separable: bool = False

            def __call__(self, scored: Scored) -> Tensor:
                sides = [side[:, 0] - side[:, 1] for side in (scored.reduced.policy, scored.reduced.reference)]
                return torch.nn.functional.softplus(-scored.view.beta * (sides[0].sort().values - sides[1].sort().values))

        @dataclass(frozen=True)
        class Half:
            needs: frozenset[str] = NOTHING
            seats: tuple[str, ...] = ()

            def __call__(self, view: View) -> Tensor:
                return torch.full((len(view.target),), 0.5, dtype=view.dtype)

        assert not Objective("aot", terms=(Term(AOT()),)).group_separable
        with pytest.raises(UserError, match="couples the groups"):
            Term(AOT(), sample_weight=Half())
        seats = {"policy": scores(self.VALUES)}
        plain = Objective("dpo", terms=(Term(),))
        halved = Objective("dpo", terms=(Term(sample_weight=Half()),))
        assert plain.group_separable
        torch.testing.assert_close(halved(seats, pairs(), beta=1.0).loss, 0.5 * plain(seats, pairs(), beta=1.0).loss)

    def test_what_does_not_fit_is_refused_when_built(self):
        with pytest.raises(UserError, match="alpha.* link cannot follow a mean"):
            Term(weights=Mean(), link=AlphaDivergence(0.5))
        Term(weights=Mean(), link=JensenShannon())
        with pytest.raises(UserError, match="trains its reference"):
            Term(reference=None, trains="reference")
        with pytest.raises(UserError, match="nothing to train"):
            Objective("empty")
        for loss in (Logistic, Robust):
            with pytest.raises(UserError, match=r"less than 0\.5"):
                loss(label_smoothing=0.5)

    @pytest.mark.parametrize("loss", [Logistic(), Robust(0.1), Hinge(), Square(0.5)], ids=lambda loss: loss.name)
    def test_pair_losses_refuse_other_sizes(self, loss):
        seats = {"policy": scores(torch.zeros(1, 3, 1))}
        with pytest.raises(UserError, match="compares two candidates, but the groups of this batch have 3"):
            Objective("pair", terms=(Term(loss),))(seats, pairs(1, 3), beta=1.0)

    def test_wrong_shapes_and_seats_are_named(self):
        objective = Objective("dpo", terms=(Term(),))
        with pytest.raises(ValueError, match="seat 'policy'; given are \\['slow'\\]"):
            objective({"slow": scores(self.VALUES)}, pairs(), beta=1.0)
        with pytest.raises(ValueError, match="same units"):
            objective({"policy": scores(self.VALUES), "reference": scores(torch.zeros(1, 2, 4))}, pairs(), beta=1.0)
        with pytest.raises(ValueError, match="targets of shape"):
            objective({"policy": scores(self.VALUES)}, pairs(2), beta=1.0)

    def test_no_rewards_are_reported_from_a_surrogate(self):
        surrogate = replace(scores(self.VALUES, unit=Unit("surrogate")), value_meaningful=False)
        outcome = Objective("dpo", terms=(Term(),))({"policy": surrogate}, pairs(), beta=1.0)
        assert set(outcome.statistics) == {"policy_value", "reference_value"}

    def test_beta_may_differ_by_group(self):
        values = self.VALUES.repeat(2, 1, 1)
        objective = Objective("adpo", terms=(Term(Listwise()),), regularisers=(WinnerAnchor(0.5),))
        outcome = objective({"policy": scores(values)}, pairs(2), beta=torch.tensor([0.5, 2.0]))
        for index, beta in enumerate((0.5, 2.0)):
            alone = objective({"policy": scores(self.VALUES)}, pairs(), beta=beta)
            torch.testing.assert_close(outcome.loss[index], alone.loss[0])
