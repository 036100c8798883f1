"""What tells the denoiser its caption while the base is trained: encoders that learn along, or a frozen sentence encoder.

Learnt from scratch, an encoder knows the words of its captions and no others. A frozen one brings its own knowledge of words:
names that were never drawn have states near those of names that were. Letters: B rows, S tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges.bridge import TEXT_PACKAGE
from polyalign.evaluation.image_judges.efficientnet_lite import packaged
from polyalign.modalities.image import tiny_architecture as tiny
from polyalign.modalities.image.families import FAMILIES
from polyalign.modalities.image.text import encode, encode_empty


class Told(NamedTuple):
    """States (B, S, D), and what SDXL's UNet is told besides."""

    states: Tensor
    added: dict[str, Tensor] | None = None


class Text(Protocol):
    """The text side of a base in training."""

    trained: dict[str, nn.Module]
    """What learns along with the UNet, by its name in the pipeline."""

    def told(self, rows: Tensor, dropped: Tensor) -> Told:
        """For rows (B,) of the captions; where ``dropped`` (B,) is true, for the empty caption."""
        ...


class Learnt:
    """SDXL's two encoders, penultimate states of both side by side, and the second's projection."""

    def __init__(self, pipeline: Any, captions: Sequence[str]):
        self.pipeline = pipeline
        self.trained = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
        self.tokens, self.empty = self._tokens(captions), self._tokens([""])
        self.size = torch.tensor([[tiny.PIXELS, tiny.PIXELS, 0, 0, tiny.PIXELS, tiny.PIXELS]], dtype=torch.float32)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return self.pipeline.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def told(self, rows: Tensor, dropped: Tensor) -> Told:
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[rows])
        first = self.pipeline.text_encoder(tokens, output_hidden_states=True)
        second = self.pipeline.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return Told(states, {"text_embeds": second.text_embeds, "time_ids": self.size.expand(len(rows), -1)})


class Frozen:
    """A sentence encoder's last hidden states, made once for each caption, as the pipeline makes them."""

    def __init__(self, pipeline: Any, captions: Sequence[str]):
        self.trained: dict[str, nn.Module] = {}
        family, distinct = FAMILIES["sd"], list(dict.fromkeys(captions))
        self.states = torch.stack([encode(family, pipeline, caption)["states"] for caption in distinct])
        self.empty = encode_empty(family, pipeline, None)["states"]
        places = {caption: place for place, caption in enumerate(distinct)}
        self.places = torch.tensor([places[caption] for caption in captions])

    def told(self, rows: Tensor, dropped: Tensor) -> Told:
        return Told(torch.where(dropped[:, None, None], self.empty, self.states[self.places[rows]]))


def sentence_encoder(where: str) -> Path:
    """Folder of a sentence encoder in transformers' layout: as named, or, for ``minilm``, of the installed package.

    Raises:
        UserError: there is none.
    """
    if where == "minilm":
        return packaged(TEXT_PACKAGE, "model.safetensors", "--sentences minilm: a folder").parent
    return files.folder(where, "--sentences", weights=True)
