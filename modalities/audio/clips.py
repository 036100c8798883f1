"""From what a pair store or a condition holds to a sound, a caption and what is asked for a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng
from polyalign.datasets.audio import waves
from polyalign.datasets.audio.waves import Mono, Wave
from polyalign.modalities.audio.settings import AudioModelSettings

MOST_STEPS = 999


def content_of(sound: Any, *, where: str) -> bytes | Wave:
    """The sound's own content from any form a row may have: the bytes of a file, not yet decoded, if it is bytes, a path or the
    store's {bytes, path} struct; the wave if it is one.

    Raises:
        UserError: there is no sound at ``where``.
    """
    if isinstance(sound, Mapping):
        sound = sound.get("bytes") or sound.get("path")
    if isinstance(sound, str | Path):
        if not Path(sound).is_file():
            raise UserError(f"{where}: there is no file {sound}")
        sound = Path(sound).read_bytes()
    if not isinstance(sound, bytes | Wave) or sound == b"":
        raise UserError(
            f"{where}: expected a sound (bytes of a file, a path or a wave), found {type(sound).__name__}. "
            "Drop the row or give the sound."
        )
    if isinstance(sound, Wave) and not len(sound.samples):
        raise UserError(f"{where}: the sound has no samples. Drop the row or give the sound.")
    return sound


def decode(content: bytes | Wave, *, mono: Mono, where: str) -> Wave:
    """The sound as :func:`polyalign.datasets.audio.waves.decode` gives it.

    Raises:
        UserError: the file is cut short, damaged, or no sound; ``where`` names the pair and the column.
    """
    try:
        return waves.decode(content, mono=mono)
    except ValueError as error:
        raise UserError(f"{where}: {error}. Replace the file or drop the row.") from error


def caption_of(condition: Any, *, where: str) -> str:
    """The caption of a condition, which may be empty.

    Raises:
        UserError: there is none.
    """
    caption = condition.get("prompt") if isinstance(condition, Mapping) else condition
    if not isinstance(caption, str):
        raise UserError(
            f"{where}: the caption is missing (condition is {condition!r}). "
            "Every pair needs condition.prompt; an empty caption is written ''."
        )
    return caption


def dropped(pair_id: str, step: int, *, seed: int, share: float) -> bool:
    """Whether this pair's caption is dropped at this step: one draw for both candidates, keyed by pair and step."""
    return share > 0 and float(torch.rand((), generator=rng(seed, "caption", pair_id, step), dtype=torch.float64)) < share


@dataclass(frozen=True)
class Said:
    """What a condition asks for, with the settings' answers where it is silent; ``seconds`` None is the model's own."""

    prompt: str
    steps: int
    seconds: float | None
    guidance: float
    negative: str | None

    @classmethod
    def of(cls, condition: Any, settings: AudioModelSettings, *, where: str) -> Said:
        """Raises UserError for a missing prompt, what is no number or out of range, and a negative prompt that nothing uses."""
        prompt = caption_of(condition, where=where)
        given: Mapping[str, Any] = condition if isinstance(condition, Mapping) else {}
        steps = given.get("steps", settings.sampling_steps)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise UserError(f"{where}: steps is {steps!r}; allowed: a whole number from 1 to {MOST_STEPS}")
        seconds = given.get("seconds", settings.seconds)
        if seconds is not None and not (_number(seconds) and 0.0 < seconds <= 600.0):
            raise UserError(f"{where}: seconds is {seconds!r}; allowed: more than 0, at most 600")
        guidance, negative = given.get("guidance", settings.guidance), given.get("negative_prompt", settings.negative_prompt)
        if not (_number(guidance) and 1.0 <= guidance < math.inf):
            raise UserError(f"{where}: guidance is {guidance!r}; allowed: a number from 1 (no guidance)")
        if negative is not None and not isinstance(negative, str):
            raise UserError(f"{where}: negative_prompt is {negative!r}; allowed: a text, or none")
        if negative is not None and guidance == 1.0:
            raise UserError(
                f"{where}: negative_prompt is {negative!r} and guidance 1, which steers away from nothing. Leave "
                "negative_prompt out, or take a guidance above 1"
            )
        return cls(
            prompt=prompt,
            steps=steps,
            seconds=None if seconds is None else float(seconds),
            guidance=float(guidance),
            negative=negative,
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
