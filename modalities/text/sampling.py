"""Sampling of answers, every one from its own seed.

What decides an answer comes from ``torch.Generator("cpu").manual_seed(seed)``, on every device the same: for each token one
exponential number e for each id of the vocabulary, and the id with the least e / p wins, which it does with probability p. An
answer depends on its seed and its prompt, and on the batch it is computed in only where the two best ids are so close that the
rounding of the logits decides: a chance of some 1e-6 a token in float32, whatever the vocabulary (bfloat16 rounds much more).
One number a token that picks from the cumulative distribution would be cheaper; but each of the vocabulary's boundaries would
then be a place where rounding decides.

Letters: B prompts of a batch, P tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.core.references import adapters_off
from polyalign.modalities.text.loading import autocast, plain
from polyalign.modalities.text.settings import TextModelSettings

Progress = Callable[[int, int], None]
SHOWN = 16  # tokens of a prompt in a message, which tell it from others where a caller asks in parts


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: the prompt's ids, the ids that end an answer, and the seed."""

    ids: list[int]
    ends: frozenset[int]
    seed: int


@dataclass(frozen=True)
class Mixture:
    """IPO-MD's second model: its ``share`` b of log m = (1 - b) log p_policy + b log p_reference, and the reference, another
    model or (None) the policy with its LoRA off."""

    share: float
    reference: Model | None = None


@torch.no_grad()
def sample(
    model: Model,
    settings: TextModelSettings,
    questions: Sequence[Question],
    *,
    mixture: Mixture | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The ids of one answer for each question, the one that ends it included where it was reached within
    ``settings.max_new_tokens``. Questions are taken by length, so that batches have little padding, and those of one prompt
    together, whose keys and values are computed once.

    Raises:
        UserError: a prompt and an answer that are longer than the model's positions.
    """
    _refuse_too_long(model, settings, questions)
    order = sorted(range(len(questions)), key=lambda place: (len(questions[place].ids), questions[place].ids))
    answers: list[list[int]] = [[] for _ in questions]
    done = 0
    with _evaluating([model, *([mixture.reference] if mixture is not None and mixture.reference is not None else [])]):
        for start in range(0, len(order), settings.sample_batch):
            places = order[start : start + settings.sample_batch]
            found = _batch(model, settings, [questions[place] for place in places], mixture)
            for place, ids in zip(places, found, strict=True):
                answers[place] = ids
            done += len(places)
            if progress is not None:
                progress(done, len(questions))
    return answers


def pick(log_probabilities: Tensor, race: Tensor, *, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One id a row (B,) of ``log_probabilities`` (B, V): the one with the least e / p, for ``race`` e (B, V), exponential.

    Temperature, then top-k (with ties), then top-p (the smallest set of the likeliest ids that has at least that mass), as
    transformers orders them. Temperature 0 takes the likeliest.
    """
    if temperature == 0.0:
        return log_probabilities.argmax(-1)
    scaled = log_probabilities / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if top_p < 1.0:
        ordered, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, ids, beyond), -torch.inf)
    return (scaled - race.log()).argmax(-1)


def exponentials(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """A token's numbers (B, ``count``), one row from each generator."""
    rows = [torch.empty(count, dtype=torch.float64).exponential_(generator=generator) for generator in generators]
    return torch.stack(rows)


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
        logits = found.logits[:, -1]
        return (logits.cpu() if self.device.type == "mps" else logits).double()  # there is no float64 on that device

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may come several times."""
        if self.cache is not None:
            self.cache.batch_select_indices(rows.to(self.device))


def _batch(
    model: Model, settings: TextModelSettings, questions: Sequence[Question], mixture: Mixture | None
) -> list[list[int]]:
    runners = [_Runner(model, settings)]
    if mixture is not None:
        other = mixture.reference
        runners.append(_Runner(other or model, settings, lora_off=other is None))
    prompts = list({tuple(question.ids): None for question in questions})
    ids, mask = _padded(prompts, model.parts["pad_id"])  # each prompt once, however many answers it is to have
    rows = torch.tensor([prompts.index(tuple(question.ids)) for question in questions])
    generators = [torch.Generator("cpu").manual_seed(question.seed) for question in questions]
    answers: list[list[int]] = [[] for _ in questions]
    alive = list(range(len(questions)))  # the questions that are still being answered, and rows where they are in ids
    for _ in range(settings.max_new_tokens):
        found = _next(runners, ids, mask, mixture)
        chosen = _chosen(found[rows.to(found.device)], [generators[place] for place in alive], settings)
        for place, token in zip(alive, chosen.tolist(), strict=True):
            answers[place].append(token)
        going = [row for row, place in enumerate(alive) if answers[place][-1] not in questions[place].ends]
        if not going:
            break
        alive, rows, chosen = [alive[row] for row in going], rows[going], chosen[going, None]
        if rows.tolist() != list(range(len(ids))):
            ids, mask = ids[rows], mask[rows]
            for runner in runners:
                runner.keep(rows)
        rows = torch.arange(len(alive))
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return answers


def _next(runners: Sequence[_Runner], ids: Tensor, mask: Tensor, mixture: Mixture | None) -> Tensor:
    """Log-probabilities (B, V) of the next token."""
    first, *other = [runner.logits(ids, mask) for runner in runners]
    if mixture is None:
        return first.log_softmax(-1)
    return geometric_mixture(first, other[0].to(first.device), reference_share=mixture.share)


def _chosen(log_probabilities: Tensor, generators: Sequence[torch.Generator], settings: TextModelSettings) -> Tensor:
    """The next token (B,), on the CPU.

    Raises:
        UserError: the model gives no numbers, of which the first id would win each time.
    """
    if bool(log_probabilities.isnan().any()):
        raise UserError(
            "the model gives NaN as the probabilities of the next token: its weights are damaged, a training has diverged, or "
            "float16 is too narrow for it. Take an earlier checkpoint or another base, or set dtype: bfloat16 or float32"
        )
    race = exponentials(generators, log_probabilities.shape[-1]).to(log_probabilities.device)
    return pick(log_probabilities, race, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p).cpu()


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, P), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _refuse_too_long(model: Model, settings: TextModelSettings, questions: Sequence[Question]) -> None:
    positions = model.parts["positions"]
    if positions is None or not questions:
        return
    longest = max(range(len(questions)), key=lambda place: len(questions[place].ids))
    length = len(questions[longest].ids)
    if length + settings.max_new_tokens > positions:
        begins = model.parts["tokenizer"].decode(questions[longest].ids[:SHOWN])
        raise UserError(
            f"condition {longest}: its prompt has {length} tokens, which with max_new_tokens ({settings.max_new_tokens}) is "
            f"more than the model's {positions} positions. Prompts are not cut: shorten it, or lower max_new_tokens. It begins "
            f"with {begins!r}."
        )


@contextmanager
def _evaluating(models: Sequence[Model]) -> Iterator[None]:
    """In evaluation mode (checkpointing would switch the cache off), and as before afterwards."""
    networks = [plain(model.network) for model in models]
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)
