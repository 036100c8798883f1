"""What an image model is, and how it is prepared, scored, sampled and trained: the record a recipe is mapped onto."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from polyalign.core.errors import UserError
from polyalign.core.likelihood.denoising import TimestepSampling

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FamilyName = Literal["sd", "sdxl", "sd3", "flux"]


@dataclass(frozen=True)
class ImageModelSettings:
    """Settings of an image model.

    Which model:
        base: ``tiny`` (the embedded base), a hub id, a diffusers folder, or a single-file checkpoint.
        family: ``sd`` (Stable Diffusion 1.x and 2.x), ``sdxl``, ``sd3`` (and 3.5) or ``flux`` (FLUX.1); None detects it. A
            wrong one is refused.
        network: a trained network published alone, ``unet/`` or ``transformer/`` in a folder or hub repository, which takes the
            place of the base's; None is the base's own.
        prediction_type: None takes the base's own. A wrong one is refused, except for a single file, which may not say.
        revision, variant: of a hub repository ("fp16" files).
        single_file_config: folder or hub id with the configs and tokenizers that a single file lacks; None lets diffusers
            choose a hub repository.
        use_t5: False leaves SD3's third text encoder (4.7 billion parameters) out; the model was trained to do without.
        text_tokens: T5's; None is as in diffusers' pipelines (SD3 256, FLUX 512; FLUX.1-schnell was made for 256).
        guidance_vector: the guidance scale that a guidance-distilled network (FLUX.1-dev) is told in training; None is 1.
        dtype: of the frozen weights; with ``train="full"`` the network is float32 and the forward pass is cast.
        vae_dtype: ``auto`` is float32 where the VAE's config says ``force_upcast`` (SDXL's gives NaN in float16), else
        ``dtype``. device: ``auto`` is this process's GPU if there is one, else the CPU.
    Training:
        train: ``lora`` or ``full``; alpha None is rank, as in the published Diffusion-DPO LoRA script; targets None is the
            family's attention projections.
        attention: ``sdpa``, or ``xformers`` (needs CUDA and the extra).
    Preparation (each random choice keyed by pair and step, the same for both pictures of a pair):
        resolution: pixels; None is the base's own size.
        crop, flip: centre or random crop; flip half of the pairs.
        caption_dropout: share of pairs whose caption becomes empty. Published 0.2 (Salesforce), absent in the diffusers
        scripts. posterior: sample the VAE's posterior, as published, or take its mode.
        cache_folder, cache_bytes: latents and text states are kept in memory up to this size, and on disk if a folder is given.
    Scoring:
        weighting, gamma, timesteps_per_pair, timesteps: see :mod:`polyalign.core.likelihood`.
    Sampling:
        sampler: a scheduler; ``base`` is the model's own. vae_batch pictures are decoded at once.
        pad_batches: fill the last batch up, so that every picture is computed in a batch of the same size and its bytes do not
            depend on the others.
    """

    base: str = "tiny"
    family: FamilyName | None = None
    network: str | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    use_t5: bool = True
    text_tokens: int | None = None
    guidance_vector: float | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"

    train: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"

    resolution: int | None = None
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    caption_dropout: float = 0.0
    posterior: Literal["sample", "mode"] = "sample"
    cache_folder: Path | None = None
    cache_bytes: int = 2 * 2**30

    weighting: Literal["constant", "elbo", "snr", "min_snr"] = "constant"
    gamma: float = 5.0
    timesteps_per_pair: int = 1
    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    keep_residual: bool = False

    guidance: float = 7.5
    sampling_steps: int = 50
    sampler: Literal["base", "ddim", "dpmsolver++", "euler"] = "ddim"
    negative_prompt: str | None = None
    sample_batch: int = 4
    vae_batch: int = 4
    pad_batches: bool = True

    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "timesteps_per_pair", "sampling_steps", "sample_batch", "vae_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.text_tokens is not None and not 1 <= self.text_tokens <= 512:
            raise UserError(f"text_tokens is {self.text_tokens}; allowed: 1 to 512")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"caption_dropout is {self.caption_dropout}; allowed: a share from 0 to 1 (published: 0.2)")

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the network's frozen weights and of the text states: full training keeps float32 masters."""
        return torch.float32 if self.train == "full" else DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)
