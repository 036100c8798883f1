"""The seats, on a real LoRA put on in both of peft's ways."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

from polyalign.core.errors import UserError
from polyalign.core.recipe import ReferenceConfig
from polyalign.core.reference_cache import ScoreCache
from polyalign.core.references import (
    EMA,
    AdapterOff,
    Cached,
    FrozenCopy,
    NamedAdapter,
    NoReference,
    Seat,
    StartingWeights,
    adapters_off,
    build_seat,
)
from polyalign.core.scores import DenseStatistics, Scores, Unit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import Denoiser, TinyAdapter, TinyPairs  # noqa: E402  # pyright: ignore[reportMissingImports]


def scores_of(seat: Seat, adapter: TinyAdapter, model: Any, batch: Any, draws: Any, index: int) -> Scores:
    found = seat.scores(adapter, model, batch, draws, index=index)
    assert found is not None
    return found


def setting(**options: Any) -> tuple[TinyAdapter, Any, Any, Any]:
    """Adapter, model, a batch of four pairs and draws."""
    adapter = TinyAdapter(**options)
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, TinyPairs().rows([0, 1, 2, 3]), step=1)
    return adapter, model, batch, adapter.draws(model, batch, step=1)


def perturb(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def test_no_reference() -> None:
    assert NoReference().scores(*setting(), index=1) is None


def test_adapter_off_is_the_base_and_leaves_everything_as_it_was() -> None:
    adapter, model, batch, draws = setting()
    base = adapter.score(adapter.load(), batch, draws).values.detach()
    perturb(model.network)
    trained = {name: value.requires_grad for name, value in model.network.named_parameters()}
    policy = adapter.score(model, batch, draws)
    reference = scores_of(AdapterOff(model.network), adapter, model, batch, draws, 1)
    assert torch.equal(reference.values, base) and not reference.values.requires_grad
    assert not torch.equal(policy.values, base)
    assert trained == {name: value.requires_grad for name, value in model.network.named_parameters()}
    policy.values.sum().backward()  # the graph built before is still good
    assert all((value.grad is not None) == trained[name] for name, value in model.network.named_parameters())
    assert torch.equal(adapter.score(model, batch, draws).values, policy.values)


def test_adapter_off_is_undone_after_an_error() -> None:
    _, model, _, _ = setting()
    with pytest.raises(KeyboardInterrupt), adapters_off(model.network):
        raise KeyboardInterrupt
    assert not model.network.base_model.model.inwards.disable_adapters


def test_adapter_off_works_on_what_diffusers_puts_on() -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=4,
    ).eval()
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 4))
    base = network(*inputs).sample.detach()
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(network(*inputs).sample, base)
    AdapterOff(network)
    with adapters_off(network):
        assert torch.equal(network(*inputs).sample, base)
    assert not torch.equal(network(*inputs).sample, base)


def test_adapter_off_needs_an_adapter_and_a_frozen_base() -> None:
    with pytest.raises(UserError, match="there is none.*seat: frozen"):
        AdapterOff(Denoiser())
    _, model, _, _ = setting()
    model.network.base_model.model.time.weight.requires_grad_(True)
    with pytest.raises(UserError, match="1 trained parameters lie outside the adapter .*time.weight"):
        AdapterOff(model.network)


def test_modules_to_save_are_switched_off_too() -> None:
    network = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=["middle"], modules_to_save=["condition"]))
    AdapterOff(network)
    x = (torch.ones(1, 3, 6, 6), torch.tensor([3]), torch.ones(1, 4))
    before = network(*x).detach()
    perturb(network)
    assert not torch.equal(network(*x), before)
    with adapters_off(network):
        assert torch.equal(network(*x), before)


def test_a_named_adapter_stands_still_while_another_is_trained() -> None:
    adapter, model, batch, draws = setting()
    model.network.add_adapter("slow", LoraConfig(r=2, target_modules=["inwards"], init_lora_weights=False))
    model.network.set_adapter("slow")
    slow = adapter.score(model, batch, draws).values.detach()
    with pytest.raises(UserError, match="'slow' is the reference and is also being trained"):
        NamedAdapter(model.network, "slow")
    model.network.set_adapter("default")
    seat = build_seat(ReferenceConfig(seat="adapter", adapter_name="slow"), model.network)
    perturb(model.network)
    assert torch.equal(scores_of(seat, adapter, model, batch, draws, 1).values, slow)
    assert model.network.active_adapters == ["default"]
    with pytest.raises(UserError, match=r"the network has only \['default', 'slow'\]"):
        NamedAdapter(model.network, "fast")
    with pytest.raises(UserError, match="no adapter at all"):
        NamedAdapter(Denoiser(), "slow")


@pytest.mark.parametrize("lora", [True, False])
def test_a_frozen_copy_stays_and_shares_what_is_not_trained(lora: bool) -> None:
    adapter, model, batch, draws = setting(lora=lora)
    start = adapter.score(model, batch, draws).values.detach()
    seat = FrozenCopy(model.network)
    perturb(model.network)
    assert torch.equal(scores_of(seat, adapter, model, batch, draws, 1).values, start)
    shared = [
        parameter is copied for parameter, copied in zip(model.network.parameters(), seat.network.parameters(), strict=True)
    ]
    assert shared == [not parameter.requires_grad for parameter in model.network.parameters()]


def test_an_ema_follows_and_its_state_comes_back() -> None:
    _, model, _, _ = setting()
    seat = EMA(model.network, 0.75)
    name = next(name for name in seat.followed if "lora_B" in name)
    perturb(model.network)
    seat.after_step(model.network)
    seat.after_step(model.network)
    mean = dict(seat.network.named_parameters())[name]
    torch.testing.assert_close(mean.detach(), torch.full_like(mean, 0.1 * (1 - 0.75**2)))
    other = EMA(model.network, 0.75)
    other.load_state_dict(seat.state_dict())
    assert torch.equal(dict(other.network.named_parameters())[name], mean)
    assert sorted(seat.state_dict()) == sorted(seat.followed) and all("lora" in key for key in seat.followed)


def test_a_cache_answers_without_the_network_and_survives_on_the_disk(tmp_path: Path) -> None:
    adapter, model, batch, draws = setting()
    seat = build_seat(ReferenceConfig(seat="cached"), model.network, folder=tmp_path, identity="a")
    first = scores_of(seat, adapter, model, batch, draws, 0)
    scored = adapter.scored
    again = scores_of(seat, adapter, model, batch[1:3], draws, 0)
    assert adapter.scored == scored and torch.equal(again.values, first.values[1:3])
    assert torch.equal(again.notes["timestep"], first.notes["timestep"][1:3]) and again.unit == first.unit
    seat.state_dict()  # a checkpoint writes the cache
    later = build_seat(ReferenceConfig(seat="cached"), model.network, folder=tmp_path, identity="a")
    assert torch.equal(scores_of(later, adapter, model, batch, draws, 0).values, first.values)
    assert adapter.scored == scored
    scores_of(later, adapter, model, batch, draws, 1)
    build_seat(ReferenceConfig(seat="cached"), model.network, folder=tmp_path, identity="b").scores(
        adapter, model, batch, draws, index=0
    )
    assert adapter.scored == scored + 2


def test_a_score_that_was_kept_stays_whatever_batch_its_pair_comes_in(tmp_path: Path) -> None:
    """In other batches its last bits would differ; here another perturbed network stands for them."""
    adapter, model, batch, draws = setting(lora=False)
    seat = Cached(FrozenCopy(model.network), ScoreCache(tmp_path, "a"))
    first = scores_of(seat, adapter, model, batch[:2], adapter.draws(model, batch[:2], step=1), 0).values
    seat.state_dict()
    assert isinstance(seat.seat, FrozenCopy)
    perturb(seat.seat.network)
    mixed = scores_of(seat, adapter, model, batch, draws, 0).values
    assert torch.equal(mixed[:2], first)
    seat.state_dict()
    for cache in (seat.cache, ScoreCache(tmp_path, "a")):
        found = cache.get(batch.group_ids, 0)
        assert found is not None and torch.equal(found.values, mixed)


def test_a_cache_of_the_starting_weights_refuses_once_they_are_gone(tmp_path: Path) -> None:
    adapter, model, batch, draws = setting(lora=False)
    seat = Cached(StartingWeights(), ScoreCache(tmp_path, "a"))
    assert seat.filled_before_training
    scores_of(seat, adapter, model, batch, draws, 0)
    seat.after_step(model.network)
    scores_of(seat, adapter, model, batch, draws, 0)
    with pytest.raises(UserError, match="lacks pair 'pair-000', draw 1, and training has begun"):
        scores_of(seat, adapter, model, batch, draws, 1)


def test_a_cache_forgets_padding_and_refuses_dense_statistics(tmp_path: Path) -> None:
    mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
    scores = Scores(torch.arange(16.0).view(2, 2, 4) * mask, mask, Unit("token"))
    cache = ScoreCache(tmp_path, "a")
    cache.put(["x", "y"], 0, scores)
    alone = cache.get(["x"], 0)
    assert alone is not None and alone.values.shape == (1, 2, 2)
    both = cache.get(["y", "x"], 0)
    assert both is not None and torch.equal(both.values, scores.values.flip(0)) and torch.equal(both.mask, mask.flip(0))
    assert cache.get(["x", "z"], 0) is None and cache.get(["x"], 1) is None
    dense = Scores(scores.values, mask, Unit("token"), dense=DenseStatistics(kl=scores.values))
    with pytest.raises(UserError, match="adapter_off or frozen"):
        cache.put(["x", "y"], 0, dense)
