"""A language model's side of sampling (:mod:`polyalign.modalities.token_sampling`): prompts of text alone, and the mixture of
policy and reference.

Letters: B prompts of a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.references import adapters_off
from polyalign.modalities.text.loading import autocast, plain
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.token_sampling import Progress, Question, answer, exponentials, in_float64, pick

__all__ = ["Mixture", "Progress", "Question", "exponentials", "pick", "sample"]


@dataclass(frozen=True)
class Mixture:
    """IPO-MD's second model: its ``share`` b of log m = (1 - b) log p_policy + b log p_reference, and the reference, another
    model or (None) the policy with its LoRA off."""

    share: float
    reference: Model | None = None


def sample(
    model: Model,
    settings: TextModelSettings,
    questions: Sequence[Question],
    *,
    mixture: Mixture | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """As :func:`polyalign.modalities.token_sampling.answer`."""
    models = [model, *([mixture.reference] if mixture is not None and mixture.reference is not None else [])]

    def runners(_: Sequence[Question]) -> list[_Runner]:
        made = [_Runner(model, settings)]
        if mixture is not None:
            made.append(_Runner(mixture.reference or model, settings, lora_off=mixture.reference is None))
        return made

    share = None if mixture is None else mixture.share
    return answer(models, settings, questions, runners, share=share, progress=progress)


class _Runner:
    """One model's forward passes over answers that grow, with its cache of keys and values."""

    def __init__(self, model: Model, settings: TextModelSettings, *, lora_off: bool = False):
        self.network, self.settings, self.lora_off = plain(model.network), settings, lora_off
        self.device = next(self.network.parameters()).device
        self.cache: Any = None
        self.cached = 0
        self.takes = inspect.signature(self.network.forward).parameters

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Those of the next token (B, V) in float64, after ``ids`` (B, so far), padded on the left."""
        inputs: dict[str, Any] = {"input_ids": ids[:, self.cached :].to(self.device), "attention_mask": mask.to(self.device)}
        if "position_ids" in self.takes:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = places[:, self.cached :].to(self.device)
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        with adapters_off(self.network) if self.lora_off else nullcontext(), autocast(self.settings, self.device):
            found = self.network(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = getattr(found, "past_key_values", None)
        self.cached = 0 if self.cache is None else ids.shape[1]  # a model without a cache sees all of it every time
        return in_float64(found.logits[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may come several times."""
        if self.cache is not None:
            self.cache.batch_select_indices(rows.to(self.device))
