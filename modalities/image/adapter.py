"""The image adapter: Stable Diffusion 1.x and 2.x (epsilon and v), SDXL, SD3 / SD3.5 and FLUX.1 (flow), through diffusers. What
differs between them is in :mod:`polyalign.modalities.image.families`.

Letters: G pairs, 2 candidates (chosen first), C h w latents, S text tokens, D text width, P pooled width, U noise levels a
pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import Draws, denoising_scores, draw, rows_of
from polyalign.core.randomness import rng
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.content_cache import ContentCache
from polyalign.modalities.image import export, latents, loading, lora, pictures, sampling, text
from polyalign.modalities.image.families import Told, family_of
from polyalign.modalities.image.micro_conditioning import time_ids
from polyalign.modalities.image.settings import ImageModelSettings

COLUMNS = ("chosen", "rejected")
LABELLED = ("image",)
"""The one candidate of a row that has a label in the place of a pair."""


class ImageAdapter:
    """The contract of :mod:`polyalign.core.adapter` for image diffusion models. Holds settings and a cache, no model."""

    def __init__(self, settings: ImageModelSettings):
        self.settings = settings
        self.cache = ContentCache(settings.cache_folder, settings.cache_bytes)

    def load(self) -> Model:
        model = loading.load(self.settings)
        loading.resolution_of(model, self.settings)  # refuse a wrong size before any work
        return model

    def trainable(self, model: Model) -> Model:
        """The model with a fresh LoRA, or with all of its network, to be trained."""
        network: Any = model.network
        if self.settings.train == "lora":
            lora.add(network, self.settings, self.settings.targets or family_of(model).targets)
        else:
            network.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        return model

    def load_lora(self, model: Model, file: Path, *, name: str = lora.NAME) -> Model:
        """The model with the LoRA of ``file`` (or of the folder that holds it) on its network; under another ``name`` it is a
        second one beside the trained one, for a named-adapter reference."""
        lora.load(loading.assemble(model), Path(file), name)
        return model

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        """Pair-store rows as tensors: ``latents`` (G, 2, C, h, w), ``text`` (G, S, D), except for SD 1.x and 2.x ``pooled``
        (G, P), and for SDXL ``time_ids`` (G, 2, 6).

        A row may also have ``target``, ``margins`` (one number a candidate) and ``weight``. A row with ``image`` and ``label``
        is a single picture that is liked or not, and has one candidate instead of two.

        Raises:
            UserError: a missing caption or a damaged picture, with the pair's id and the column.
        """
        resolution = loading.resolution_of(model, self.settings)
        pairs = [[self._candidate(model, row, column, resolution, step) for column in _columns(row)] for row in rows]
        captions = [self._caption(model, row, step) for row in rows]
        tensors = {
            "latents": torch.stack([torch.stack([latent for latent, _ in pair]) for pair in pairs]),
            "text": torch.stack([caption["states"] for caption in captions]),
        }
        if "pooled" in captions[0]:
            tensors["pooled"] = torch.stack([caption["pooled"] for caption in captions])
        if family_of(model).sized:
            tensors["time_ids"] = torch.tensor([[ids for _, ids in pair] for pair in pairs])
        return Batch.of_groups([_group(row) for row in rows], tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> Draws:
        """Noise levels and noise of a batch, keyed by pair and step."""
        return draw(
            batch.group_ids,
            batch.tensors["latents"].shape[2:],
            steps=model.parts["schedule"].steps,
            seed=self.settings.seed,
            index=step,
            units=self.settings.timesteps_per_pair,
            sampling=self.settings.timesteps,
        )

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        """Minus the denoising error of every candidate: one forward pass over all of them."""
        device = next(model.network.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        units, dtype = draws.timesteps.shape[1], self.settings.weights_dtype
        rows = {
            name: rows_of(tensors[name], tensors["latents"].shape[1], units, per_candidate=name == "time_ids")
            for name in ("text", "pooled", "time_ids")
            if name in tensors
        }
        told = Told(
            rows["text"].to(dtype),
            rows["pooled"].to(dtype) if "pooled" in rows else None,
            rows.get("time_ids"),
            self._guidance_vector(model),
        )
        family = family_of(model)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            with sampling.autocast(self.settings, device):
                return family.call(model.network, noisy.to(dtype), timesteps, told)

        return denoising_scores(
            predict,
            tensors["latents"],
            draws,
            model.parts["schedule"],
            prediction_type=family.prediction_type(model.parts["scheduler"]),
            weighting=self.settings.weighting,
            gamma=self.settings.gamma,
            keep_residual=self.settings.keep_residual,
        )

    def sample(
        self,
        model: Model,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """One picture for each (condition, seed); a condition is a prompt or a mapping with ``prompt``.

        Raises:
            UserError: not as many seeds as conditions, or a condition without a prompt.
        """
        if len(conditions) != len(seeds):
            raise UserError(f"{len(conditions)} conditions and {len(seeds)} seeds: sampling needs one seed for each picture")
        prompts = [
            text.caption_of({"condition": condition}, where=f"condition {place}") for place, condition in enumerate(conditions)
        ]
        return sampling.sample(
            model,
            self.settings,
            [self._encoded(model, prompt) for prompt in prompts],
            self._empty(model, self.settings.negative_prompt),
            seeds,
            resolution=loading.resolution_of(model, self.settings),
            progress=progress,
        )

    def sample_base(
        self,
        model: Model,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """As ``sample``, from the base under the LoRA.

        Raises:
            UserError: all of the network was trained, so the base is no longer inside it.
        """
        if self.settings.train == "full":
            raise UserError("all of the network was trained: load the base anew to sample from it")
        with adapters_off(model.network):
            return self.sample(model, conditions, seeds, progress=progress)

    def export(self, model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
        export.export(model, Path(folder), card)

    def _candidate(self, model: Model, row: Row, column: str, resolution: int, step: int) -> tuple[Tensor, list[float]]:
        """Latents (C, h, w) and micro-conditioning of one picture."""
        settings, pair_id = self.settings, str(row["pair_id"])
        where = f"pair {pair_id}, column {column}"
        view = pictures.view_of(
            pair_id, step, seed=settings.seed, resolution=resolution, crop=settings.crop, flip=settings.flip
        )
        content = pictures.content_of(row.get(column), where=where)

        def make() -> dict[str, Tensor]:
            picture = pictures.decode(content, where=where)
            part, corner = pictures.cut(picture, view)
            ids = time_ids((picture.height, picture.width), corner, resolution)
            return {**latents.posterior(model, pictures.pixels(part)), "time_ids": torch.tensor(ids)}

        if settings.crop == "random":
            entry = make()  # a new cut every step: nothing to keep
        else:
            vae = model.parts["vae"]
            entry = self.cache.get(("vae", model.identity, str(vae.dtype), fingerprint(content), str(view)), make)
        latent = entry["mean"]
        if settings.posterior == "sample":
            generator = rng(settings.seed, "posterior", pair_id, column, step)
            latent = latent + entry["std"] * torch.randn(latent.shape, generator=generator)
        latent = latents.to_network(latent.unsqueeze(0), model.parts["vae"])[0]
        return latent, entry["time_ids"].tolist()

    def _caption(self, model: Model, row: Row, step: int) -> dict[str, Tensor]:
        pair_id = str(row["pair_id"])
        caption = text.caption_of(row, where=f"pair {pair_id}")
        if text.dropped(pair_id, step, seed=self.settings.seed, share=self.settings.caption_dropout):
            return self._empty(model, None)
        return self._encoded(model, caption)

    def _encoded(self, model: Model, prompt: str) -> dict[str, Tensor]:
        keys = ("text", *self._encoder(model), prompt)
        tokens = self.settings.text_tokens
        return self.cache.get(keys, lambda: text.encode(family_of(model), loading.assemble(model), prompt, tokens))

    def _empty(self, model: Model, negative: str | None) -> dict[str, Tensor]:
        keys = ("empty", *self._encoder(model), "none" if negative is None else f"text:{negative}")
        tokens = self.settings.text_tokens
        return self.cache.get(keys, lambda: text.encode_empty(family_of(model), loading.assemble(model), negative, tokens))

    def _encoder(self, model: Model) -> tuple[str, ...]:
        """What text states depend on besides the text."""
        keys = (model.identity, str(self.settings.weights_dtype))
        if not family_of(model).text_tokens:
            return keys
        return (*keys, str(self.settings.text_tokens), f"t5:{self.settings.use_t5}")

    def _guidance_vector(self, model: Model) -> float | None:
        """The guidance scale that the network is told in training; None where it knows none."""
        if not model.parts["network_config"].get("guidance_embeds", False):
            return None
        return 1.0 if self.settings.guidance_vector is None else self.settings.guidance_vector


def _group(row: Row) -> Group:
    """The preference side of a row."""
    given = {name: row[name] for name in ("target", "margins", "weight") if row.get(name) is not None}
    columns = _columns(row)
    candidates = tuple(Candidate(row["condition"], None) for _ in columns)
    if columns == LABELLED:
        given = {"target": (1.0,), "desirable": (bool(row["label"]),)} | given
    return Group(str(row["pair_id"]), candidates, **given)


def _columns(row: Row) -> tuple[str, ...]:
    return LABELLED if row.get("image") is not None else COLUMNS
