"""Diffusion-DPO as the public training scripts step it: nothing is kept from one step to the next.

Each step decodes the pictures, encodes them with the VAE and the captions with the text encoders, and forwards both the network
and a full copy of it. The order of the work and the loss are those of the published scripts (SalesforceAIResearch/DiffusionDPO,
and the diffusers research project for SDXL); the draws of noise and timesteps are ours, so that the losses can be compared.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyalign.core.likelihood.denoising import draw
from polyalign.core.trainer import order
from polyalign.modalities.image import loading, pictures, text
from polyalign.modalities.image.families import family_of
from polyalign.modalities.image.micro_conditioning import time_ids


def live_loop(
    adapter: Any, rows: Sequence[Mapping[str, Any]], steps: int, *, beta: float, rate: float
) -> tuple[list[float], list[float]]:
    """Processor seconds and losses of each step of DPO with ``0.5 * beta`` on mean errors, all rows in every step."""
    model = adapter.load()
    reference = copy.deepcopy(model.network).eval().requires_grad_(False)
    network = adapter.trainable(model).network
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.999), weight_decay=0.01)
    seconds, losses = [], []
    for step in range(1, steps + 1):
        began = time.process_time()
        shuffled = [rows[index] for index in order(0, len(rows), step - 1)]
        inputs, target = noised(adapter, model, shuffled, step)
        errors = mean_errors(network(**inputs, return_dict=False)[0], target)
        with torch.no_grad():
            reference_errors = mean_errors(reference(**inputs, return_dict=False)[0], target)
        chosen, rejected = (errors - reference_errors).chunk(2)
        loss = -F.logsigmoid(-0.5 * beta * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
        losses.append(loss.item())
    return seconds, losses


def noised(adapter: Any, model: Any, rows: Sequence[Mapping[str, Any]], step: int) -> tuple[dict[str, Any], Tensor]:
    """What the networks are called with, the chosen pictures before the rejected ones, and what they should answer (v)."""
    pipeline, vae = loading.assemble(model), model.parts["vae"]
    captions = [text.encode(family_of(model), pipeline, row["condition"]["prompt"]) for row in rows]
    states = torch.stack([caption["states"] for caption in captions]).repeat(2, 1, 1)
    pooled = torch.stack([caption["pooled"] for caption in captions]).repeat(2, 1)
    pixels = torch.stack([decoded(row[side]["bytes"]) for side in ("chosen", "rejected") for row in rows])
    with torch.no_grad():
        clean = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise, timesteps = draws_of(adapter, model, rows, clean.shape[1:], step)
    signal = model.parts["scheduler"].alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    size = pixels.shape[-1]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([time_ids((size, size), (0, 0), size)] * len(pixels))}
    inputs = {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": states, "added_cond_kwargs": added}
    return inputs, signal.sqrt() * noise - (1 - signal).sqrt() * clean


def draws_of(
    adapter: Any, model: Any, rows: Sequence[Mapping[str, Any]], shape: torch.Size, step: int
) -> tuple[Tensor, Tensor]:
    """Noise and timesteps of the pairs, the same for both pictures of each."""
    drawn = draw(
        [row["pair_id"] for row in rows],
        shape,
        steps=model.parts["schedule"].steps,
        seed=adapter.settings.seed,
        index=step,
        units=1,
        sampling=adapter.settings.timesteps,
    )
    return drawn.noise[:, 0].repeat(2, 1, 1, 1), drawn.timesteps[:, 0].repeat(2)


def decoded(content: bytes) -> Tensor:
    return pictures.pixels(Image.open(io.BytesIO(content)).convert("RGB"))


def mean_errors(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).float().square().mean((1, 2, 3))
