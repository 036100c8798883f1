"""Diffusers folders of AudioLDM2 and Stable Audio: the same text states and the same sound as the stock pipelines."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_models import FAMILIES, LENGTH, build
from tango_models import adapter_of, pairs

from polyalign.core.config import load
from polyalign.core.errors import UserError
from polyalign.core.likelihood.schedules import FLOW
from polyalign.core.references import adapters_off
from polyalign.modalities.audio import sampling, stable_audio
from polyalign.modalities.audio.config import AudioRecipe
from polyalign.modalities.audio.loading import parts_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("folders")
    return {name: (root / name, build(root / name, name)) for name in FAMILIES}


@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, None), (4.0, None), (4.0, "noise"), (4.0, "a cat meows while rain falls")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_makes_the_same_sound(
    family: str, guidance: float, negative: str | None, bases: dict[str, tuple[Path, Any]]
) -> None:
    """Also against a text that is shorter or longer than the prompt, which AudioLDM2 cuts or pads to the prompt's tokens."""
    folder, pipeline = bases[family]
    adapter = adapter_of(folder, seconds=LENGTH[family], guidance=guidance, sample_batch=1, negative_prompt=negative)
    model = adapter.load()
    assert parts_of(model).family == family
    found, other = (adapter.sample(model, [prompt], [5])[0].samples for prompt in ("a dog", "rain on a roof"))
    latents = sampling._denoise(model, adapter.settings, [adapter._job(model, 0, "a dog", 5)])
    length = {"audio_end_in_s" if family == "stable_audio" else "audio_length_in_s": LENGTH[family]}
    pipeline.set_progress_bar_config(disable=True)
    stock = [
        pipeline(
            "a dog",
            negative_prompt=negative,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5),
            output_type=kind,
            **length,
        ).audios
        for kind in ("latent", "np")
    ]
    torch.testing.assert_close(latents, stock[0], rtol=1e-5, atol=1e-5)
    expected = np.asarray(stock[1][0])
    expected = expected.mean(0) if family == "stable_audio" else expected
    assert len(found) == round(LENGTH[family] * parts_of(model).codec.rate) and 0.01 < found.std() < 0.5
    np.testing.assert_allclose(found, expected.clip(-1, 1)[: len(found)], atol=1e-5)
    assert np.abs(found - other).max() > 1e-3  # a hundred times as far as it may be from the stock one


@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_zero_and_an_export_opens(family: str, bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    adapter = adapter_of(bases[family][0], seconds=LENGTH[family])
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, pairs(), step=0)
    draws = adapter.draws(model, batch, step=0)
    policy = adapter.score(model, batch, draws).values
    with torch.no_grad(), adapters_off(model.network):
        assert torch.equal(policy, adapter.score(model, batch, draws).values)
    policy.sum().backward()
    full = adapter_of(bases[family][0], seconds=LENGTH[family], train="full")
    trained = full.trainable(full.load())
    with torch.no_grad():
        next(trained.network.parameters()).add_(0.1)
    full.export(trained, tmp_path / "out")
    again = adapter_of(tmp_path / "out", seconds=LENGTH[family])
    first, second = (a.sample(m, ["rain", "a dog"], [0, 1]) for a, m in ((full, trained), (again, again.load())))
    assert all(np.array_equal(one.samples, other.samples) for one, other in zip(first, second, strict=True))
    stock = type(bases[family][1]).from_pretrained(tmp_path / "out")
    network = stock.transformer if family == "stable_audio" else stock.unet
    assert all(torch.equal(tensor, trained.network.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_cosine_scheduler_is_its_schedule_in_sigmas(bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["stable_audio"][0], tmp_path / "cosine"))
    described = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    adapter = adapter_of(folder, seconds=0.03)
    model = adapter.load()
    schedule = parts_of(model).schedule
    sigma = schedule.noise.double() / schedule.signal.double()
    torch.testing.assert_close(sigma.arctan() / math.pi * 2, schedule.timestep.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000))
    scheduler: Any = DDIMScheduler.from_config(stable_audio.solver_config(schedule))
    torch.testing.assert_close(scheduler.alphas_cumprod.sqrt(), schedule.signal, rtol=1e-3, atol=1e-6)
    for solver in ("ddim", "dpmpp", "ddpm"):
        one = adapter_of(folder, seconds=0.03, solver=solver)
        assert np.isfinite(one.sample(model, ["a dog"], [0])[0].samples).all()
    described["_class_name"] = "EDMDPMSolverMultistepScheduler"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="whose noise levels"):
        adapter.load()


def test_what_a_folder_lacks_is_named(bases: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["stable_audio"][0], tmp_path / "base"))
    with pytest.raises(UserError, match="at most 0.03"):
        adapter_of(folder, seconds=3.0).load()
    with pytest.raises(UserError, match="it is for Tango's layout only"):
        adapter_of(folder, seconds=0.03, tokenizer="x").load()
    shutil.rmtree(folder / "projection_model")
    with pytest.raises(UserError, match="lacks projection_model/, its StableAudioProjectionModel"):
        adapter_of(folder, seconds=0.03).load()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MusicLDMPipeline"}))
    with pytest.raises(UserError, match="describes a MusicLDMPipeline"):
        adapter_of(folder, seconds=0.03).load()


def test_crpo_draws_levels_as_its_default_base_was_trained(bases: dict[str, tuple[Path, Any]]) -> None:
    """Stable Audio opens as v-prediction on a table of levels; the normal draw of the publication is of flow models."""
    recipe, _ = load("audio/crpo", [], AudioRecipe)
    parts = parts_of(adapter_of(bases["stable_audio"][0], seconds=LENGTH["stable_audio"]).load())
    assert recipe.model.base.startswith("stabilityai/stable-audio-open")
    assert parts.prediction_type == "v_prediction" and parts.schedule.kind != FLOW
    assert recipe.likelihood.timesteps.kind == "uniform"
