"""The start of training is exact: policy equal to reference, on every kind of base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from polyalign.core.adapter import Model
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.modalities.image import lora
from polyalign.modalities.image.adapter import ImageAdapter

FAMILIES = ["sd15", "sd2", "sdxl"]
Make = Callable[..., ImageAdapter]


def policy_and_reference(adapter: ImageAdapter, model: Model, rows: list[dict[str, Any]], step: int) -> tuple[Scores, Scores]:
    batch = adapter.prepare(model, rows, step=step)
    draws = adapter.draws(model, batch, step=step)
    with torch.no_grad(), adapters_off(model.network):
        reference = adapter.score(model, batch, draws)
    return adapter.score(model, batch, draws), reference


@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_exactly_zero_at_the_start(family: str, make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_adapter(family, timesteps_per_pair=2)
    model = adapter.trainable(adapter.load())
    policy, reference = policy_and_reference(adapter, model, rows, 0)
    assert torch.equal(policy.values, reference.values) and policy.values.shape == (3, 2, 2)
    logratio = (policy.values - reference.values).sum(-1)
    margin = logratio[:, 0] - logratio[:, 1]
    assert torch.equal(margin, torch.zeros(3))
    assert float(-functional.logsigmoid(2500 * margin.detach()).mean()) == pytest.approx(math.log(2), abs=1e-7)
    assert policy.unit.elements == 4 * 16 * 16 and policy.unit.steps == 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_lora_learns_and_the_base_stays(family: str, make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_adapter(family)
    model = adapter.trainable(adapter.load())
    trainable = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimiser = torch.optim.AdamW([p for p in model.network.parameters() if p.requires_grad], lr=1e-2)
    references = []
    for step in range(3):
        policy, reference = policy_and_reference(adapter, model, rows, 0)
        logratio = (policy.values - reference.values)[..., 0]
        loss = -functional.logsigmoid(500 * (logratio[:, 0] - logratio[:, 1])).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        references.append(reference.values)
        assert {name for name, parameter in model.network.named_parameters() if parameter.requires_grad} == trainable, step
    assert torch.equal(references[0], references[2])
    assert float(loss.detach()) < math.log(2)


def test_the_draw_of_a_pair_does_not_depend_on_its_batch(make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_adapter("sdxl")
    model = adapter.load()
    together, alone = adapter.prepare(model, rows, step=4), adapter.prepare(model, rows[1:2], step=4)
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor[0], together.tensors[name][1]), name
    draws, own = adapter.draws(model, together, step=4), adapter.draws(model, alone, step=4)
    assert torch.equal(draws.noise[1], own.noise[0]) and torch.equal(draws.timesteps[1], own.timesteps[0])
    parts = [adapter.score(model, together[i : i + 1], draws[i : i + 1]).values for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), adapter.score(model, together, draws).values, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapter = make_adapter("sdxl", gradient_checkpointing=checkpointing)
        model = adapter.trainable(adapter.load())
        batch = adapter.prepare(model, rows, step=0)
        adapter.score(model, batch, adapter.draws(model, batch, step=0)).values.sum().backward()
        gradients.append([p.grad for p in model.network.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_low_precision_keeps_float32_where_it_learns(train: str, make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_adapter("sdxl", dtype="bfloat16", train=train)
    model = adapter.trainable(adapter.load())
    assert {p.dtype for p in model.network.parameters() if p.requires_grad} == {torch.float32}
    batch = adapter.prepare(model, rows, step=0)
    assert batch.tensors["latents"].dtype == torch.float32 and model.parts["vae"].dtype == torch.float32
    scores = adapter.score(model, batch, adapter.draws(model, batch, step=0))
    assert scores.values.dtype == torch.float32 and bool(scores.values.isfinite().all())
    scores.values.sum().backward()
    assert adapter.sample(model, ["a red circle"], [0])[0].size == (32, 32)


def test_v_prediction_is_taken_from_the_base(make_adapter: Make, rows: list[dict[str, Any]]) -> None:
    """The same network read as an epsilon network has other errors."""
    adapter = make_adapter("sd2")
    model = adapter.load()
    assert model.parts["scheduler"].config.prediction_type == "v_prediction"
    batch = adapter.prepare(model, rows, step=0)
    draws = adapter.draws(model, batch, step=0)
    as_v = adapter.score(model, batch, draws).values
    noisy = model.parts["schedule"].add_noise(batch.tensors["latents"][:, 0], draws.noise[:, 0], draws.timesteps[:, 0])
    guess = model.network(noisy, draws.timesteps[:, 0], encoder_hidden_states=batch.tensors["text"]).sample
    velocity = model.parts["scheduler"].get_velocity(batch.tensors["latents"][:, 0], draws.noise[:, 0], draws.timesteps[:, 0])
    torch.testing.assert_close(as_v[:, 0, 0], -(guess - velocity).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_lora_start_depends_on_the_seed_alone(make_adapter: Make) -> None:
    torch.manual_seed(5)
    first = lora.state_dict(make_adapter("sd15").trainable(make_adapter("sd15").load()).network)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    second = lora.state_dict(make_adapter("sd15").trainable(make_adapter("sd15").load()).network)
    other = lora.state_dict(make_adapter("sd15", seed=1).trainable(make_adapter("sd15").load()).network)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
