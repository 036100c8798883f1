"""beta's conventions and the automatic beta."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyalign.core.errors import UserError
from polyalign.core.objectives import AutoBeta, Beta
from polyalign.core.objectives.beta import CONVENTIONS
from polyalign.core.recipe import AutoBetaConfig, BetaConfig
from polyalign.core.scores import Unit

torch.set_num_threads(1)
SD15 = Unit("timestep", elements=4 * 64 * 64, steps=1000)
SDXL = Unit("timestep", elements=4 * 128 * 128, steps=1000)
TOKENS = Unit("token")


def test_published_values_in_other_conventions():
    """Diffusion-DPO's 5000 is 0.1526 for each summed squared error at 512 pixels and 0.0381 at 1024; per nat four times
    weaker."""
    published = Beta(5000.0, "mean_half")
    assert published.effective(SD15) == 2500.0
    assert published.equivalents(SD15)["sum"] == pytest.approx(0.1526, abs=5e-5)
    assert published.equivalents(SDXL)["sum"] == pytest.approx(0.0381, abs=5e-5)
    assert published.equivalents(SD15)["nats"] == pytest.approx(3.05e-4, rel=1e-3)
    assert published.equivalents(SDXL)["nats"] == pytest.approx(7.6e-5, rel=5e-3)
    assert set(published.equivalents(SD15)) == set(CONVENTIONS)


def test_factors():
    unit = Unit("timestep", elements=8, steps=10)
    effective = {convention: Beta(3.0, convention).effective(unit) for convention in CONVENTIONS}
    assert effective == {"mean_half": 1.5, "mean": 3.0, "sum_half": 12.0, "sum": 24.0, "nats": 120.0}


@given(value=st.floats(1e-6, 1e6), source=st.sampled_from(CONVENTIONS), to=st.sampled_from(CONVENTIONS))
def test_every_equivalent_is_the_same_strength(value, source, to):
    beta = Beta(value, source)
    assert math.isclose(beta.to(to, SDXL).effective(SDXL), beta.effective(SDXL), rel_tol=1e-12)
    assert math.isclose(Beta(beta.equivalents(SDXL)[to], to).effective(SDXL), beta.effective(SDXL), rel_tol=1e-12)


def test_tokens_are_in_nats():
    assert Beta(0.1, "nats").effective(TOKENS) == Beta(0.1, "sum").effective(TOKENS) == 0.1
    assert Beta(0.1, "nats").equivalents(TOKENS) == {"sum": 0.1, "nats": 0.1}
    for convention in ("mean_half", "mean", "sum_half"):
        with pytest.raises(UserError, match=f"'{convention}' is for squared errors.*Use nats"):
            Beta(0.1, convention).effective(TOKENS)


def test_missing_sizes_and_unknown_conventions_are_named():
    unit = Unit("surrogate")
    assert Beta(2.0, "mean").effective(unit) == 2.0 and set(Beta(2.0, "mean").equivalents(unit)) == {"mean_half", "mean"}
    with pytest.raises(UserError, match="needs the number of elements"):
        Beta(2.0, "sum").effective(unit)
    with pytest.raises(UserError, match="'half' is not known; allowed: mean_half"):
        Beta(2.0, "half").effective(unit)  # pyright: ignore[reportArgumentType]


def automatic(**options) -> AutoBeta:
    settings = {"target_gradient_factor": 0.25, "decay": 0.9, "warmup_steps": 0, "minimum": 1e-6, "maximum": 1e9, **options}
    return AutoBeta(BetaConfig(value=500.0, convention="mean_half", auto=AutoBetaConfig(**settings)))


@pytest.mark.parametrize("unit", [SD15, SDXL])
def test_it_aims_at_the_gradient_factor(unit):
    auto = automatic()
    beta = auto.update(torch.tensor([0.002, -0.004, 0.006]), unit)
    gradient_factor = 1 / (1 + math.exp(beta.effective(unit) * 0.004))
    assert gradient_factor == pytest.approx(0.25) and beta.convention == "mean_half"


def test_without_warm_up_it_starts_at_the_first_margin_as_the_official_code_does():
    auto = automatic()
    auto.update(torch.tensor([1.0]), SD15)
    auto.update(torch.tensor([-2.0]), SD15)
    assert auto.mean_margin == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert auto.beta.value == pytest.approx(2 * math.log(3.0) / 1.1)


def test_with_warm_up_the_first_margin_counts_as_much_as_another():
    auto = automatic(warmup_steps=1)
    auto.update(torch.tensor([1.0]), SD15)
    auto.update(torch.tensor([-2.0]), SD15)
    assert auto.mean_margin == pytest.approx((0.09 * 1.0 + 0.1 * 2.0) / (1 - 0.9**2))


def test_it_is_clamped_and_keeps_the_given_value_while_warming_up():
    auto = automatic(warmup_steps=2, minimum=10.0, maximum=1000.0)
    margins = torch.tensor([1e-9])
    values = [auto.update(margins, SD15).value for _ in range(3)]
    assert values == [500.0, 500.0, 1000.0]
    assert automatic(minimum=10.0).update(torch.tensor([1e9]), SD15).value == 10.0


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_a_fresh_policy_whose_first_margins_are_zero_does_not_overshoot(decay):
    auto = automatic(warmup_steps=5, decay=decay, maximum=20000.0)
    right = 2 * math.log(3.0) / 1e-3
    assert [auto.update(torch.full((4,), h), SD15).value for h in (0.0, 0.0)] == [500.0, 500.0]
    values = [auto.update(torch.tensor([1e-3, -1e-3]), SD15).value for _ in range(8)]
    assert values[:5] == [500.0] * 5 and values[5:] == [pytest.approx(right)] * 3


def test_early_small_margins_are_not_held_on_to():
    """Margins that grow from 0 and then stay: within a fifth of the right beta as soon as the old ones are few."""
    auto = automatic(warmup_steps=10, decay=0.99)
    for step in range(41):
        beta = auto.update(torch.tensor([1e-3 * min(step, 5) / 5]), SD15)
    assert beta.value == pytest.approx(2 * math.log(3.0) / 1e-3, rel=0.2)


def test_beta_is_never_aimed_from_a_mean_of_zero():
    auto = automatic(warmup_steps=0, decay=0.0, maximum=77.0)
    assert auto.update(torch.zeros(3), SD15).value == 500.0
    aimed = auto.update(torch.tensor([1.0]), SD15).value
    assert auto.update(torch.zeros(3), SD15).value == aimed == pytest.approx(2 * math.log(3.0))


def test_a_step_that_is_not_finite_changes_nothing():
    auto = automatic()
    auto.update(torch.tensor([0.5]), SD15)
    before = auto.state_dict()
    auto.update(torch.tensor([math.nan, 1.0]), SD15)
    assert auto.state_dict() == before


def test_a_resumed_one_goes_on_as_the_first():
    margins = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    through, first, second = automatic(warmup_steps=3), automatic(warmup_steps=3), automatic(warmup_steps=3)
    expected = [through.update(row, SD15) for row in margins]
    for row in margins[:5]:
        first.update(row, SD15)
    second.load_state_dict(first.state_dict())
    assert [second.update(row, SD15) for row in margins[5:]] == expected[5:]
    assert second.state_dict() == through.state_dict()


def test_it_needs_a_configuration():
    with pytest.raises(ValueError, match="beta.auto"):
        AutoBeta(BetaConfig())
