"""The sampler: a clip depends on its own seed and condition, and every solver is diffusers' own on the model's schedule."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tango_models
import torch
from tango_models import SECONDS, adapter_of
from torch import Tensor, nn

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import TimestepSampling
from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.datasets.audio.waves import Wave
from polyalign.modalities.audio import sampling
from polyalign.modalities.audio.adapter import AudioAdapter
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.audio.mel_vae import MelVae
from polyalign.modalities.audio.parts import Told

torch.set_num_threads(1)

LONG = "a dog barks and then a car passes by and a bell rings twice while rain falls on the roof"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tango") / "tango-tiny"
    tango_models.build(folder)
    return folder


def same(first: Wave, second: Wave) -> bool:
    return np.array_equal(first.samples, second.samples)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "ddpm"])
def test_clips_do_not_depend_on_their_batch(solver: str, base: Path) -> None:
    """Alone, among others in another order, and with prompts of other lengths between them."""
    adapter = adapter_of(base, solver=solver)
    model = adapter.load()
    conditions: list[Any] = ["rain", LONG, {"prompt": "a bell", "steps": 4}, "a cat", "rain"]
    together = adapter.sample(model, conditions, [1, 2, 3, 4, 5])
    for place in range(5):
        assert same(together[place], adapter.sample(model, [conditions[place]], [place + 1])[0]), place
    back = adapter.sample(model, conditions[::-1], [5, 4, 3, 2, 1])
    assert all(same(one, other) for one, other in zip(together, back[::-1], strict=True))
    assert not same(together[0], together[4])
    assert all(wave.rate == 16000 and len(wave.samples) == round(SECONDS * 16000) for wave in together)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_plain_loop(guidance: float, base: Path) -> None:
    """DDIM written out: v to x0 and noise, guidance u + g (c - u), the empty text padded beside the prompt."""
    adapter = adapter_of(base, guidance=guidance, sampling_steps=4)
    model, parts = adapter.load(), None
    parts = parts_of(model)
    found = sampling._denoise(model, adapter.settings, [adapter._job(model, 0, "a dog", 7)] * 2)[:1]
    states = [parts.text.encode([prompt], seconds=1.0) for prompt in ("", "a dog")]
    latents = torch.randn(1, 8, 16, 8, generator=torch.Generator().manual_seed(7))
    for step in range(4):
        level = 751 - 250 * step
        before = max(level - 250, 0)
        answers = [
            model.network(latents, level, encoder_hidden_states=told.states, encoder_attention_mask=told.mask).sample
            for told in states
        ]
        velocity = answers[1] if guidance == 1.0 else answers[0] + guidance * (answers[1] - answers[0])
        a, s = parts.schedule.signal[level], parts.schedule.noise[level]
        clean, noise = a * latents - s * velocity, a * velocity + s * latents
        latents = parts.schedule.signal[before] * clean + parts.schedule.noise[before] * noise
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-4)


def test_a_condition_may_say_how(base: Path) -> None:
    adapter = adapter_of(base)
    model = adapter.load()
    plain = adapter.sample(model, ["rain"], [0])[0]
    ways: list[dict[str, Any]] = [
        {"steps": 5}, {"seconds": 0.2}, {"guidance": 6.0}, {"negative_prompt": "noise"}, {"guidance": 1.0},
    ]  # fmt: skip
    clips = adapter.sample(model, [{"prompt": "rain", **way} for way in ways], [0] * len(ways))
    assert not any(same(plain, clip) for clip in clips) and len(clips[1].samples) == 3200
    steps = adapter_of(base, sampling_steps=5)
    assert same(clips[0], steps.sample(steps.load(), ["rain"], [0])[0])
    for way, message in (
        ({"steps": 0}, "steps is 0"),
        ({"seconds": -1}, "seconds is -1"),
        ({"seconds": "long"}, "seconds is 'long'"),
        ({"guidance": 0.5}, "guidance is 0.5; allowed: a number from 1"),
        ({"guidance": "x"}, "guidance is 'x'"),
        ({"guidance": None}, "guidance is None"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 1, "negative_prompt": "noise"}, "steers away from nothing"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"prompt": None}, "caption is missing"),
    ):
        with pytest.raises(UserError, match=f"condition 0: .*{message}"):
            adapter.sample(model, [{"prompt": "rain", **way}], [0])
    with pytest.raises(UserError, match="2 seeds"):
        adapter.sample(model, ["rain"], [0, 1])


class Exact(nn.Module):
    """A network that knows the answer: the velocity towards one clean latent."""

    def __init__(self, clean: Tensor):
        super().__init__()
        self.clean: Tensor = nn.Parameter(clean)


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 20), ("dpmpp", 20), ("ddpm", 20), ("euler", 4)])
def test_solvers_reach_what_the_network_knows(solver: str, steps: int, base: Path) -> None:
    """Also from the levels that the flow schedule of the core tells the network: (1 - s) x0 + s n, told 1000 s.

    Where x0 is always the same, no solver has an error of discretisation. The last step of DPM-Solver++, DDPM and Euler goes to
    a level without noise, that is to x0. Stable Diffusion 2.1's DDIM (set_alpha_to_one false) ends at level 0: a_0 x0 + s_0 n,
    s_0 = 0.029, where n, which every step keeps, is what the first one takes for noise: (start - a x0) / s.
    """
    adapter = adapter_of(base, solver=solver, guidance=1.0)
    model = adapter.load()
    parts, clean = parts_of(model), torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(0))
    asked: list[Tensor] = []
    if solver == "euler":
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
        schedule = NoiseSchedule.from_scheduler_config(config)
        parts = replace(parts, scheduler_config=config, schedule=schedule, prediction_type="flow")
    signal, spread = parts.schedule.signal, parts.schedule.noise

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        asked.append(timesteps[0])
        level = (parts.schedule.timestep - timesteps[0]).abs().argmin()
        assert float((parts.schedule.timestep[level] - timesteps[0]).abs()) < 1e-3  # a level that training has
        assert isinstance(network, Exact)
        a, s, x0 = signal[level], spread[level], network.clean
        noise = (noisy - a * x0) / s
        return noise - x0 if parts.prediction_type == "flow" else a * noise - s * x0

    exact = Model(network=Exact(clean), parts={"audio": replace(parts, predict=predict)}, identity="x")
    found = sampling._denoise(exact, adapter.settings, [replace(adapter._job(model, 0, "rain", 3), steps=steps)])
    assert len(asked) == steps and all(one > other for one, other in zip(asked, asked[1:], strict=False))
    expected = clean
    if solver == "ddim":
        start, first = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(3)), int(asked[0])
        expected = signal[0] * clean + spread[0] * (start - signal[first] * clean) / spread[first]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=5e-6)


def test_a_loud_clip_does_not_wrap_around(base: Path) -> None:
    """The original's cast of 32768 x 1.0 to 16 bits gives -32768; here a vocoder at its limits gives 1.0."""
    parts = parts_of(adapter_of(base).load())
    codec: Any = parts.codec
    assert isinstance(codec, MelVae)
    with torch.no_grad():
        codec.vocoder.conv_post.bias.fill_(50.0)
    (wave,) = codec.decode(torch.zeros(1, 8, 16, 8))
    assert wave.samples.dtype == np.float32 and float(wave.samples.min()) == float(wave.samples.max()) == 1.0
    with pytest.raises(UserError, match="not finite"):
        codec.decode(torch.full((1, 8, 16, 8), float("nan")))


