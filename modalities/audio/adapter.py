"""The audio adapter: Tango and its kin, AudioLDM2, Stable Audio and the embedded base. What differs between them is in
:mod:`polyalign.modalities.audio.families`; the likelihood is the core's.

Letters: G pairs, 2 candidates (chosen first), C ... latents, L text tokens, D text width, U noise levels a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import Draws, denoising_scores, draw, rows_of
from polyalign.core.randomness import rng
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.datasets.audio.waves import Wave, fingerprint
from polyalign.modalities import injected_lora
from polyalign.modalities.audio import clips, export, loading, sampling
from polyalign.modalities.audio.families import FAMILIES
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.audio.parts import Told
from polyalign.modalities.audio.settings import AudioModelSettings
from polyalign.modalities.content_cache import ContentCache

COLUMNS = ("chosen", "rejected")
LABELLED = ("audio",)
"""The one candidate of a row that has a label in the place of a pair."""


class AudioAdapter:
    """The contract of :mod:`polyalign.core.adapter` for text-to-audio models. Holds settings and a cache, no model."""

    def __init__(self, settings: AudioModelSettings):
        self.settings = settings
        self.cache = ContentCache(settings.cache_folder, settings.cache_bytes)

    def load(self) -> Model:
        model = loading.load(self.settings)
        if self.settings.seconds is not None:
            parts_of(model).codec.latent_shape(self.settings.seconds)  # refuse a wrong length before any work
        return model

    def trainable(self, model: Model, *, fresh: bool = True) -> Model:
        """The model with a fresh LoRA (or, not ``fresh``, the one that it came with), or with all of its denoiser, to be
        trained."""
        network: Any = model.network
        if self.settings.train == "lora" and fresh:
            injected_lora.add(
                network,
                rank=self.settings.rank,
                alpha=self.settings.scale,
                targets=self.settings.targets or parts_of(model).targets,
                seed=self.settings.seed,
            )
        elif self.settings.train == "full":
            network.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        return model

    def load_lora(self, model: Model, file: Path, *, name: str = injected_lora.NAME) -> Model:
        """The model with the LoRA of the folder ``file`` (or of one of its files) on its denoiser; under another ``name`` it is
        a second one beside the trained one, for a named-adapter reference."""
        place = Path(file)
        injected_lora.load(model.network, place.parent if place.is_file() else place, name)
        return model

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        """Pair-store rows as tensors: ``latents`` (G, 2, C, ...), ``text`` (G, L, D), ``text_mask`` (G, L), and ``text_extra``
        (G, M, E) for families that have it.

        A row may also have ``target``, ``margins`` (one number a candidate) and ``weight``. A row with ``audio`` and ``label``
        is a single clip that is liked or not, and has one candidate instead of two.

        Raises:
            UserError: a missing caption or a damaged clip, with the pair's id and the column.
        """
        pairs = [torch.stack([self._latent(model, row, column, step) for column in _columns(row)]) for row in rows]
        told = sampling.stack([self._caption(model, row, step) for row in rows])
        tensors = {"latents": torch.stack(pairs), "text": told.states, "text_mask": told.mask}
        if told.extra is not None:
            tensors["text_extra"] = told.extra
        return Batch.of_groups([_group(row) for row in rows], tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> Draws:
        """Noise levels and noise of a batch, keyed by pair and step."""
        return draw(
            batch.group_ids,
            batch.tensors["latents"].shape[2:],
            steps=parts_of(model).schedule.steps,
            seed=self.settings.seed,
            index=step,
            units=self.settings.timesteps_per_pair,
            sampling=self.settings.timesteps,
        )

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        """Minus the denoising error of every candidate: one forward pass over all of them."""
        device = next(model.network.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        units, parts = draws.timesteps.shape[1], parts_of(model)
        rows = {
            name: rows_of(tensor, tensors["latents"].shape[1], units, per_candidate=False)
            for name, tensor in tensors.items()
            if name != "latents"
        }
        told = Told(rows["text"], rows["text_mask"], rows.get("text_extra"))

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return sampling.answer(model, self.settings, noisy, timesteps, told)

        return denoising_scores(
            predict,
            tensors["latents"],
            draws,
            parts.schedule,
            prediction_type=parts.prediction_type,
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
    ) -> list[Wave]:
        """One clip for each (condition, seed). A condition is a prompt, or a mapping with ``prompt`` and, if wanted, ``steps``,
        ``seconds``, ``guidance`` and ``negative_prompt`` of its own.

        Raises:
            UserError: not as many seeds as conditions, a condition without a prompt, or a length that the model cannot do.
        """
        if len(conditions) != len(seeds):
            raise UserError(f"{len(conditions)} conditions and {len(seeds)} seeds: sampling needs one seed for each clip")
        jobs = [
            self._job(model, place, condition, seed)
            for place, (condition, seed) in enumerate(zip(conditions, seeds, strict=True))
        ]
        return sampling.sample(model, self.settings, jobs, progress=progress)

    def sample_base(
        self,
        model: Model,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Wave]:
        """As ``sample``, from the base under the LoRA.

        Raises:
            UserError: all of the denoiser was trained, so the base is no longer inside it.
        """
        if self.settings.train == "full":
            raise UserError("all of the denoiser was trained: load the base anew to sample from it")
        with adapters_off(model.network):
            return self.sample(model, conditions, seeds, progress=progress)

    def export(self, model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
        export.export(model, Path(folder), card)

    def _job(self, model: Model, place: int, condition: Any, seed: int) -> sampling.Job:
        said = clips.Said.of(condition, self.settings, where=f"condition {place}")
        seconds = parts_of(model).codec.seconds if said.seconds is None else said.seconds
        told = self._encoded(model, said.prompt, seconds)
        empty = self._against(model, told, said.negative, seconds) if said.guidance > 1.0 else None
        return sampling.Job(place, int(seed), told, empty, said.steps, seconds, said.guidance)

    def _latent(self, model: Model, row: Row, column: str, step: int) -> Tensor:
        """Latents (C, ...) of one clip."""
        settings, parts, pair_id = self.settings, parts_of(model), str(row["pair_id"])
        where = f"pair {pair_id}, column {column}"
        content = clips.content_of(row.get(column), where=where)
        mono = FAMILIES[parts.family].mono

        def make() -> dict[str, Tensor]:
            return {"moments": parts.codec.moments([clips.decode(content, mono=mono, where=where)])[0]}

        keys = ("codec", model.identity, f"{parts.codec.seconds}", mono, settings.resampler, fingerprint(content))
        moments = self.cache.get(keys, make)["moments"].unsqueeze(0)
        drawn = settings.posterior == "sample"
        return parts.codec.draw(moments, rng(settings.seed, "posterior", pair_id, column, step) if drawn else None)[0]

    def _caption(self, model: Model, row: Row, step: int) -> Told:
        pair_id, seconds = str(row["pair_id"]), parts_of(model).codec.seconds
        caption = clips.caption_of(row.get("condition"), where=f"pair {pair_id}")
        told = self._encoded(model, caption, seconds)
        if clips.dropped(pair_id, step, seed=self.settings.seed, share=self.settings.caption_dropout):
            return self._against(model, told, None, seconds)
        return told

    def _encoded(self, model: Model, prompt: str, seconds: float, tokens: int | None = None) -> Told:
        encode = parts_of(model).text.encode
        keys = ("text", model.identity, f"{seconds}", f"{tokens}", prompt)
        return self._told(keys, lambda: encode([prompt], seconds=seconds, tokens=tokens))

    def _against(self, model: Model, told: Told, negative: str | None, seconds: float) -> Told:
        """What guidance leads away from: the negative prompt, or what the family is told without one."""
        parts = parts_of(model)
        tokens = told.states.shape[1] if parts.matched else None
        if negative is not None:
            return self._encoded(model, negative, seconds, tokens)
        keys = ("empty", model.identity, f"{seconds}", f"{tokens}")
        return self._told(keys, lambda: parts.text.unconditional(seconds=seconds, tokens=tokens))

    def _told(self, keys: tuple[str, ...], make: Callable[[], Told]) -> Told:
        """Text states, float32 on the CPU, made once; each prompt is encoded alone, so that they do not depend on others."""

        def entry() -> dict[str, Tensor]:
            found = make()
            states = {"states": found.states.float(), "mask": found.mask}
            return states if found.extra is None else {**states, "extra": found.extra.float()}

        kept = self.cache.get(keys, entry)
        return Told(kept["states"], kept["mask"], kept.get("extra"))


def _group(row: Row) -> Group:
    """The preference side of a row."""
    given = {name: row[name] for name in ("target", "margins", "weight") if row.get(name) is not None}
    columns = _columns(row)
    candidates = tuple(Candidate(row["condition"], None) for _ in columns)
    if columns == LABELLED:
        given = {"target": (1.0,), "desirable": (bool(row["label"]),)} | given
    return Group(str(row["pair_id"]), candidates, **given)


def _columns(row: Row) -> tuple[str, ...]:
    return LABELLED if row.get("audio") is not None else COLUMNS
