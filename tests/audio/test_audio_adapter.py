"""The audio adapter on a tiny Tango: the start of training is exact, and draws and caches belong to their pair alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tango_models
import torch
from tango_models import adapter_of, pairs, wave
from torch.nn import functional

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.references import adapter_chosen, adapters_off
from polyalign.core.scores import Scores
from polyalign.datasets.audio.waves import encode_flac
from polyalign.modalities.audio.adapter import AudioAdapter
from polyalign.modalities.audio.loading import parts_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tango") / "tango-tiny"
    tango_models.build(folder)
    return folder


def scored(adapter: AudioAdapter, model: Model, step: int = 0) -> Scores:
    batch = adapter.prepare(model, pairs(), step=step)
    return adapter.score(model, batch, adapter.draws(model, batch, step=step))


def disturb(model: Model) -> None:
    """What training would do: every trainable number moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_margins_are_exactly_zero_at_the_start(base: Path) -> None:
    adapter = adapter_of(base, timesteps_per_pair=2)
    plain = scored(adapter, adapter.load())
    model = adapter.trainable(adapter.load())
    policy = scored(adapter, model)
    with torch.no_grad(), adapters_off(model.network):
        reference = scored(adapter, model)
    assert torch.equal(policy.values, reference.values) and torch.equal(plain.values, policy.values)
    assert policy.values.shape == (3, 2, 2) and policy.values.requires_grad
    margin = (policy.values - reference.values).sum(-1)
    assert torch.equal(margin[:, 0] - margin[:, 1], torch.zeros(3))
    assert policy.unit.elements == 8 * 16 * 8 and policy.unit.steps == 1000


def test_only_the_lora_learns_and_the_base_stays(base: Path) -> None:
    adapter = adapter_of(base)
    model = adapter.trainable(adapter.load())
    trained = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".attn" in name for name in trained)
    optimiser = torch.optim.AdamW([p for p in model.network.parameters() if p.requires_grad], lr=1e-2)
    references = []
    for _ in range(3):
        with torch.no_grad(), adapters_off(model.network):
            references.append(scored(adapter, model).values)
        logratio = (scored(adapter, model).values - references[-1])[..., 0]
        loss = -functional.logsigmoid(500 * (logratio[:, 0] - logratio[:, 1])).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(references[0], references[2]) and float(loss.detach()) < math.log(2)


def test_the_error_is_that_of_a_velocity_at_the_drawn_level(base: Path) -> None:
    """Against the formula with diffusers' own schedule and the UNet called by hand."""
    from diffusers import DDPMScheduler

    adapter = adapter_of(base, posterior="mode")
    model = adapter.load()
    batch = adapter.prepare(model, pairs(), step=2)
    draws = adapter.draws(model, batch, step=2)
    found = adapter.score(model, batch, draws).values[:, :, 0]
    scheduler: Any = DDPMScheduler.from_config(dict(parts_of(model).scheduler_config))
    levels, noise = draws.timesteps[:, 0], draws.noise[:, 0]
    for place in range(2):
        clean = batch.tensors["latents"][:, place]
        guess = model.network(
            scheduler.add_noise(clean, noise, levels),
            levels,
            encoder_hidden_states=batch.tensors["text"],
            encoder_attention_mask=batch.tensors["text_mask"],
        ).sample
        error = (guess - scheduler.get_velocity(clean, noise, levels)).square().mean((1, 2, 3))
        torch.testing.assert_close(found[:, place], -error, rtol=1e-4, atol=1e-5)


def test_cached_is_live(base: Path, tmp_path: Path) -> None:
    """Latents and text states from memory, from the disk, and made anew; a sample of the posterior is drawn each time."""
    folder = tmp_path / "cache"
    adapters = [adapter_of(base, cache_folder=folder), adapter_of(base, cache_folder=folder), adapter_of(base, cache_bytes=0)]
    batches = []
    for adapter in adapters:
        model = adapter.load()
        batches += [adapter.prepare(model, pairs(), step=step) for step in (0, 0, 1)]
    for name in batches[0].tensors:
        for same in (1, 3, 4, 6, 7):
            assert torch.equal(batches[0].tensors[name], batches[same].tensors[name]), (name, same)
    assert not torch.equal(batches[0].tensors["latents"], batches[2].tensors["latents"])
    assert torch.equal(batches[2].tensors["latents"], batches[5].tensors["latents"])
    assert len(list(folder.rglob("*.safetensors"))) == 6 + 3


