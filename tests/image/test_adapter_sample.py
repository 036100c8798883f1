"""Sampling: stock diffusers' pixels, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.modalities.image.adapter import ImageAdapter

Make = Callable[..., ImageAdapter]


def same(one: Image.Image, two: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("negative", [None, "blue"])
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_pixels_are_those_of_stock_diffusers(
    family: str, negative: str | None, make_adapter: Make, tiny_models: dict[str, Path]
) -> None:
    adapter = make_adapter(family, guidance=4.0, sample_batch=1, negative_prompt=negative)
    found = adapter.sample(adapter.load(), [{"prompt": "a red circle"}], [11])[0]
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_models[family])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline(
        "a red circle",
        negative_prompt=negative,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert same(found, expected)


@pytest.mark.parametrize("sampler", ["base", "ddim", "dpmsolver++", "euler"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str, make_adapter: Make) -> None:
    adapter = make_adapter("sdxl", sample_batch=4, sampler=sampler)
    model = adapter.load()
    prompts = ["a red circle", "a blue square", "two green dots", "x", "a red circle"]
    together = adapter.sample(model, prompts, [1, 2, 3, 4, 5])
    assert len(together) == 5 and not same(together[0], together[4])
    assert same(adapter.sample(model, prompts[2:3], [3])[0], together[2])
    assert all(same(a, b) for a, b in zip(adapter.sample(model, prompts[::-1], [5, 4, 3, 2, 1]), together[::-1], strict=True))
    assert {picture.size for picture in together} == {(32, 32)} and {picture.mode for picture in together} == {"RGB"}


def test_base_and_policy_are_sampled_from_one_network(make_adapter: Make) -> None:
    adapter = make_adapter("sdxl")
    untouched = adapter.sample(adapter.load(), ["a red circle"], [1])[0]
    model = adapter.trainable(adapter.load())
    assert same(adapter.sample(model, ["a red circle"], [1])[0], untouched)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    assert not same(adapter.sample(model, ["a red circle"], [1])[0], untouched)
    assert same(adapter.sample_base(model, ["a red circle"], [1])[0], untouched)
    assert model.network.training


def test_full_training_has_no_base_inside(make_adapter: Make) -> None:
    adapter = make_adapter("sd15", train="full")
    with pytest.raises(UserError, match="load the base anew"):
        adapter.sample_base(adapter.load(), ["x"], [0])


def test_what_cannot_be_sampled_is_refused(make_adapter: Make) -> None:
    adapter = make_adapter("sd15")
    model = adapter.load()
    with pytest.raises(UserError, match="2 conditions and 1 seeds"):
        adapter.sample(model, ["x", "y"], [0])
    with pytest.raises(UserError, match="condition 1: the caption is missing"):
        adapter.sample(model, ["x", {"text": "y"}], [0, 1])


def test_progress_is_told_after_every_batch(make_adapter: Make) -> None:
    adapter = make_adapter("sd15", sample_batch=2, guidance=1.0)
    told: list[tuple[int, int]] = []
    adapter.sample(adapter.load(), ["x"] * 3, [0, 1, 2], progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 3), (3, 3)]
