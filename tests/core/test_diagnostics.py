"""CHES, top-k indicators, the mixture of two models and combinations of adapters: what has to hold of them."""

from __future__ import annotations

import math

import pytest
import torch

from polyalign.core.diagnostics import ches, top_k
from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.core.low_rank import combine_low_rank

torch.set_num_threads(1)


def states(*rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_ches_by_hand() -> None:
    chosen, rejected = states([[1.0, 0.0], [1.0, 2.0]]), states([[3.0, 1.0], [9.0, 9.0]])
    mask, short = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert ches(chosen, rejected, mask, short, normalised=False).tolist() == [8.0 - 8.0]
    assert ches(chosen, rejected, mask, short).tolist() == [pytest.approx(4.0 - 2.0)]


def test_ches_of_the_same_answer_is_zero_and_it_is_not_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert ches(one, one, mask, mask).abs().max() < 1e-12
    assert not torch.allclose(ches(one, other, mask, mask), ches(other, one, mask, mask))


def test_ches_does_not_look_under_the_mask_and_adds_up_in_float32() -> None:
    chosen = torch.ones(1, 3000, 2, dtype=torch.bfloat16)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert ches(chosen, 2 * chosen, mask, mask, normalised=False).item() == 2 * 3000.0**2 * 2 - 2 * 3000.0**2
    spoilt = chosen.clone()
    spoilt[:, -1] = math.nan
    mask[:, -1] = False
    assert ches(spoilt, chosen, mask, mask).isfinite().all()


def test_top_k_of_a_uniform_distribution() -> None:
    found = top_k(torch.zeros(1, 2, 8), torch.tensor([[True, False]]), k=4)
    assert found.mass.tolist() == [[0.5, 0.5]]
    assert found.mean_bits(found.entropy).item() == pytest.approx(0.5 * 3)
    assert found.mean_bits(found.renormalised).item() == pytest.approx(2.0)


def test_top_k_of_certainty_and_of_a_small_vocabulary() -> None:
    logits = torch.tensor([[[0.0, -math.inf, -math.inf]]])
    found = top_k(logits, torch.tensor([[True]]), k=10)
    assert found.mass.item() == 1.0 and found.entropy.item() == 0.0 and found.renormalised.item() == 0.0
    assert top_k(logits, torch.tensor([[False]])).mean(found.mass).item() == 0.0


@pytest.mark.parametrize("share", [0.0, 0.125, 1.0])
def test_the_mixture_is_a_distribution_between_its_parts(share: float) -> None:
    policy, reference = torch.tensor([[2.0, 0.0, -math.inf]]), torch.tensor([[0.0, 1.0, -math.inf]])
    mixture = geometric_mixture(policy, reference, reference_share=share)
    assert mixture.exp().sum().item() == pytest.approx(1.0) and not mixture.isnan().any()
    odds = float(mixture[0, 0] - mixture[0, 1])
    assert odds == pytest.approx((1 - share) * 2.0 - share)


def test_the_ends_of_the_mixture_do_not_look_at_the_other_model() -> None:
    policy, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    assert geometric_mixture(policy, reference, reference_share=0.0).exp().tolist() == [[0.5, 0.5]]
    assert geometric_mixture(reference, policy, reference_share=1.0).exp().tolist() == [[0.5, 0.5]]
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            geometric_mixture(policy, reference, reference_share=share)


def test_combined_updates_of_different_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    down = [torch.randn(rank, 4, generator=generator, dtype=torch.float64) for rank in (1, 3)]
    up = [torch.randn(5, rank, generator=generator, dtype=torch.float64) for rank in (1, 3)]
    a, b = combine_low_rank(down, up, (0.7, -0.2))
    assert a.shape == (4, 4) and b.shape == (5, 4)
    torch.testing.assert_close(b @ a, 0.7 * up[0] @ down[0] - 0.2 * up[1] @ down[1])
    with pytest.raises(ValueError, match="2 A, 2 B and 1 coefficients"):
        combine_low_rank(down, up, (1.0,))
