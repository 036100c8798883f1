"""Losses, links, offsets and regularisers of the table's further rows, by hand and by what has to hold of them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.objectives import Objective, Term, build
from polyalign.core.objectives.links import Clipped, ErrorOdds, LogOdds, PowerReward
from polyalign.core.objectives.losses import Contrast, Listwise, PlackettLuce, ReverseKL
from polyalign.core.objectives.losses_coupled import AOT
from polyalign.core.objectives.numerics import bounded_exp, exponent_cap, log1mexp
from polyalign.core.objectives.offsets import Baseline
from polyalign.core.objectives.regularisers import BatchTokenSFT, CentredRewards, KeepUp, ReferenceKL
from polyalign.core.objectives.view import View
from polyalign.core.objectives.weights_tokens import LengthDesensitised, TokenGuidance
from polyalign.core.scores import DenseStatistics, Scores

sys.path.insert(0, str(Path(__file__).resolve().parent))

from objective_cases import TOKENS, batch, losses, outcome_of, scores, spec  # noqa: E402  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)
DOUBLE = torch.float64
CERTAIN = [[1.0, 0.0]]


def view_of(policy, reference=None, target=None, mask=None, beta: float = 1.0, desirable=None, **further: Scores) -> View:
    policy = torch.as_tensor(policy, dtype=DOUBLE)
    groups, candidates = policy.shape[:2]
    target = [[1.0] + [0.0] * (candidates - 1)] * groups if target is None else target
    given = None if reference is None else scores(torch.as_tensor(reference, dtype=DOUBLE), mask=mask)
    return View(scores(policy, mask=mask), given, batch(target, desirable=desirable), further, beta)


class TestNumerics:
    @given(st.floats(-700, -1e-12))
    @settings(deadline=None)
    def test_log1mexp_keeps_its_digits(self, x):
        expected = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
        assert float(log1mexp(torch.tensor(x, dtype=DOUBLE))) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_a_bounded_exponential_is_one_up_to_its_cap_and_a_line_beyond(self, dtype):
        cap = exponent_cap(dtype)
        x = torch.tensor([0.5, cap, cap + 3.0, 1e4], dtype=dtype, requires_grad=True)
        y = bounded_exp(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        y = y.detach()
        assert float(y[0]) == pytest.approx(math.exp(0.5), rel=1e-6) and y.isfinite().all()
        assert float(y[2] / y[1]) == pytest.approx(4.0, rel=1e-5) and slope[2:].eq(slope[2]).all() and slope[2] > 0


class TestUnpaired:
    def group(self, name: str, desirable: bool) -> Group:
        return Group(name, (Candidate("prompt", "answer"),), target=(1.0,), desirable=(desirable,))

    def test_kto_on_single_candidates_with_labels(self):
        data = Batch.of_groups([self.group("a", True), self.group("b", False)], {})
        ratios = torch.tensor([[2.0], [1.0]], dtype=DOUBLE, requires_grad=True)
        seats = {"policy": scores(ratios), "reference": scores(torch.zeros(2, 1, dtype=DOUBLE))}
        objective = build(spec("kto", baseline="none", undesirable_weight=1.3))
        outcome = objective(seats, data, beta=0.5)
        sigmoid = [1 / (1 + math.exp(-0.5 * r)) for r in (2.0, 1.0)]
        assert outcome.loss.tolist() == [pytest.approx(1 - sigmoid[0]), pytest.approx(1.3 * sigmoid[1])]
        assert outcome.statistics["margin"].tolist() == [1.0, -0.5] and outcome.statistics["accuracy"].tolist() == [1.0, 0.0]
        outcome.loss.sum().backward()
        assert ratios.grad is not None and ratios.grad[0] < 0 < ratios.grad[1]

    def test_single_candidates_without_labels_are_refused(self):
        with pytest.raises(UserError, match="single candidates need a label each"):
            build(spec("kto"))({"policy": scores(torch.zeros(1, 1))}, batch([[1.0]]), beta=1.0)

    def test_a_pair_is_one_desirable_and_one_undesirable_candidate(self):
        for name in ("kto", "bco"):
            pair, gradient = outcome_of(name, [[0.4, -0.9]], baseline="none")
            labels = torch.tensor([[True], [False]])
            single, alone = losses(
                build(spec(name, baseline="none")), [[0.4], [-0.9]], beta=0.7, desirable=labels, target=[[1.0]] * 2
            )
            share = 0.5 if name == "kto" else 1.0  # a mean over the candidates of a group, or a sum
            assert pair.loss.item() == pytest.approx(share * single.loss.sum().item())
            torch.testing.assert_close(gradient.flatten(), share * alone.flatten())

    def test_baselines_by_hand(self):
        labels = torch.tensor([[True], [False], [False]])
        view = view_of([[3.0], [1.0], [-1.0]], target=[[1.0]] * 3, beta=2.0, desirable=labels)
        assert Baseline("batch")(view).flatten().tolist() == [-2.0] * 3
        assert Baseline("classes")(view)[0, 0].item() == pytest.approx(-2.0 * 1.5, rel=1e-6)
        low = view_of([[-3.0], [1.0]], target=[[1.0]] * 2, desirable=labels[:2])
        assert Baseline("batch")(low).eq(0.0).all(), "never below 0"
        others = {"mismatched": scores(torch.tensor([[2.0], [4.0]])), "mismatched_reference": scores(torch.zeros(2, 1))}
        assert Baseline("mismatched")(view_of([[0.0], [0.0]], target=[[1.0]] * 2, **others)).flatten().tolist() == [-3.0, -3.0]
        assert Baseline("mismatched").seats == ("mismatched", "mismatched_reference") and not Baseline("batch").group_separable

    def test_a_baseline_has_no_gradient(self):
        values = torch.tensor([[1.0, 0.5]], dtype=DOUBLE, requires_grad=True)
        assert not Baseline("batch")(View(scores(values), None, batch(CERTAIN), {}, 1.0)).requires_grad


class TestPointwise:
    def test_by_hand(self):
        u, v = 0.7 * 0.4, 0.7 * -0.9
        soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
        sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        expected = {
            "nca": soft(-u) + 0.5 * soft(u) + 0.5 * soft(v),
            "apo_zero": 1 - sigma(u) + sigma(v),
            "apo_down": sigma(u) + 1 - sigma(u - v),
            "bco": soft(-u) + soft(v),
            "sppo": (u - 5.0) ** 2 + (v + 5.0) ** 2,
        }
        for name, value in expected.items():
            assert outcome_of(name, [[0.4, -0.9]])[0].loss.item() == pytest.approx(value), name

    def test_nca_holds_its_winner_where_it_says(self):
        _, gradient = outcome_of("nca", [[math.log(2.0), 0.0]], beta=1.0)
        assert abs(float(gradient[0, 0])) < 1e-15

    def test_sppo_takes_win_rates_as_they_are(self):
        objective = build(spec("sppo", eta=4.0))
        best, gradient = losses(objective, [[1.0, -1.0]], target=[[0.75, 0.25]])
        assert best.loss.item() == 0.0 and gradient.eq(0.0).all()


class TestPairAndListLosses:
    @given(h=st.floats(-30, 30), e=st.floats(0.001, 0.49))
    @settings(deadline=None)
    def test_the_reverse_kl_is_one(self, h, e):
        outcome, gradient = losses(build(spec("exo", label_smoothing=e)), [[h, 0.0]])
        p = torch.tensor([h, -h], dtype=DOUBLE).sigmoid()
        q = torch.tensor([1 - e, e], dtype=DOUBLE)
        expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
        assert outcome.loss.item() == pytest.approx(float(expected), rel=1e-9, abs=1e-12) and outcome.loss.item() >= -1e-15
        best, flat = losses(build(spec("dmpo", alpha=e)), [[math.log((1 - e) / e), 0.0]])
        assert best.loss.item() == pytest.approx(0.0, abs=1e-12) and flat.abs().max() < 1e-12
        assert gradient.isfinite().all()

    def test_a_reverse_kl_from_certain_labels_is_refused(self):
        for e in (0.0, 0.5):
            with pytest.raises(UserError, match="greater than 0 and less than 0.5"):
                ReverseKL(e)

    def test_discopop_is_logistic_for_losers_and_exponential_for_winners(self):
        low, high = (outcome_of("discopop", [[h, 0.0]], beta=1.0)[0].loss.item() for h in (-3.0, 3.0))
        assert low == pytest.approx(math.log1p(math.exp(3.0))) and high == pytest.approx(math.exp(-3.0))

    def test_plackett_luce_is_the_probability_of_the_ranking(self):
        u = torch.tensor([[0.3, -1.0, 2.0]], dtype=DOUBLE)
        objective = Objective("pl", terms=(Term(PlackettLuce()),))
        outcome = objective({"policy": scores(u)}, batch([[0.5, 0.2, 0.3]]), beta=1.0)
        order = [0.3, 2.0, -1.0]
        first = math.exp(order[0]) / sum(map(math.exp, order))
        second = math.exp(order[1]) / sum(map(math.exp, order[1:]))
        assert outcome.loss.item() == pytest.approx(-math.log(first * second) / 2)

    def test_plackett_luce_of_a_pair_is_the_listwise_loss_and_dpo(self):
        ratios = [[0.3, -2.0], [-700.0, 700.0]]
        for loss in (PlackettLuce(), Listwise()):
            ours, gradient = losses(Objective("l", terms=(Term(loss),)), ratios, beta=0.3)
            theirs, expected = outcome_of("dpo", ratios, beta=0.3)
            torch.testing.assert_close(ours.loss, theirs.loss)
            torch.testing.assert_close(gradient, expected)

    def test_a_contrast_of_one_is_dpo_and_other_groups_are_refused(self):
        ratios = [[0.3, -2.0], [5.0, 1.0]]
        contrast, _ = losses(Objective("c", terms=(Term(Contrast((1.0,))),)), ratios, beta=0.3)
        torch.testing.assert_close(contrast.loss, outcome_of("dpo", ratios, beta=0.3)[0].loss)
        seats = {"policy": scores(torch.zeros(1, 3))}
        for loss, target in ((Contrast((1.0,)), [1.0, 0.0, 0.0]), (Contrast((1.0, 1.0)), [0.0, 1.0, 0.0])):
            with pytest.raises(UserError, match="contrast loss compares a preferred first candidate"):
                Objective("c", terms=(Term(loss),))(seats, batch([target]), beta=1.0)


class TestCoupled:
    def test_aot_of_one_pair_is_dpo(self):
        for name in ("aot", "aot_unpaired"):
            torch.testing.assert_close(outcome_of(name, [[0.3, -2.0]])[0].loss, outcome_of("dpo", [[0.3, -2.0]])[0].loss)

    def test_aot_compares_by_rank_and_gives_each_pair_the_loss_of_its_place(self):
        policy = torch.tensor([[1.0, 0.0], [4.0, 1.0]], dtype=DOUBLE)
        reference = torch.tensor([[2.0, 0.0], [0.5, 0.0]], dtype=DOUBLE)
        seats = {"policy": scores(policy), "reference": scores(reference)}
        outcome = Objective("aot", terms=(Term(AOT()),))(seats, batch(CERTAIN * 2), beta=1.0)
        gaps = [1.0 - 0.5, 3.0 - 2.0]
        assert outcome.loss.tolist() == [pytest.approx(math.log1p(math.exp(-gap))) for gap in gaps]

    def test_aot_looks_at_the_preferred_candidate_and_wants_one_beta(self):
        ratios = [[0.3, -2.0], [-1.0, 0.5]]
        swapped = [row[::-1] for row in ratios]
        plain = losses(build(spec("aot")), ratios)[0].loss
        torch.testing.assert_close(plain, losses(build(spec("aot")), swapped, target=[[0.0, 1.0]] * 2)[0].loss)
        with pytest.raises(UserError, match="beta has to be one number"):
            seats = {"policy": scores(torch.zeros(2, 2))}
            build(spec("aot"))(seats, batch(CERTAIN * 2), beta=torch.ones(2))

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dspo"])
    def test_a_loss_that_takes_a_winner_refuses_soft_preferences(self, name):
        for target in ([0.5, 0.5], [0.3, 0.7]):
            with pytest.raises(UserError, match="takes a winner out of each pair"):
                losses(build(spec(name)), [[-0.3, -2.0], [-1.0, -0.5]], target=[[1.0, 0.0], target])

    def test_dspo_pulls_towards_the_target_and_away_from_the_reference(self):
        own = torch.tensor([[[[0.5, -0.5]], [[0.1, 0.1]]]], dtype=DOUBLE)  # (1, 2, 1, 2)
        base = torch.tensor([[[[0.2, -0.1]], [[0.1, 0.1]]]], dtype=DOUBLE)
        unit = replace(TOKENS, kind="timestep", elements=2, steps=10)

        def of(residual):
            values = -residual.square().mean(-1)
            return Scores(values, torch.ones_like(values, dtype=torch.bool), unit, residual=residual)

        objective = build(spec("dspo", correction=0.4))
        outcome = objective({"policy": of(own), "reference": of(base)}, batch(CERTAIN), beta=0.0)
        expected = [(0.5 - 0.4 * 0.5 * 0.3) ** 2, (-0.5 - 0.4 * 0.5 * -0.4) ** 2]
        assert outcome.loss.item() == pytest.approx(sum(expected) / 2)
        assert objective.group_separable and not build(spec("dspo", form="sdxl_code")).group_separable

    @staticmethod
    def nft(own, base, desirable, clean=None, **options):
        unit = replace(TOKENS, kind="timestep", elements=2, steps=10)

        def of(residual):
            residual = torch.as_tensor(residual, dtype=DOUBLE)
            values = -residual.square().mean(-1)
            notes = {} if clean is None else {"clean_scale": torch.tensor([[clean]], dtype=DOUBLE)}
            return Scores(values, torch.ones_like(values, dtype=torch.bool), unit, residual=residual, notes=notes)

        groups = Batch(("a",), torch.tensor([desirable], dtype=DOUBLE))
        return build(spec("diffusion_nft", **options))({"policy": of(own), "reference": of(base)}, groups, beta=0.0).loss.item()

    def test_nft_regresses_on_what_is_desirable_and_away_from_what_is_not(self):
        """By hand: with mixing 1/2, o+ lies half way to the policy and o- as far on the other side."""
        own, base = [[[[0.5, -0.5]], [[0.1, 0.3]]]], [[[[0.1, -0.1]], [[0.1, 0.1]]]]
        up = (0.3**2) / 0.3  # residuals 0.3 and -0.3, mean square over mean absolute value
        down = (0.1**2 + 0.0**2) / 2 / 0.05  # 0.1 and 0.1 - 0.1
        assert self.nft(own, base, [1.0, 0.0], mixing=0.5, scale=2.0) == pytest.approx(2.0 / 0.5 * (up + down) / 2)
        moved = ((0.4**2 + 0.4**2) / 2 + (0.0 + 0.2**2) / 2) / 2
        near = self.nft(own, base, [1.0, 0.0], mixing=0.5, scale=2.0, proximity=3.0)
        assert near == pytest.approx(4.0 * (up + down) / 2 + 3.0 * moved)

    def test_nft_measures_errors_of_the_clean_sample(self):
        own, base = [[[[0.5, -0.5]], [[0.1, 0.3]]]], [[[[0.1, -0.1]], [[0.1, 0.1]]]]
        plain = self.nft(own, base, [0.7, 0.3])
        assert self.nft(own, base, [0.7, 0.3], clean=0.25) == pytest.approx(0.25 * plain)
        with pytest.raises(UserError, match="a noise level without signal"):
            self.nft(own, base, [1.0, 0.0], clean=math.inf)


class TestLinksOfLikelihoods:
    LINKS = (PowerReward(0.25), PowerReward(0.0), PowerReward(-0.5), LogOdds(), ErrorOdds(0.5), Clipped(-2.0, 1.0))

    @pytest.mark.parametrize("link", LINKS, ids=repr)
    def test_gradcheck_and_antisymmetry(self, link):
        a = torch.tensor([-0.4, -3.0, -0.9], dtype=DOUBLE, requires_grad=True)
        b = torch.tensor([-1.7, -0.2, -0.9], dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(link.difference, (a, b))
        assert torch.equal(link.difference(a, b), -link.difference(b, a))
        torch.testing.assert_close(link.score(a) - link.score(b), link.difference(a, b))

    @pytest.mark.parametrize("link", LINKS, ids=repr)
    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_extremes_and_zero_are_finite(self, link, dtype):
        values = torch.tensor([-1e5, -500.0, -1e-9, 0.0, 500.0], dtype=dtype, requires_grad=True)
        score = link.score(values)
        (gradient,) = torch.autograd.grad(score.sum(), values)
        assert score.isfinite().all() and gradient.isfinite().all()

    def test_log_odds_by_hand(self):
        log_probability = torch.tensor([math.log(0.25), math.log(0.9)], dtype=DOUBLE)
        odds = torch.tensor([math.log(1 / 3), math.log(9.0)], dtype=DOUBLE)
        torch.testing.assert_close(LogOdds().score(log_probability), odds)

    def test_the_series_of_the_error_odds_meets_the_formula(self):
        x = torch.tensor([1e-4 * (1 - 1e-9), 1e-4 * (1 + 1e-9)], dtype=DOUBLE)
        series, formula = ErrorOdds(1.0).score(-x)
        assert float(series) == pytest.approx(float(formula), rel=1e-12)
        assert ErrorOdds(0.5).score(torch.zeros(1)).item() == 1.0

    def test_alphapo_with_alpha_0_is_simpo(self):
        ratios = [[-0.5, -1.5], [2.0, 1.0]]
        simpo, gradient = outcome_of("simpo", ratios)
        alphapo, same = outcome_of("alphapo", ratios, alpha=0.0)
        assert torch.equal(simpo.loss, alphapo.loss) and torch.equal(gradient, same)

    def test_bounds_that_exclude_zero_are_refused(self):
        with pytest.raises(UserError, match="below 0 and one above it"):
            Clipped(0.5, 1.0)


class TestTokenWeights:
    MASK = torch.tensor([[[True, True, True], [True, False, False]]])

    def test_tokens_past_the_partner_count_less(self):
        view = view_of(torch.zeros(1, 2, 3), mask=self.MASK)
        assert LengthDesensitised(0.25)(view).tolist() == [[[1.0, 0.25, 0.25], [1.0, 0.0, 0.0]]]
        assert LengthDesensitised(0.0, averages=True)(view)[0, 0].tolist() == [pytest.approx(1 / 3), 0.0, 0.0]

    def test_interrupted_spans_are_counted_and_not_measured(self):
        mask = torch.tensor([[[True, False, True], [False, False, True]]])
        assert LengthDesensitised(0.5)(view_of(torch.zeros(1, 2, 3), mask=mask)).tolist() == [
            [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
        ]

    @pytest.mark.parametrize(("target", "sign"), [([1.0, 0.0], (1, -1)), ([0.0, 1.0], (-1, 1)), ([0.5, 0.5], (0, 0))])
    def test_guidance_has_the_sign_of_the_preference(self, target, sign):
        zero = torch.zeros(1, 2, 3, dtype=DOUBLE)
        guide = {"guide": scores(torch.full((1, 2, 3), 2.0, dtype=DOUBLE))}
        view = view_of(zero, zero, target=[target], mask=self.MASK, beta=0.1, **guide)
        weights = TokenGuidance(0.5)(view)
        assert weights[0, :, 0].tolist() == [pytest.approx(1 + s * 0.5 * 0.1 * 2.0) for s in sign]
        assert weights[0, 1, 1:].eq(0.0).all()

    def test_clamped_weights_do_not_turn_a_gradient_round(self):
        zero = torch.zeros(1, 2, 3, dtype=DOUBLE)
        view = view_of(zero, zero, beta=1.0, guide=scores(torch.full((1, 2, 3), -9.0, dtype=DOUBLE)))
        assert float(TokenGuidance(0.5)(view)[0, 0, 0]) == -3.5 and float(TokenGuidance(0.5, clamp=True)(view)[0, 0, 0]) == 0.0

    def test_wpo_weighs_pairs_by_the_policys_confidence(self):
        values = torch.tensor([[[-1.0, -2.0], [-3.0, -1.0]]], dtype=DOUBLE)
        confidence = torch.tensor([[[-0.2, -0.4], [-1.0, 5.0]]], dtype=DOUBLE)
        mask = torch.tensor([[[True, True], [True, False]]])
        policy = replace(scores(values, mask=mask), dense=DenseStatistics(confidence=confidence))
        weighted = build(spec("wpo"))({"policy": policy}, batch(CERTAIN), beta=0.5)
        plain = build(spec("dpo"))({"policy": policy}, batch(CERTAIN), beta=0.5)
        assert float(weighted.loss / plain.loss) == pytest.approx(math.exp(-0.3 - 1.0))


class TestRegularisers:
    def test_the_mean_over_all_tokens_of_a_batch(self):
        mask = torch.tensor([[[True, True, True]], [[True, False, False]]]).expand(2, 2, 3)
        view = view_of([[[-1.0, -2.0, -3.0]] * 2, [[-6.0, 0.0, 0.0]] * 2], mask=mask)
        assert BatchTokenSFT(2.0)(view).mean().item() == pytest.approx(2.0 * 12.0 / 4)
        assert not BatchTokenSFT(1.0).group_separable

    def test_keep_up_centring_and_kl_by_hand(self):
        view = view_of([[-1.0, -2.0]], [[-1.5, -1.0]])
        assert KeepUp(2.0)(view).item() == pytest.approx(2.0 * math.log1p(math.exp(0.5)))
        assert CentredRewards(0.01)(view).item() == pytest.approx(0.09)
        rho = (0.5, -1.0)
        assert ReferenceKL(0.3)(view).item() == pytest.approx(0.3 * sum(math.exp(-r) - 1 + r for r in rho) / 2)

    def test_mpo_is_its_three_parts(self):
        ratios = [[0.4, -0.9]]
        parts = [outcome_of(name, ratios, **{"baseline": "none"} if name == "bco" else {})[0].loss for name in ("dpo", "bco")]
        whole = outcome_of("mpo", ratios)[0].loss.item()
        assert whole == pytest.approx(0.8 * parts[0].item() + 0.2 * parts[1].item() + 6.6)
        assert build(spec("mpo")).group_separable and not build(spec("mpo", sft_over="batch")).group_separable
        assert outcome_of("mpo", ratios, sft_over="batch")[0].loss.item() == pytest.approx(whole)


class TestSeveralCandidates:
    def test_a_term_compares_some_of_a_group(self):
        values = torch.tensor([[-1.0, -2.0, -4.0]], dtype=DOUBLE, requires_grad=True)
        outcome = build(spec("rdpo", visual=0.5))({"policy": scores(values)}, batch([[1.0, 0.0, 0.0]]), beta=1.0)
        expected = math.log1p(math.exp(-1.0)) + 0.5 * math.log1p(math.exp(-3.0))
        assert outcome.loss.item() == pytest.approx(expected)
        outcome.loss.sum().backward()
        assert values.grad is not None and values.grad.ne(0.0).all()

    def test_a_part_of_a_batch_has_a_target_of_its_own(self):
        whole = batch([[0.2, 0.6, 0.2], [0.0, 1.0, 0.0]], margins=torch.tensor([[1.0, 2.0, 3.0]] * 2))
        part = whole.of_candidates((0, 2))
        assert part.target.tolist() == [[0.5, 0.5], [0.5, 0.5]] and part.margins is not None
        assert part.margins.tolist() == [[1.0, 3.0]] * 2 and part.group_ids == whole.group_ids
        torch.testing.assert_close(whole.of_candidates((1, 0)).target[0], torch.tensor([0.75, 0.25], dtype=DOUBLE))

    def test_a_part_of_scores_takes_all_of_a_candidate_along(self):
        values = torch.arange(12.0).reshape(2, 3, 2)
        dense = DenseStatistics(kl=values + 1.0)
        whole = replace(scores(values, mask=values > 1.0), dense=dense, residual=values.unsqueeze(-1))
        part = whole.of_candidates((2, 0))
        assert torch.equal(part.values, values[:, [2, 0]]) and torch.equal(part.mask, whole.mask[:, [2, 0]])
        assert part.dense is not None and part.dense.kl is not None and part.dense.confidence is None
        assert torch.equal(part.dense.kl, values[:, [2, 0]] + 1.0)
        assert part.residual is not None and torch.equal(part.residual[..., 0], part.values)

    def test_adpo_clips_and_takes_means_if_asked(self):
        ratios = [[9.0, 0.5, -9.0]]
        target = [[0.5, 0.3, 0.2]]
        clipped, gradient = losses(build(spec("adpo", clip=1.0)), ratios, target=target)
        bounded, _ = losses(build(spec("adpo")), [[1.0, 0.5, -1.0]], target=target)
        torch.testing.assert_close(clipped.loss, bounded.loss)
        assert gradient[0, 0] == gradient[0, 2] == 0.0 and gradient[0, 1] != 0.0
