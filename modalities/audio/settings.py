"""What a text-to-audio model is, and how it is prepared, scored, sampled and trained: the record a recipe is mapped onto."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import TimestepSampling

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FamilyName = Literal["tiny", "tango", "audioldm2", "stable_audio"]
Solver = Literal["ddim", "dpmpp", "ddpm", "euler"]


@dataclass(frozen=True)
class AudioModelSettings:
    """Settings of a text-to-audio model.

    Which model:
        base: ``tiny`` (the embedded base), a folder in Tango's own layout, a diffusers folder (AudioLDM2, Stable Audio), or a
            hub id of either.
        family: ``tiny``, ``tango``, ``audioldm2`` or ``stable_audio``; None detects it. A wrong one is refused.
        checkpoint: a file, or a training folder of accelerate, with Tango's ``unet.*`` and ``text_encoder.*`` tensors, in the
            place of the base's ``pytorch_model_main.bin``.
        tokenizer: folder or hub id of FLAN-T5's tokenizer, which Tango's files lack; None looks for ``tokenizer/`` in the base
            and then for the hub id that the base names.
        revision: of a hub repository.
        dtype: of the frozen denoiser; with ``train="full"`` it is float32 and the forward pass is cast. The codec and the text
            encoder stay in float32.
        device: ``auto`` is this process's GPU if there is one, else the CPU.
    Training:
        train: ``lora`` or ``full``; alpha None is rank; targets None is the family's attention projections.
    Preparation (each random choice keyed by pair and step, the same for both clips of a pair):
        seconds: length of the clips that are trained on and sampled; None is the model's own (Tango 10.24, its 1024 frames).
        resampler: a name of :data:`polyalign.datasets.audio.waves.RESAMPLERS`.
        caption_dropout: share of pairs whose caption becomes what the family is told without one. Tango's ``--uncondition``
            instead puts zeros in the place of winners' states alone, a mistake of its code.
        posterior: sample the VAE's posterior, as published, or take its mode.
        cache_folder, cache_bytes: latents and text states are kept in memory up to this size, and on disk if a folder is given.
    Scoring:
        weighting, gamma, timesteps_per_pair, timesteps: see :mod:`polyalign.core.likelihood`.
    Sampling (a condition may say ``steps``, ``seconds``, ``guidance`` and ``negative_prompt`` of its own):
        solver: ``ddim``, ``dpmpp`` (DPM-Solver++, second order) or ``ddpm`` (as published, 200 steps); ``euler`` for flow
            models. None is ddim, or euler for a flow model.
        guidance: u + guidance (c - u); published 3 (Tango), 4.5 (TangoFlux). At 1 there is no second branch.
        codec_batch: clips decoded at once.
        pad_batches: fill batches up, so that every clip is computed in a batch of the same size and its samples do not depend
            on the others.
    """

    base: str = "tiny"
    family: FamilyName | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"

    train: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False

    seconds: float | None = None
    resampler: str = "scipy.resample_poly"
    caption_dropout: float = 0.0
    posterior: Literal["sample", "mode"] = "sample"
    cache_folder: Path | None = None
    cache_bytes: int = 2 * 2**30

    weighting: Literal["constant", "elbo", "snr", "min_snr"] = "constant"
    gamma: float = 5.0
    timesteps_per_pair: int = 1
    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    keep_residual: bool = False

    guidance: float = 3.0
    sampling_steps: int = 50
    solver: Solver | None = None
    negative_prompt: str | None = None
    sample_batch: int = 8
    codec_batch: int = 8
    pad_batches: bool = True

    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "timesteps_per_pair", "sampling_steps", "sample_batch", "codec_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.seconds is not None and not 0.0 < self.seconds <= 600.0:
            raise UserError(f"seconds is {self.seconds}; allowed: more than 0, at most 600")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"caption_dropout is {self.caption_dropout}; allowed: a share from 0 to 1")

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the denoiser's frozen weights: full training keeps float32 masters."""
        return torch.float32 if self.train == "full" else DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)
