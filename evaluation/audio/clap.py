"""CLAP (Wu et al., arXiv 2211.06687) from a folder in transformers' layout: unit embeddings of sounds and of texts.

Preparation is that of LAION's checkpoints without fusion, which Tango 2's CLAP score uses: 48 kHz, 10 s, shorter sounds
repeated whole times and filled with silence, longer ones cut to their first 10 s (LAION cuts at random). Filters are
transformers' slaney ones; LAION's own code has torchaudio's without norm, so scores are close to its and not equal.

Letters: B sounds or texts, D the width of the shared space, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ClapModel

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import fronts
from polyalign.evaluation.audio.sound import RESAMPLER, Sound, at_rate
from polyalign.evaluation.network_judge import pretrained
from polyalign.evaluation.text_judges.folders import read_tokenizer

LONGEST_TEXT = 77
"""Tokens of a caption that LAION's CLAP reads; longer ones are cut, as published."""


@dataclass(frozen=True)
class Preparation:
    """What ``preprocessor_config.json`` says of the front end."""

    rate: int = 48_000
    seconds: int = 10
    window: int = 1024
    hop: int = 480
    mels: int = 64
    low: float = 50.0
    high: float = 14_000.0
    padding: str = "repeatpad"

    @property
    def length(self) -> int:
        return self.rate * self.seconds

    def fitted(self, sound: Sound) -> np.ndarray:
        """(length,) samples: resampled, cut after the first ten seconds, or repeated and filled."""
        samples = at_rate(sound, self.rate)[: self.length]
        if self.padding != "pad" and len(samples) < self.length:
            samples = np.tile(samples, self.length // len(samples) + (self.padding == "repeat"))[: self.length]
        return np.pad(samples, (0, self.length - len(samples)))

    def __call__(self, sounds: Sequence[Sound], device: torch.device) -> Tensor:
        """(B, 1, T, M) decibels."""
        samples = torch.from_numpy(np.stack([self.fitted(sound) for sound in sounds])).to(device)
        mel = fronts.filters(self.window // 2 + 1, self.mels, self.low, self.high, self.rate, "slaney").to(device)
        return fronts.decibels(fronts.power(samples, self.window, self.hop) @ mel)[:, None]

    def __str__(self) -> str:
        return (
            f"{self.rate} Hz by {RESAMPLER}, first {self.seconds} s, {self.padding}, {self.mels} slaney mel bins "
            f"{self.low:g} to {self.high:g} Hz, window {self.window}, hop {self.hop}, decibels"
        )


def preparation(folder: Path) -> Preparation:
    """Of a folder's ``preprocessor_config.json``.

    Raises:
        UserError: the file is absent, or asks for fusion, which mixes random crops.
    """
    path = folder / "preprocessor_config.json"
    said = files.settings(path)
    found = Preparation(
        rate=int(said.get("sampling_rate", 48_000)),
        seconds=int(said.get("max_length_s", 10)),
        window=int(said.get("fft_window_size", 1024)),
        hop=int(said.get("hop_length", 480)),
        mels=int(said.get("feature_size", 64)),
        low=float(said.get("frequency_min", 0)),
        high=float(said.get("frequency_max", 14_000)),
        padding=str(said.get("padding", "repeatpad")),
    )
    truncation = said.get("truncation", "fusion")
    if truncation != "rand_trunc" or found.padding not in ("repeatpad", "repeat", "pad"):
        raise UserError(
            f"{path} has truncation {truncation!r} and padding {found.padding!r}; a CLAP without fusion is needed "
            "(truncation rand_trunc; padding repeatpad, repeat or pad), such as clap-htsat-unfused"
        )
    return found


@dataclass(frozen=True)
class Clap:
    """Two towers and what goes before them."""

    model: Any
    tokenizer: Any
    prepare: Preparation
    device: torch.device
    dtype: torch.dtype

    def sounds(self, sounds: Sequence[Sound]) -> Tensor:
        """(B, D) float32 of unit length."""
        values = self.prepare(sounds, self.device).to(self.dtype)
        return _unit(self.model.get_audio_features(input_features=values))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, D) float32 of unit length."""
        longest = min(LONGEST_TEXT, self.model.config.text_config.max_position_embeddings - 2)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        return _unit(self.model.get_text_features(input_ids=ids, attention_mask=mask))

    def cosine(self, texts: Sequence[str], sounds: Sequence[Sound]) -> Tensor:
        """(B,) cosine of each sound with its own text."""
        return (self.sounds(sounds) * self.texts(texts)).sum(-1)


def _unit(found: Any) -> Tensor:
    embedding = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(embedding.float(), dim=-1)


def read(folder: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Clap:
    """The CLAP of a folder.

    Raises:
        UserError: something of it is absent or unreadable, or it is one with fusion.
    """
    prepare = preparation(folder)
    model = pretrained(ClapModel, folder).eval().requires_grad_(False)
    if model.config.audio_config.enable_fusion:
        raise UserError(f"{folder} is a CLAP with fusion, which mixes random crops; take one without (clap-htsat-unfused)")
    return Clap(model.to(device=device, dtype=dtype), read_tokenizer(folder), prepare, device, dtype)
