"""A model behind an endpoint that hears sounds and is asked about them."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile

from polyalign.evaluation.audio.sound import Sound, at_rate
from polyalign.evaluation.chat import Content
from polyalign.evaluation.endpoint_judge import EndpointJudge, filled

RATE = 16_000
POINTWISE = (
    "How well does this sound fit the caption, and do its events come in the caption's order? The caption is: {prompt}\n"
    'Answer with a number from 0 (not at all) to 10 (perfectly) and nothing else, in this form: {"score": 7}'
)
PAIRWISE = (
    "Which of these two sounds fits the caption better, with its events in the caption's order? The caption is: {prompt}\n"
    'Answer with 1 (the first sound), 2 (the second) or 0 if neither is better, and nothing else, in this form: {"better": 1}'
)


class HttpSoundJudge(EndpointJudge[Sound]):
    """Scores of sounds from a model that takes ``input_audio``; options, modes and errors are those of
    :class:`~polyalign.evaluation.endpoint_judge.EndpointJudge`. Sounds are sent as WAV of 16 bits at 16 kHz."""

    name = "http_sound"
    one, many = "sound", "sounds"
    pointwise, pairwise = POINTWISE, PAIRWISE

    def places(self) -> Mapping[str, str]:
        return {"{prompt}": "the caption"}

    def prompt(self, condition: Mapping[str, object]) -> str:
        return str(condition["prompt"])

    def content(self, prompt: str, outputs: Sequence[Sound]) -> Content:
        text = {"type": "text", "text": filled(self.question, {"{prompt}": prompt})}
        return [text, *({"type": "input_audio", "input_audio": {"data": _inline(sound), "format": "wav"}} for sound in outputs)]

    def mark(self, output: Sound) -> str:
        return hashlib.sha256(f"{output.rate}:".encode() + np.asarray(output.samples, dtype="<f4").tobytes()).hexdigest()


def _inline(sound: Sound) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(at_rate(sound, RATE), -1.0, 1.0), RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
