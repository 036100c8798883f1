"""An AudioSet tagger: the Audio Spectrogram Transformer (Gong et al., arXiv 2104.01778) from a folder in transformers' layout,
and the labels that an event's phrase means.

Letters: B sounds, C classes, D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ASTForAudioClassification

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import fronts
from polyalign.evaluation.audio.sound import RESAMPLER, Sound, at_rate
from polyalign.evaluation.network_judge import pretrained

FILLERS = frozenset(
    "a an the and or of in on with to by is are as at from someone something some sound sounds sounding noise noises one "
    "several large small loud distant nearby".split()
)


@dataclass(frozen=True)
class Tagger:
    """A network with names for its classes."""

    model: Any
    labels: tuple[str, ...]
    rate: int
    frames: int
    mels: int
    mean: float
    deviation: float
    device: torch.device

    @property
    def preprocessing(self) -> str:
        return (
            f"{self.rate} Hz by {RESAMPLER}, {self.mels} Kaldi filter banks, {self.frames} frames of 10 ms, "
            f"less {self.mean:g}, over {2 * self.deviation:g}"
        )

    def inputs(self, sounds: Sequence[Sound]) -> Tensor:
        """(B, frames, mels): cut or filled with zeros after the end, then brought to the training data's scale."""
        made = torch.zeros(len(sounds), self.frames, self.mels)
        for row, sound in zip(made, sounds, strict=True):
            samples = torch.from_numpy(at_rate(sound, self.rate))
            samples = torch.nn.functional.pad(samples, (0, max(0, 400 - len(samples))))
            mel = fronts.kaldi(samples[None], self.mels, self.rate)[0, : self.frames]
            row[: len(mel)] = mel
        return (made - self.mean) / (2 * self.deviation)

    def __call__(self, sounds: Sequence[Sound]) -> tuple[Tensor, Tensor]:
        """Features (B, D), what the classifier sees, and logits (B, C)."""
        model = self.model
        pooled = model.audio_spectrogram_transformer(self.inputs(sounds).to(self.device)).pooler_output
        return pooled.float(), model.classifier(pooled).float()


def read(folder: Path, *, device: torch.device) -> Tagger:
    """The tagger of a folder.

    Raises:
        UserError: something of it is absent or unreadable.
    """
    said = files.settings(folder / "preprocessor_config.json")
    model = pretrained(ASTForAudioClassification, folder).eval().requires_grad_(False).to(device)
    return Tagger(
        model=model,
        labels=tuple(model.config.id2label[place] for place in range(model.config.num_labels)),
        rate=int(said.get("sampling_rate", 16_000)),
        frames=int(said.get("max_length", model.config.max_length)),
        mels=int(said.get("num_mel_bins", model.config.num_mel_bins)),
        mean=float(said.get("mean", -4.2677393)),
        deviation=float(said.get("std", 4.5689974)),
        device=device,
    )


def labels_of(phrase: str, labels: Sequence[str], given: Mapping[str, Sequence[str]]) -> list[int]:
    """Places of the labels that a phrase means: those ``given`` for it, else those that share most words with it.

    Words are compared without their endings (bark, barks, barking), and words that say no event are left out. A label of
    several names ("Thump, thud") counts by its best one: shared words over all words, so that "Dog" wins over "Hot dog".

    Returns:
        All labels of the best share; empty if none shares a word.

    Raises:
        UserError: a label given for the phrase is none of the tagger's.
    """
    if phrase in given:
        strange = [label for label in given[phrase] if label not in labels]
        if strange:
            raise UserError(f"labels for {phrase!r}: the tagger has no label {strange[0]!r}")
        return [labels.index(label) for label in given[phrase]]
    asked = _stems(phrase)
    shares = np.array([max(_share(_stems(name), asked) for name in label.split(",")) for label in labels])
    best = float(shares.max(initial=0.0))
    return [] if best == 0 else [int(place) for place in np.flatnonzero(shares >= best - 1e-9)]


def _share(name: frozenset[str], asked: frozenset[str]) -> float:
    return len(name & asked) / len(name | asked) if name else 0.0


def _stems(words: str) -> frozenset[str]:
    found = re.findall(r"[a-z]+", words.lower())
    return frozenset(_stem(word) for word in found if word not in FILLERS)


def _stem(word: str) -> str:
    for ending in ("ing", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":  # humming, hum
        word = word[:-1]
    return word.removesuffix("e")
