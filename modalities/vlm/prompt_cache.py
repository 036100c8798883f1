"""Prompts kept by their content: rendering, tokenising and the processing of pictures happen once, not at each step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from polyalign.core.adapter import Model
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.content_cache import ContentCache, Entry
from polyalign.modalities.vlm.processing import Asked, Picture, Prompt, asked_of, prompt_asked


class PromptCache:
    """Gives :func:`polyalign.modalities.vlm.processing.prompt_of` of conditions, from memory where it has been asked for.

    A prompt is kept under its turns, the content of its pictures (a file's bytes, or pixels), the model with its chat template
    and the options of the image processor. In memory up to ``limit_bytes``; the least recently used leave first.
    """

    def __init__(self, limit_bytes: int):
        self.kept = ContentCache(None, limit_bytes)

    def prompt(self, model: Model, condition: Any, *, where: str, options: Mapping[str, Any]) -> Prompt:
        """The prompt of a condition.

        Raises:
            UserError: as prompt_of.
        """
        asked = asked_of(condition, where=where)
        keys = _keys(model, asked, options)
        return _prompt(self.kept.get(keys, lambda: _entry(prompt_asked(model, asked, where=where, options=options))))


def _keys(model: Model, asked: Asked, options: Mapping[str, Any]) -> tuple[str, ...]:
    turns = json.dumps([model.parts["processor"].chat_template, asked.messages, dict(options)], sort_keys=True)
    pictures = [f"{type(content).__name__} {fingerprint(content)}" for content in asked.images]
    return (model.identity, turns, *pictures)


def _entry(prompt: Prompt) -> Entry:
    """A prompt as tensors."""
    found = {"ids": torch.tensor(prompt.ids, dtype=torch.long)}
    if prompt.positions is not None:
        found["positions"] = prompt.positions
    told = [(picture.key, picture.tokens, *picture.size) for picture in prompt.pictures]
    found["pictures"] = torch.tensor(told, dtype=torch.long).reshape(-1, 4)
    for place, picture in enumerate(prompt.pictures):
        found |= {f"{place}.{name}": tensor for name, tensor in picture.inputs.items()}
    return found


def _prompt(entry: Entry) -> Prompt:
    """A prompt as :func:`_entry` wrote it."""
    pictures = []
    for place, (key, tokens, width, height) in enumerate(entry["pictures"].tolist()):
        start = f"{place}."
        inputs = {name.removeprefix(start): tensor for name, tensor in entry.items() if name.startswith(start)}
        pictures.append(Picture(key, inputs, tokens, (width, height)))
    return Prompt(entry["ids"].tolist(), tuple(pictures), entry.get("positions"))
