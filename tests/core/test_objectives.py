"""Rows of the table: values, gradients and identities that hold for any preference data."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from polyalign.core.errors import UserError
from polyalign.core.objectives import TABLE, Objective, build
from polyalign.core.objectives.losses import Listwise
from polyalign.core.objectives.objective import Term
from polyalign.core.objectives.rows import AnchoredParameters
from polyalign.core.objectives.table import SPEC
from polyalign.core.scores import Unit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from objective_cases import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    COUPLED,
    OUTPUT_ROWS,
    PREFERENCE_ROWS,
    batch,
    losses,
    outcome_of,
    scores,
    spec,
)

torch.set_num_threads(1)
RATIOS = st.lists(st.tuples(*[st.floats(-30, 30)] * 2), min_size=1, max_size=4)
VISUAL = ("rdpo", "mdpo", "chip", "mcm_dpo", "branches")
TWO_CANDIDATES = [name for name in PREFERENCE_ROWS if name not in VISUAL]
STARTS_AT_LN_2 = ["dpo", "cdpo", "robust", "f_dpo", "sdpo", "sigmoid_norm", "tr_dpo", "online_dpo", "aot", "aot_unpaired"]
BY_VALUES = [name for name in PREFERENCE_ROWS if name not in OUTPUT_ROWS]
UNSWAPPABLE = ("modpo", "aot", "aot_unpaired", *VISUAL, *OUTPUT_ROWS)
"""Margins stay where they are; a sorted batch has no soft target; visual candidates have places."""


class TestEveryRow:
    @pytest.mark.parametrize("name", list(TABLE))
    def test_is_documented_and_builds_from_its_defaults(self, name):
        row = TABLE[name]
        assert row.name == name == build(spec(name)).name
        assert row.summary and row.formula and row.source and row.differences
        for key, field in row.parameters.model_fields.items():
            assert key == "name" or field.description, f"{name}.{key} has no docstring"
        assert row.needs <= build(spec(name)).needs

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", STARTS_AT_LN_2)
    def test_starts_at_exactly_ln_2(self, name, dtype):
        values = -torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        unit = Unit("timestep", elements=4, steps=10)
        seats = {"policy": scores(values, unit=unit), "reference": scores(values.clone(), unit=unit)}
        outcome = build(spec(name))(seats, batch([[1.0, 0.0]] * 5), beta=2500.0)
        assert outcome.loss.dtype == dtype
        assert outcome.loss.eq(torch.tensor(2.0, dtype=dtype).log()).all()
        assert outcome.statistics["margin"].eq(0.0).all() and outcome.statistics["accuracy"].eq(0.5).all()
        assert outcome.statistics["gradient_weight"].eq(0.5).all()

    @pytest.mark.parametrize("name", ["dpo", "f_dpo"])
    def test_half_precision_is_reduced_in_float32(self, name):
        values = torch.randn(3, 2, 5).bfloat16()
        outcome = build(spec(name))({"policy": scores(values), "reference": scores(values)}, batch([[1.0, 0.0]] * 3), beta=0.1)
        assert outcome.loss.dtype == torch.float32

    @pytest.mark.parametrize("name", [name for name in PREFERENCE_ROWS if name not in UNSWAPPABLE])
    @settings(max_examples=25, deadline=None)
    @given(ratios=RATIOS, p=st.floats(0, 1).filter(lambda p: p != 0.5))
    def test_swapping_the_candidates_with_the_target_changes_nothing(self, name, ratios, p):
        objective = build(spec(name))
        plain, gradient = losses(objective, ratios, target=[[p, 1 - p]] * len(ratios))
        swapped, mirrored = losses(objective, [row[::-1] for row in ratios], target=[[1 - p, p]] * len(ratios))
        torch.testing.assert_close(plain.loss, swapped.loss)
        torch.testing.assert_close(gradient, mirrored.flip(1))

    @pytest.mark.parametrize("name", [name for name in PREFERENCE_ROWS if name not in ("dspo", "diffusion_nft")])
    def test_gradient_is_that_of_finite_differences(self, name):
        ratios = [[0.4, -0.8], [-1.3, 0.2], [0.05, 0.0]]
        options = {"sft": 0.3, "anchor": 0.2} if issubclass(TABLE[name].parameters, AnchoredParameters) else {}
        options |= {"baseline": "none"} if name in ("kto", "diffusion_kto") else {}  # a baseline has no gradient
        outcome, gradient = outcome_of(name, ratios, **options)
        step = 1e-6
        for place in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
            ends = []
            for sign in (1.0, -1.0):
                moved = torch.tensor(ratios, dtype=torch.float64)
                moved[tuple(place)] += sign * step
                ends.append(float(outcome_of(name, moved, **options)[0].loss.sum().detach()))
            expected = (ends[0] - ends[1]) / (2 * step)
            if name == "sdpo" and place[1] == 1:  # the rejected candidate's gradient is scaled, which no value shows
                expected *= float(outcome.statistics["rejected_scale"][place[0]])
            assert math.isclose(float(gradient[tuple(place)]), expected, rel_tol=1e-5, abs_tol=1e-8)

    @pytest.mark.parametrize("name", BY_VALUES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_finite_at_extreme_ratios(self, name, dtype):
        ratios = [[-500, 500], [500, -500], [-500, -500], [500, 500]]
        outcome, gradient = losses(build(spec(name)), ratios, dtype=dtype, beta=0.5)
        assert outcome.loss.isfinite().all() and gradient.isfinite().all()
        assert all(value.isfinite().all() for value in outcome.statistics.values())

    @pytest.mark.parametrize("name", TWO_CANDIDATES)
    def test_policy_equal_to_reference_has_a_margin_of_exactly_zero(self, name):
        objective = build(spec(name))
        margin = losses(objective, [[0.0, 0.0]] * 3)[0].statistics["margin"]
        if name in ("modpo", "simpo", "alphapo"):  # a margin is asked for on top
            assert margin.ne(0.0).all()
        else:
            assert margin.eq(0.0).all()

    @pytest.mark.parametrize("name", [name for name in PREFERENCE_ROWS if name not in COUPLED])
    def test_groups_do_not_depend_on_each_other_unless_the_objective_says_so(self, name):
        objective = build(spec(name))
        assert objective.group_separable
        ratios = [[0.4, -0.8], [-1.3, 0.2], [0.05, 0.0]]
        together = losses(objective, ratios)[0].loss
        alone = [losses(objective, [ratio])[0].loss for ratio in ratios]
        torch.testing.assert_close(together, torch.cat(alone))

    @pytest.mark.parametrize("name", COUPLED)
    def test_coupled_rows_say_so(self, name):
        assert not build(spec(name)).group_separable

    def test_group_weight_multiplies_loss_and_gradient_but_no_statistic(self):
        objective = build(spec("dpo", anchor=0.5))
        values = torch.randn(2, 2, 1, dtype=torch.float64)
        seats = {"policy": scores(values)}
        plain = objective(seats, batch([[1.0, 0.0]] * 2), beta=0.3)
        weighted = objective(seats, batch([[1.0, 0.0]] * 2, weight=torch.tensor([0.0, 3.0])), beta=0.3)
        torch.testing.assert_close(weighted.loss, plain.loss * torch.tensor([0.0, 3.0]))
        assert torch.equal(weighted.statistics["reward"], plain.statistics["reward"])


class TestValues:
    def test_dpo_by_hand(self):
        outcome, gradient = losses(build(spec("dpo")), [[0.5, -1.0]], beta=0.1)
        assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-0.15)), rel=1e-12)
        weight = 1 / (1 + math.exp(0.15))
        assert gradient.tolist() == [[pytest.approx(-0.1 * weight), pytest.approx(0.1 * weight)]]
        statistics = outcome.statistics
        assert statistics["logratio"].tolist() == [[pytest.approx(0.5), pytest.approx(-1.0)]]
        assert statistics["reward"].tolist() == [[pytest.approx(0.05), pytest.approx(-0.1)]]
        assert statistics["policy_value"].tolist() == [[-6.5, -8.0]] and statistics["reference_value"].tolist() == [
            [-7.0, -7.0]
        ]
        assert float(statistics["gradient_weight"]) == pytest.approx(weight)
        assert not any(value.requires_grad for value in statistics.values())

    def test_statistics_follow_the_target(self):
        outcome, _ = losses(build(spec("dpo")), [[2.0, -1.0], [2.0, -1.0]], target=[[0.0, 1.0], [0.5, 0.5]])
        assert outcome.statistics["margin"].tolist() == [-3.0, 3.0] and outcome.statistics["accuracy"].tolist() == [0.0, 1.0]

    @given(h=st.floats(-40, 40), smoothing=st.floats(0, 0.49))
    @settings(deadline=None)
    def test_cdpo_and_robust_are_their_formulas(self, h, smoothing):
        win, lose = -torch.nn.functional.logsigmoid(torch.tensor([h, -h], dtype=torch.float64))
        cdpo, _ = losses(build(spec("cdpo", label_smoothing=smoothing)), [[h, 0.0]])
        torch.testing.assert_close(cdpo.loss[0], (1 - smoothing) * win + smoothing * lose)
        robust, _ = losses(build(spec("robust", label_smoothing=smoothing)), [[h, 0.0]])
        torch.testing.assert_close(robust.loss[0], ((1 - smoothing) * win - smoothing * lose) / (1 - 2 * smoothing))

    @given(h=st.floats(-5, 5), e=st.floats(0.01, 0.4))
    @settings(deadline=None)
    def test_robust_is_unbiased_under_flips(self, h, e):
        objective = build(spec("robust", label_smoothing=e))
        right, wrong = losses(objective, [[h, 0.0]])[0].loss, losses(objective, [[0.0, h]])[0].loss
        clean = losses(build(spec("dpo")), [[h, 0.0]])[0].loss
        torch.testing.assert_close((1 - e) * right + e * wrong, clean)

    def test_cdpo_has_its_minimum_where_the_label_is_believed(self):
        _, gradient = losses(build(spec("cdpo", label_smoothing=0.2)), [[math.log(4.0), 0.0]])
        assert gradient.abs().max() < 1e-15

    @pytest.mark.parametrize("tau", [0.1, 1.0])
    def test_ipo_has_its_minimum_at_one_over_two_tau(self, tau):
        objective = build(spec("ipo", tau=tau))
        best, gradient = losses(objective, [[1 / (2 * tau), 0.0]])
        assert best.loss.item() == 0.0 and gradient.eq(0.0).all()
        off, gradient = losses(objective, [[1 / (2 * tau) + 0.5, 0.0]])
        assert off.loss.item() == pytest.approx(0.25) and gradient.tolist() == [[pytest.approx(1.0), pytest.approx(-1.0)]]

    def test_ipo_with_a_soft_target_is_online_ipo_up_to_a_constant(self):
        tau, p = 0.5, 0.8
        objective = build(spec("ipo", tau=tau))
        for h in (-1.0, 0.0, 2.0):
            soft = losses(objective, [[h, 0.0]], target=[[p, 1 - p]])[0].loss.item()
            win, lose = (losses(objective, [[sign * h, 0.0]])[0].loss.item() for sign in (1, -1))
            assert p * win + (1 - p) * lose == pytest.approx(soft + p * (1 - p) / tau**2)

    def test_ipo_reductions(self):
        policy = torch.tensor([[[0.4, 0.2, 9.0], [0.1, 0.3, 0.2]]], dtype=torch.float64)
        mask = torch.tensor([[[True, True, False], [True, True, True]]])
        for reduction, h in (("sum", 0.6 - 0.6), ("mean", 0.3 - 0.2)):
            objective = build(spec("ipo", reduction=reduction, tau=1.0))
            outcome = objective({"policy": scores(policy, mask=mask)}, batch([[1.0, 0.0]]), beta=1.0)
            assert outcome.loss.item() == pytest.approx((h - 0.5) ** 2)

    def test_hinge_and_its_kink(self):
        objective = build(spec("hinge"))
        outcome, gradient = losses(objective, [[0.5, 0.0], [1.0, 0.0], [1.5, 0.0]])
        assert outcome.loss.tolist() == [0.5, 0.0, 0.0]
        assert gradient[:, 0].tolist() == [-1.0, 0.0, 0.0]

    @pytest.mark.parametrize("weight", [0.25, 1.0])
    def test_modpo_divides_by_its_weight_and_subtracts_the_margins(self, weight):
        outcome, gradient = losses(build(spec("modpo", weight=weight)), [[1.0, -2.0]], beta=0.1)  # margins 0.3 and -0.4
        u = [(0.1 - 0.3) / weight, (-0.2 + 0.4) / weight]
        assert outcome.statistics["reward"].tolist() == [[pytest.approx(u[0]), pytest.approx(u[1])]]
        assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(u[1] - u[0])))
        assert float(gradient[0, 0]) == pytest.approx(-0.1 / weight / (1 + math.exp(u[0] - u[1])))
        hinge, _ = losses(build(spec("modpo", weight=weight, loss="hinge")), [[1.0, -2.0]], beta=0.1)
        assert hinge.loss.item() == pytest.approx(1 - (u[0] - u[1]))

    def test_modpo_with_no_margins_is_dpo_with_beta_over_w_and_missing_ones_are_named(self):
        seats = {"policy": scores(torch.tensor([[1.0, -2.0]], dtype=torch.float64))}
        zero = torch.zeros(1, 2, dtype=torch.float64)
        modpo = build(spec("modpo", weight=0.5))(seats, batch([[1.0, 0.0]], zero), beta=0.1)
        dpo = build(spec("dpo"))(seats, batch([[1.0, 0.0]]), beta=0.2)
        torch.testing.assert_close(modpo.loss, dpo.loss)
        with pytest.raises(UserError, match="no margins"):
            build(spec("modpo"))(seats, batch([[1.0, 0.0]]), beta=0.1)

    def test_listwise_over_a_pair_is_cdpo(self):
        listwise = Objective("listwise", terms=(Term(Listwise()),))
        ratios = [[0.3, -2.0], [-700.0, 700.0], [0.0, 0.0]]
        for e in (0.0, 0.1, 0.4):
            ours, gradient = losses(listwise, ratios, beta=0.3, target=[[1 - e, e]] * 3)
            theirs, expected = losses(build(spec("cdpo", label_smoothing=e)), ratios, beta=0.3)
            torch.testing.assert_close(ours.loss, theirs.loss)
            torch.testing.assert_close(gradient, expected)

    def test_listwise_gradient_is_softmax_minus_target(self):
        target = [[0.5, 0.3, 0.2, 0.0]]
        outcome, gradient = losses(Objective("l", terms=(Term(Listwise()),)), [[1.0, 0.2, -3.0, 4.0]], beta=0.5, target=target)
        softmax = torch.softmax(torch.tensor([[0.5, 0.1, -1.5, 2.0]], dtype=torch.float64), 1)
        torch.testing.assert_close(gradient, 0.5 * (softmax - torch.tensor(target, dtype=torch.float64)))
        assert float(outcome.statistics["margin"]) == pytest.approx(0.5 - (0.1 - 1.5 + 2.0) / 3)

    def test_anchor_and_sft_are_the_winners_error(self):
        unit = Unit("timestep", elements=16, steps=1000)
        values = torch.tensor([[-0.08, -0.11]], dtype=torch.float64)
        seats = {"policy": scores(values, unit=unit), "reference": scores(values, unit=unit)}
        half_beta = 0.5 * 2000

        def extra(**options) -> float:
            outcome = build(spec("dpo", **options))(seats, batch([[1.0, 0.0]]), beta=half_beta)
            return outcome.loss.item() - math.log(2.0)

        assert extra(anchor=0.3) == pytest.approx(0.3 * half_beta * 0.08)
        assert extra(sft=0.7) == pytest.approx(0.7 * 0.08)
        assert extra(anchor=0.3, sft=0.7) == pytest.approx(0.3 * half_beta * 0.08 + 0.7 * 0.08)

    def test_sft_trains_the_winner_alone_and_reports_the_implicit_reward(self):
        outcome, gradient = losses(build(spec("sft")), [[0.5, -1.0]], beta=2.0)
        assert outcome.loss.item() == 6.5 and gradient.tolist() == [[-1.0, 0.0]]
        assert outcome.statistics["margin"].tolist() == [3.0]
        assert build(spec("sft")).seats == ("policy",) and build(spec("dpo")).seats == ("policy", "reference")


class TestRecipe:
    def test_misspelt_and_missing_keys_are_refused(self):
        for wrong in ({"name": "dop"}, {"name": "dpo", "bta": 1}, {"name": "ipo"}, {"name": "f_dpo", "alpha": 1.5}):
            with pytest.raises(ValidationError):
                SPEC.validate_python(wrong)
        for smoothing in (-0.1, 0.5):
            with pytest.raises(ValidationError):
                SPEC.validate_python({"name": "robust", "label_smoothing": smoothing})

    def test_a_name_of_no_row_is_refused_in_words(self):
        with pytest.raises(UserError, match="not in the table; allowed: cdpo, dpo"):
            build(spec("f_dpo"), {name: TABLE[name] for name in ("cdpo", "dpo")})
