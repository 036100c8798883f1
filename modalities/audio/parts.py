"""What a text-to-audio model is made of, whatever its family: the contract between the families, the adapter and the sampler.

Letters: N rows of one forward pass, L text tokens, D text width; a latent is (C, ...) of its codec's shape: (C, frames, mel
bins) for a UNet on mel latents, (C, frames) for a 1-D transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from polyalign.core.likelihood.schedules import NoiseSchedule, PredictionType
from polyalign.datasets.audio.waves import Wave


class Told(NamedTuple):
    """What the denoiser is told about the text: ``states`` (N, L, D), ``mask`` (N, L) bool, true where a token counts, and
    ``extra`` (N, M, E), what a family needs besides (Stable Audio's duration, AudioLDM2's second encoder); None elsewhere."""

    states: Tensor
    mask: Tensor
    extra: Tensor | None = None


class TextEncoder(Protocol):
    """Prompts to what the denoiser is told. Frozen; called without gradients."""

    def encode(self, prompts: Sequence[str], *, seconds: float, tokens: int | None = None) -> Told:
        """States of prompts; ``seconds`` is the clip's length, which most families are not told. With ``tokens`` a text is cut
        or padded to that many, if they can be chosen."""
        ...

    def unconditional(self, *, seconds: float, tokens: int | None = None) -> Told:
        """One row: what the family is told in the place of a prompt for guidance when there is no negative prompt."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move what it computes with."""
        ...


class Codec(Protocol):
    """Sound to latents and back. ``rate`` in hertz; ``seconds``, the length of the clips that are trained on."""

    @property
    def rate(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    def latent_shape(self, seconds: float) -> tuple[int, ...]:
        """Shape of one latent of a clip of this length (which the codec rounds to what it can hold).

        Raises:
            UserError: a length that the codec or the denoiser cannot do.
        """
        ...

    def moments(self, waves: Sequence[Wave]) -> Tensor:
        """What of clips is kept in the cache, (N, ...): the posterior's moments, or the latents themselves where the codec is
        no distribution. Clips are resampled, cut and padded to ``seconds``."""
        ...

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents (N, C, ...) as the denoiser sees them (scaled); without a generator the posterior's mode."""
        ...

    def decode(self, latents: Tensor) -> list[Wave]:
        """Sound of latents; samples stay in [-1, 1]."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move what it computes with."""
        ...


Predict = Callable[[nn.Module, Tensor, Tensor, Told], Tensor]
"""``predict(denoiser, noisy (N, C, ...), timesteps (N,), told) -> (N, C, ...)``: one forward pass of a family."""


@dataclass(frozen=True)
class Parts:
    """An opened model.

    Attributes:
        family: its name in :mod:`polyalign.modalities.audio.families`.
        denoiser: the network that preferences train.
        predict: how the denoiser is called. It is given the denoiser, since that may be wrapped or be a frozen copy.
        text, codec: the frozen rest.
        scheduler_config: of diffusers, with ``_class_name``, embedded in the model's folder or in the family.
        schedule: noise levels of training. prediction_type: what the denoiser predicts.
        targets: names of the layers that a LoRA is put on.
        matched: what stands in the place of a prompt is brought to the prompt's number of tokens, since the family's states
            depend on it even where the mask leaves tokens out (AudioLDM2).
        write: ``write(denoiser, folder)`` saves the whole model in the family's own layout, which opens again.
        card: Python that opens an export without this package; THIS_FOLDER stands for the place.
    """

    family: str
    denoiser: nn.Module
    predict: Predict
    text: TextEncoder
    codec: Codec
    scheduler_config: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction_type: PredictionType
    targets: tuple[str, ...]
    write: Callable[[nn.Module, Path], None]
    card: str = ""
    matched: bool = False
