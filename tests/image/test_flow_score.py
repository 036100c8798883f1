"""Scores of flow models: the stock network's error at the stock noise levels, on what the stock pipeline encodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flow_models import FAMILY_OF, KINDS, TOKENS
from torch import Tensor
from torch.nn import functional

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import TimestepSampling
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.modalities.image import packing
from polyalign.modalities.image.adapter import ImageAdapter
from polyalign.modalities.image.families import JOINT_ATTENTION_TARGETS

Make = Callable[..., ImageAdapter]
LATENT = 16  # elements of a latent side at 32 pixels


def policy_and_reference(adapter: ImageAdapter, model: Model, rows: list[dict[str, Any]]) -> tuple[Scores, Scores]:
    batch = adapter.prepare(model, rows, step=0)
    draws = adapter.draws(model, batch, step=0)
    with torch.no_grad(), adapters_off(model.network):
        reference = adapter.score(model, batch, draws)
    return adapter.score(model, batch, draws), reference


@pytest.mark.parametrize("kind", KINDS)
def test_margins_are_exactly_zero_at_the_start(kind: str, make_flow: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_flow(kind, timesteps_per_pair=2, timesteps=TimestepSampling("logit_normal"))
    model = adapter.trainable(adapter.load())
    policy, reference = policy_and_reference(adapter, model, rows)
    assert torch.equal(policy.values, reference.values) and policy.values.shape == (3, 2, 2)
    assert policy.unit.elements == 4 * LATENT**2 and policy.unit.steps == 1000
    assert bool((policy.values[:, 0] != policy.values[:, 1]).all()), "the two pictures of a pair have errors of their own"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_lora_learns_and_the_base_stays(kind: str, make_flow: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_flow(kind)
    model = adapter.trainable(adapter.load())
    trainable = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0] for name in trainable}
    assert {next(t for t in JOINT_ATTENTION_TARGETS if layer.endswith(t)) for layer in layers} == set(JOINT_ATTENTION_TARGETS)
    optimiser = torch.optim.AdamW(trainable.values(), lr=3e-3)
    references, losses = [], []
    for _ in range(4):
        policy, reference = policy_and_reference(adapter, model, rows)
        logratio = (policy.values - reference.values)[..., 0]
        loss = -functional.logsigmoid(50 * (logratio[:, 0] - logratio[:, 1])).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        references.append(reference.values)
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]
    assert torch.equal(references[0], references[-1])


def stock_levels(pipeline: Any) -> Tensor:
    """Noise coefficients from clean to noisy, as diffusers' scheduler and pipeline have them for pictures of 32 pixels."""
    plain = torch.arange(1, 1001) / 1000
    if not pipeline.scheduler.config.use_dynamic_shifting:
        return pipeline.scheduler.sigmas.flip(0)
    return pipeline.scheduler.time_shift(calculate_shift((LATENT // 2) ** 2), 1.0, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_are_those_of_the_scheduler(kind: str, make_flow: Make, flow_bases: dict[str, Path]) -> None:
    """SD3: shift 3. FLUX.1-dev: by resolution, and not the shift of 3 that its config also has. FLUX.1-schnell: none."""
    schedule = make_flow(kind).load().parts["schedule"]
    expected = stock_levels(DiffusionPipeline.from_pretrained(flow_bases[kind]))
    torch.testing.assert_close(schedule.noise, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.signal, 1 - expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.timestep, 1000 * expected, rtol=1e-5, atol=1e-3)
    half = {"sd3": 0.75, "sd35": 0.75, "flux-schnell": 0.5}.get(kind, math.exp(0.4675) / (math.exp(0.4675) + 1))
    assert float(schedule.noise[499]) == pytest.approx(half, abs=1e-3)


def test_a_larger_flux_picture_is_trained_at_more_noise(make_flow: Make) -> None:
    small, large = (make_flow("flux-dev", resolution=side).load().parts["schedule"].noise for side in (32, 128))
    assert bool((large[:-1] > small[:-1]).all()) and float(large[-1]) == float(small[-1]) == 1.0
    with pytest.raises(UserError, match="use_dynamic_shifting: its noise levels depend on the size"):
        NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})


@torch.no_grad()
def stock_velocity(pipeline: Any, noisy: Tensor, sigma: Tensor, prompts: list[str], guidance: float | None) -> Tensor:
    """The network's answer (N, C, h, w), as the stock pipeline asks for it."""
    if isinstance(pipeline, FluxPipeline):
        states, pooled, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=TOKENS)
        found = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, len(noisy), 4, LATENT, LATENT),
            timestep=sigma,
            guidance=None if guidance is None else torch.full((len(noisy),), guidance),
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=pipeline._prepare_latent_image_ids(len(noisy), LATENT // 2, LATENT // 2, "cpu", torch.float32),
        ).sample
        return pipeline._unpack_latents(found, 32, 32, 2)
    states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, max_sequence_length=TOKENS)
    return pipeline.transformer(
        hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=states, pooled_projections=pooled
    ).sample


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_errors_of_the_velocity(
    kind: str, make_flow: Make, rows: list[dict[str, Any]], flow_bases: dict[str, Path]
) -> None:
    """x_t = (1 - s) x0 + s noise, and the network should say noise - x0; the whole path again with stock parts alone."""
    vector = 3.5 if kind == "flux-dev" else None
    adapter = make_flow(kind, posterior="mode", guidance_vector=vector)
    model = adapter.load()
    batch = adapter.prepare(model, rows, step=0)
    draws = adapter.draws(model, batch, step=0)
    found = adapter.score(model, batch, draws).values[:, :, 0]
    pipeline: Any = DiffusionPipeline.from_pretrained(flow_bases[kind])
    sigma, noise = stock_levels(pipeline)[draws.timesteps[:, 0]], draws.noise[:, 0]
    prompts = [row["condition"]["prompt"] for row in rows]
    for place, column in enumerate(("chosen", "rejected")):
        pixels = pipeline.image_processor.preprocess([row[column] for row in rows])
        with torch.no_grad():
            mode = pipeline.vae.encode(pixels).latent_dist.mode()
        clean = (mode - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(batch.tensors["latents"][:, place], clean, rtol=1e-4, atol=1e-5)
        wide = sigma.view(-1, 1, 1, 1)
        velocity = stock_velocity(pipeline, (1 - wide) * clean + wide * noise, sigma, prompts, vector)
        expected = -(velocity - (noise - clean)).square().mean((1, 2, 3))
        torch.testing.assert_close(found[:, place], expected, rtol=2e-4, atol=1e-4)


def test_the_guidance_vector_is_told_to_the_network(make_flow: Make, rows: list[dict[str, Any]]) -> None:
    values = []
    for vector in (None, 1.0, 3.5):
        adapter = make_flow("flux-dev", guidance_vector=vector)
        model = adapter.load()
        batch = adapter.prepare(model, rows, step=0)
        values.append(adapter.score(model, batch, adapter.draws(model, batch, step=0)).values)
    assert torch.equal(values[0], values[1]) and not torch.allclose(values[1], values[2])


def test_packing_is_that_of_diffusers() -> None:
    latents = torch.arange(2 * 4 * 6 * 8, dtype=torch.float32).reshape(2, 4, 6, 8)
    tokens = packing.pack(latents)
    assert tokens.shape == (2, 12, 16)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(packing.unpack(tokens, 6, 8), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(packing.image_positions(6, 8, latents), expected)
    assert expected[5].tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_cached_and_live_are_the_same(kind: str, make_flow: Make, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    live = make_flow(kind, cache_bytes=0)
    first = make_flow(kind, cache_folder=tmp_path)
    found = [adapter.prepare(adapter.load(), rows, step=3).tensors for adapter in (live, first)]
    again = make_flow(kind, cache_folder=tmp_path)
    model = again.load()
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        if part in model.parts:
            model.parts[part].to("meta")  # nothing but the cache can answer now
    found.append(again.prepare(model, rows, step=3).tensors)
    assert set(found[0]) == {"latents", "text", "pooled"}
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name]), name


@pytest.mark.parametrize("kind", ["sd3", "flux-schnell"])
def test_every_text_encoder_is_heard(kind: str, make_flow: Make, rows: list[dict[str, Any]]) -> None:
    adapter = make_flow(kind, cache_bytes=0)
    model = adapter.load()
    before = adapter.prepare(model, rows, step=0).tensors
    encoders = [name for name in model.parts if name.startswith("text_encoder")]
    assert len(encoders) == {"sd3": 3, "flux": 2}[FAMILY_OF[kind]]
    for name in encoders:
        kept = {key: tensor.clone() for key, tensor in model.parts[name].state_dict().items()}
        with torch.no_grad():
            for parameter in model.parts[name].parameters():
                parameter.mul_(1.5)
        after = adapter.prepare(model, rows, step=0).tensors
        model.parts[name].load_state_dict(kept)
        t5 = name == encoders[-1]
        assert torch.equal(after["pooled"], before["pooled"]) == t5, name
        assert torch.equal(after["text"], before["text"]) == (kind == "flux-schnell" and not t5), name


def test_sd3_does_without_t5(make_flow: Make, rows: list[dict[str, Any]]) -> None:
    """Zeros take the place of T5's states; the text states of both kinds lie in one cache without being mixed up."""
    whole, without = make_flow("sd3"), make_flow("sd3", use_t5=False)
    without.cache = whole.cache
    model = without.load()
    assert "text_encoder_3" not in model.parts and "text_encoder_3" in (full := whole.load()).parts
    states = [adapter.prepare(m, rows, step=0).tensors["text"] for adapter, m in ((whole, full), (without, model))]
    assert torch.equal(states[0][:, :-TOKENS], states[1][:, :-TOKENS])
    assert float(states[0][:, -TOKENS:].abs().min()) > 0 and float(states[1][:, -TOKENS:].abs().max()) == 0
    batch = without.prepare(model, rows, step=0)
    assert bool(without.score(model, batch, without.draws(model, batch, step=0)).values.isfinite().all())
    assert without.sample(model, ["a red circle"], [0])[0].size == (32, 32)


@pytest.mark.parametrize("kind", ["sd35", "flux-dev"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_low_precision_keeps_float32_where_it_learns(
    kind: str, train: str, make_flow: Make, rows: list[dict[str, Any]]
) -> None:
    adapter = make_flow(kind, dtype="bfloat16", train=train, gradient_checkpointing=True)
    model = adapter.trainable(adapter.load())
    assert {p.dtype for p in model.network.parameters() if p.requires_grad} == {torch.float32}
    batch = adapter.prepare(model, rows, step=0)
    scores = adapter.score(model, batch, adapter.draws(model, batch, step=0))
    assert scores.values.dtype == torch.float32 and bool(scores.values.isfinite().all())
    scores.values.sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.network.parameters())
    assert adapter.sample(model, ["a red circle"], [0])[0].size == (32, 32)


def test_logit_normal_levels_have_the_published_density(make_flow: Make, rows: list[dict[str, Any]]) -> None:
    """SD3 (2403.03206, section 3.1): logit(t) is normal before the shift; a positive mean is more noise."""
    adapter = make_flow("sd3")
    batch = adapter.prepare(adapter.load(), rows, step=0)
    sampling = TimestepSampling("logit_normal")
    adapter = make_flow("sd3", timesteps=sampling, timesteps_per_pair=400)
    levels = adapter.draws(adapter.load(), batch, step=0).timesteps.flatten()
    logits = torch.logit((levels.double() + 0.5) / 1000)
    assert float(logits.mean()) == pytest.approx(0, abs=0.1) and float(logits.std()) == pytest.approx(1, abs=0.1)
    noisier = make_flow("sd3", timesteps=TimestepSampling("logit_normal", mean=1.0), timesteps_per_pair=400)
    assert float(noisier.draws(noisier.load(), batch, step=0).timesteps.double().mean()) > float(levels.double().mean()) + 100