def test_levels_are_drawn_as_in_crpo() -> None:
    """TangoFlux takes place floor(1000 u) of a table that falls from 1 to 0.001, u the sigmoid of a normal number; the core's
    table rises, so that its number there is minus that one, which has the same law."""
    schedule, sampling_law = NoiseSchedule.rectified_flow(1000), TimestepSampling("logit_normal")
    table = torch.arange(1000, 0, -1) / 1000
    drawn = []
    for seed in range(500):
        level = sampling_law.index(1000, torch.Generator().manual_seed(seed))
        number = -torch.randn((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(schedule.noise[level]) == float(table[int(1000 * torch.sigmoid(number))])
        drawn.append(float(schedule.noise[level]))
    assert 0.45 < float(np.median(drawn)) < 0.55 and min(drawn) < 0.15 and max(drawn) > 0.85


def test_a_flow_model_is_scored_by_the_core(base: Path) -> None:
    """CRPO's target, noise - x0, at levels drawn log-normally; the adapter's code is the same."""
    folder = Path(shutil.copytree(base, base.parent / "flow", dirs_exist_ok=True))
    (folder / "scheduler").mkdir(exist_ok=True)
    described = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    adapter: AudioAdapter = adapter_of(folder, timesteps=TimestepSampling("logit_normal"), posterior="mode")
    model = adapter.load()
    batch = adapter.prepare(model, tango_models.pairs(), step=0)
    draws = adapter.draws(model, batch, step=0)
    found = adapter.score(model, batch, draws).values[:, 0, 0]
    clean, noise = batch.tensors["latents"][:, 0], draws.noise[:, 0]
    sigma = (draws.timesteps[:, 0] + 1) / 1000
    noisy = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
    guess = model.network(
        noisy, sigma * 1000, encoder_hidden_states=batch.tensors["text"], encoder_attention_mask=batch.tensors["text_mask"]
    ).sample
    torch.testing.assert_close(found, -(guess - (noise - clean)).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    clips = adapter.sample(model, ["rain", "rain"], [0, 1])
    assert same(clips[1], adapter.sample(model, ["rain"], [1])[0]) and not same(clips[0], clips[1])
    with pytest.raises(UserError, match="flow model: allowed is euler"):
        adapter_of(folder, solver="ddim").sample(model, ["rain"], [0])