def test_a_pair_does_not_depend_on_its_batch(base: Path) -> None:
    adapter = adapter_of(base, caption_dropout=0.5)
    model = adapter.load()
    together, alone = adapter.prepare(model, pairs(), step=4), adapter.prepare(model, pairs()[1:2], step=4)
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor[0], together.tensors[name][1]), name
    draws, own = adapter.draws(model, together, step=4), adapter.draws(model, alone, step=4)
    assert torch.equal(draws.noise[1], own.noise[0]) and torch.equal(draws.timesteps[1], own.timesteps[0])
    steps = [adapter.prepare(model, pairs()[1:2], step=step).tensors["text_mask"].sum() for step in range(12)]
    assert len(set(map(int, steps))) == 2  # the caption, and the states of the empty text


def test_clips_of_any_form_and_rate(base: Path, tmp_path: Path) -> None:
    """Bytes, the store's struct, a path and a wave are one clip; another rate is resampled; silence has latents."""
    adapter = adapter_of(base, posterior="mode")
    model = adapter.load()
    stored = encode_flac(wave(1))
    (tmp_path / "clip.flac").write_bytes(stored)
    row = pairs()[0]
    latents = []
    for form in (stored, {"bytes": stored, "path": None}, tmp_path / "clip.flac"):
        latents.append(adapter.prepare(model, [{**row, "chosen": form}], step=0).tensors["latents"][0, 0])
    assert all(torch.equal(latents[0], other) for other in latents)
    odd = {**row, "chosen": wave(3, rate=44100), "rejected": replace(wave(4), samples=np.zeros(900, dtype=np.float32))}
    assert bool(adapter.prepare(model, [odd], step=0).tensors["latents"].isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "pair pair-0, column chosen: expected a sound"),
        ({"chosen": b"no sound at all"}, "pair pair-0, column chosen: not a sound"),
        ({"chosen": "/nowhere.flac"}, "pair pair-0, column chosen: there is no file"),
        ({"rejected": encode_flac(wave(0))[:3000]}, "pair pair-0, column rejected"),
        ({"rejected": replace(wave(0), samples=np.zeros(0, dtype=np.float32))}, "the sound has no samples"),
        ({"condition": {}}, "pair pair-0: the caption is missing"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(change: dict[str, Any], message: str, base: Path) -> None:
    adapter = adapter_of(base)
    with pytest.raises(UserError, match=message):
        adapter.prepare(adapter.load(), [{**pairs()[0], **change}], step=0)


def test_an_empty_caption_is_a_caption(base: Path) -> None:
    adapter = adapter_of(base)
    batch = adapter.prepare(adapter.load(), [{**pairs()[0], "condition": {"prompt": ""}}], step=0)
    assert int(batch.tensors["text_mask"].sum()) == 1


def test_labels_and_low_precision(base: Path) -> None:
    adapter = adapter_of(base, dtype="bfloat16", gradient_checkpointing=True)
    model = adapter.trainable(adapter.load())
    assert {p.dtype for p in model.network.parameters() if p.requires_grad} == {torch.float32}
    row = {"pair_id": "a", "condition": "rain", "audio": wave(0), "label": True}
    batch = adapter.prepare(model, [row], step=0)
    scores = adapter.score(model, batch, adapter.draws(model, batch, step=0))
    assert scores.values.shape == (1, 1, 1) and scores.values.dtype == torch.float32
    scores.values.sum().backward()
    assert len(adapter.sample(model, ["rain"], [0])[0].samples) == 5120


def test_loras_come_back_and_stand_beside_each_other(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, alpha=6.0)
    saved = adapter.trainable(adapter.load())
    disturb(saved)
    adapter.export(saved, tmp_path / "lora", {"objective": "dpo"})
    again = adapter.load_lora(adapter.load(), tmp_path / "lora")
    expected, plain = scored(adapter, saved).values, scored(adapter, adapter.load()).values
    assert torch.equal(scored(adapter, again).values, expected) and not torch.equal(expected, plain)
    beside = adapter.load_lora(adapter.trainable(adapter.load()), tmp_path / "lora", name="reference")
    assert torch.equal(scored(adapter, beside).values, plain)
    with adapter_chosen(beside.network, "reference"):
        assert torch.equal(scored(adapter, beside).values, expected)
    first, second = (adapter.sample(m, ["rain"], [0])[0] for m in (saved, again))
    base_clip = adapter.sample_base(saved, ["rain"], [0])[0]
    assert np.array_equal(first.samples, second.samples) and not np.array_equal(first.samples, base_clip.samples)
    assert np.array_equal(base_clip.samples, adapter.sample(adapter.load(), ["rain"], [0])[0].samples)


def test_settings_that_contradict_the_base(base: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"family": "tiny"}, "is of the family tango"),
        ({"base": "nowhere"}, "there is no such folder"),
        ({"base": str(tmp_path)}, "this modality opens"),
        ({"targets": ("no_such_layer",)}, "do not fit this network"),
        ({"solver": "euler"}, "is for flow models"),
    ):
        with pytest.raises(UserError, match=message):
            adapter = adapter_of(**{"base": base, **settings})
            adapter.sample(adapter.trainable(adapter.load()), ["rain"], [0])
