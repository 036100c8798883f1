"""A vision-language model behind an endpoint that is asked about pictures.

Pictures travel inside the request as PNG in base64, so the endpoint needs no access to this machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from polyalign.evaluation.chat import Content
from polyalign.evaluation.endpoint_judge import EndpointJudge, filled

POINTWISE = (
    "The picture was made for this request:\n{prompt}\n\nHow well does it fit the request, and how well is it made? Answer "
    'with a number from 0 (not at all) to 10 (perfectly) and nothing else, in this form: {"score": 7}'
)
PAIRWISE = (
    "Both pictures were made for this request:\n{prompt}\n\nWhich one fits the request better and is made better, the first or "
    'the second? Answer with 1, 2, or 0 if neither is better, and nothing else, in this form: {"better": 1}'
)


class HttpJudge(EndpointJudge[Image.Image]):
    """Scores of pictures from a vision-language model; options, modes and errors are those of
    :class:`~polyalign.evaluation.endpoint_judge.EndpointJudge`."""

    name = "http"
    one, many = "picture", "pictures"
    pointwise, pairwise = POINTWISE, PAIRWISE

    def places(self) -> Mapping[str, str]:
        return {"{prompt}": "the prompt"}

    def prompt(self, condition: Mapping[str, Any]) -> str:
        return str(condition["prompt"])

    def content(self, prompt: str, outputs: Sequence[Image.Image]) -> Content:
        text = {"type": "text", "text": filled(self.question, {"{prompt}": prompt})}
        return [text, *({"type": "image_url", "image_url": {"url": _inline(picture)}} for picture in outputs)]

    def mark(self, output: Image.Image) -> str:
        rgb = output.convert("RGB")
        return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
