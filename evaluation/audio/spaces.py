"""Networks that hear sounds as vectors, by name: the spaces in which sets of sounds are compared.

As with pictures there is no default: a space says the network's name and hash, what is taken of it, the preprocessing and the
resampler, and :meth:`SoundSpace.as_json` goes beside every figure. Letters: N sounds, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.progress import ProgressLine
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import cnn14, tagger, vggish
from polyalign.evaluation.audio.sound import RESAMPLER, Sound, at_rate, read_sound
from polyalign.evaluation.network_judge import device_of

LEAST_SECONDS = 2.0
"""Shorter sounds are continued with silence before VGGish and CNN14 hear them, as audioldm_eval does for both."""


@dataclass(frozen=True)
class Heard:
    """What a network made of one sound: ``features`` (rows, D), several rows where it hears patches, and the ``logits`` (C,) of
    its classes, None where it has none."""

    features: np.ndarray
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class SoundSpace:
    """``hear`` takes some sounds; the rest says what that was made with."""

    kind: str
    network: str
    """Name of the network and hash of its weights."""
    features: str
    preprocessing: str
    hear: Callable[[Sequence[Sound]], list[Heard]]
    texts: Callable[[Sequence[str]], Tensor] | None = None
    """Unit embeddings of texts in the same space, where it has them."""

    def as_json(self) -> dict[str, str]:
        """What belongs beside every figure of this space."""
        told = {name: getattr(self, name) for name in ("kind", "network", "features", "preprocessing")}
        return {**told, "resampler": RESAMPLER}

    def of_files(self, paths: Sequence[Path], *, batch_size: int = 8) -> list[Heard]:
        """What is heard in each file; files are read a batch at a time.

        Raises:
            UserError: a file that cannot be read, or a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; a whole number from 1 is needed")
        heard: list[Heard] = []
        with torch.inference_mode(), ProgressLine("features of sounds", total=len(paths)) as line:
            for start in range(0, len(paths), batch_size):
                part = [read_sound(path) for path in paths[start : start + batch_size]]
                heard += self.hear(part)
                line.advance(count=len(part))
        return heard


def _prepared(sound: Sound, rate: int, least: int = 0) -> Tensor:
    """(n,) samples at ``rate``, less their mean, continued with silence to two seconds and to ``least`` samples."""
    wave = torch.from_numpy(at_rate(sound, rate))
    least = max(round(LEAST_SECONDS * rate), least)
    return torch.nn.functional.pad(wave - wave.mean(), (0, max(0, least - len(wave))))


def _vggish(model: str, device: torch.device) -> SoundSpace:
    path = files.file(model, "features vggish: the model", published="vggish-10086976.pth")
    network = vggish.read(path).to(device)

    def hear(sounds: Sequence[Sound]) -> list[Heard]:
        waves = (_prepared(sound, vggish.RATE).to(device) for sound in sounds)
        return [Heard(_numpy(network(vggish.patches(wave)))) for wave in waves]

    return SoundSpace(
        "vggish",
        files.identity(model, [path]),
        "one vector for every 0.96 s, before the last ReLU, without PCA",
        f"{vggish.RATE} Hz by {RESAMPLER}, mean of channels, less its mean, at least {LEAST_SECONDS:g} s, "
        "log of 64 mel bins 125 to 7500 Hz",
        hear,
    )


def _cnn14(model: str, device: torch.device) -> SoundSpace:
    path = files.file(model, "features cnn14: the model")
    network = cnn14.read(path).to(device)
    front = network.front

    def hear(sounds: Sequence[Sound]) -> list[Heard]:
        waves = [_prepared(sound, front.rate, network.least).to(device) for sound in sounds]
        together = [torch.stack(waves)] if len({len(wave) for wave in waves}) == 1 else [wave[None] for wave in waves]
        found = [network(part) for part in together]
        features, logits = (_numpy(torch.cat(column)) for column in zip(*found, strict=True))
        return [Heard(row[None], tags) for row, tags in zip(features, logits, strict=True)]

    return SoundSpace(
        "cnn14",
        files.identity(model, [path]),
        f"one vector a sound, {network.fc1.out_features} numbers before the classifier of {network.fc_audioset.out_features}",
        f"{front.rate} Hz by {RESAMPLER}, mean of channels, less its mean, at least {LEAST_SECONDS:g} s, "
        f"window {front.window}, hop {front.hop}, 64 mel bins {front.low:g} to {front.high:g} Hz of the file, decibels",
        hear,
    )


def _ast(model: str, device: torch.device) -> SoundSpace:
    folder = files.folder(model, "features ast: the model", weights=True)
    network = tagger.read(folder, device=device)

    def hear(sounds: Sequence[Sound]) -> list[Heard]:
        features, logits = (_numpy(one) for one in network(sounds))
        return [Heard(row[None], tags) for row, tags in zip(features, logits, strict=True)]

    return SoundSpace(
        "ast",
        files.identity(model, files.weight_files(folder)),
        f"pooled output, before the classifier of {len(network.labels)}",
        network.preprocessing,
        hear,
    )


def _clap(model: str, device: torch.device) -> SoundSpace:
    from polyalign.evaluation.audio import clap

    folder = files.folder(model, "features clap: the model", weights=True)
    opened = clap.read(folder, device=device)
    return SoundSpace(
        "clap",
        files.identity(model, files.weight_files(folder)),
        "unit embedding of the whole sound",
        str(opened.prepare),
        lambda sounds: [Heard(row[None]) for row in _numpy(opened.sounds(sounds))],
        texts=opened.texts,
    )


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy().astype(np.float64)


SPACES: Mapping[str, Callable[[str, torch.device], SoundSpace]] = {
    "vggish": _vggish,
    "cnn14": _cnn14,
    "ast": _ast,
    "clap": _clap,
}
"""From a kind of network to what opens it."""


def open_space(kind: str, model: str, *, device: str = "auto") -> SoundSpace:
    """The space of a kind.

    Args:
        kind: a name of :data:`SPACES`.
        model: ``vggish``: torchvggish's file; ``cnn14``: a file of PANNs (at 16, 32 or 8 kHz, which stands in it); ``ast`` and
            ``clap``: a folder or hub id in transformers' layout.

    Raises:
        UserError: another kind, or weights that cannot be read.
    """
    if kind not in SPACES:
        raise UserError(f"there is no feature space {kind!r} for sounds; allowed: {', '.join(SPACES)}")
    return SPACES[kind](model, device_of(kind, device))
