"""A vision-language model's side of sampling (:mod:`polyalign.modalities.token_sampling`): the prompt with its pictures goes
through the model once, the answers grow on its keys and values.

Letters: B prompts of a batch, V vocabulary, A axes of positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.modalities.token_sampling import Progress, Question, answer, in_float64
from polyalign.modalities.transformers_folders import autocast, plain
from polyalign.modalities.vlm.features import Features, as_argument, as_pixels
from polyalign.modalities.vlm.processing import Prompt, tell_image_tokens
from polyalign.modalities.vlm.settings import VlmModelSettings

FeaturesOf = Callable[[int, Mapping[str, Tensor]], Features]


def sample(
    model: Model,
    settings: VlmModelSettings,
    questions: Sequence[tuple[Prompt, frozenset[int], int]],
    features_of: FeaturesOf,
    *,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The ids of one answer for each (prompt, ids that end it, seed), as
    :func:`polyalign.modalities.token_sampling.answer` gives them."""
    prompts: dict[Any, Prompt] = {}
    asked = []
    for prompt, ends, seed in questions:
        keys = tuple(picture.key for picture in prompt.pictures)
        asked.append(Question(prompt.ids, ends, seed, keys, tell_image_tokens(model, prompt)))
        prompts[asked[-1].prompt] = prompt

    def runners(batch: Sequence[Question]) -> list[_Runner]:
        return [_Runner(model, settings, [prompts[question.prompt] for question in batch], features_of)]

    return answer([model], settings, asked, runners, progress=progress)


class _Runner:
    """The model's forward passes over answers that grow, with its cache of keys and values."""

    def __init__(self, model: Model, settings: VlmModelSettings, prompts: Sequence[Prompt], features_of: FeaturesOf):
        self.network, self.settings, self.parts = plain(model.network), settings, model.parts
        self.parameter = next(self.network.parameters())
        self.prompts, self.features_of = list(prompts), features_of
        self.before = torch.tensor([len(prompt.ids) for prompt in prompts])
        self.next = torch.tensor([_after(prompt) for prompt in prompts])
        self.takes = inspect.signature(self.network.forward).parameters
        self.cache: Any = None
        self.cached = 0

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Those of the next token (B, V) in float64, after ``ids`` (B, so far), padded on the left."""
        device = self.parameter.device
        inputs: dict[str, Any] = {
            "input_ids": ids[:, self.cached :].to(device),
            "attention_mask": mask.to(device),
            "position_ids": self._positions(mask)[..., self.cached :].to(device),
        }
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        if self.cache is None:
            inputs |= self._pictures(ids.shape[1], device)
        with autocast(self.settings, device):
            found = self.network(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache, self.cached = found.past_key_values, ids.shape[1]
        return in_float64(found.logits[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may come several times."""
        self.before, self.next = self.before[rows], self.next[rows]
        self.prompts = [self.prompts[row] for row in rows.tolist()]
        self.cache.batch_select_indices(rows.to(self.parameter.device))

    def _pictures(self, length: int, device: torch.device) -> dict[str, Any]:
        """What the first pass is given of the pictures."""
        family, found = self.parts["family"], {}
        if family.types is not None:
            types = torch.zeros(len(self.prompts), length, dtype=torch.int)
            for row, prompt in enumerate(self.prompts):
                types[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids) == self.parts["image_token"]
            found[family.types] = types.to(device)
        if family.takes_features:
            pictures = [self.features_of(picture.key, picture.inputs) for prompt in self.prompts for picture in prompt.pictures]
            return found | as_argument(pictures, device)
        return found | as_pixels([[picture.inputs for picture in prompt.pictures] for prompt in self.prompts], self.parameter)

    def _positions(self, mask: Tensor) -> Tensor:
        """(B, L), or (A, B, L) in families with several axes."""
        along = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.parts["family"].axes == 1:
            return along
        found = (self.next.unsqueeze(1) + along - self.before.unsqueeze(1)).clamp(min=0)
        found = found.expand(self.parts["family"].axes, -1, -1).clone()
        for row, prompt in enumerate(self.prompts):
            start = int((mask[row] == 0).sum())
            assert prompt.positions is not None
            found[:, row, start : start + len(prompt.ids)] = prompt.positions
        return found


def _after(prompt: Prompt) -> int:
    """The position behind a prompt."""
    return len(prompt.ids) if prompt.positions is None else int(prompt.positions.max()) + 1
