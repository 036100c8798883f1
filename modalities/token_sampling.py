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

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.modalities.token_rows import padded_left
from polyalign.modalities.transformers_folders import plain

Progress = Callable[[int, int], None]
SHOWN = 16  # tokens of a prompt in a message, which tell it from others where a caller asks in parts


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: the prompt's ids, the ids that end an answer, the seed, and what tells prompts of the same ids apart.
    ``about`` is what a refusal adds to the length of the prompt."""

    ids: list[int]
    ends: frozenset[int]
    seed: int
    beside: tuple[Hashable, ...] = ()
    about: str = ""

    @property
    def prompt(self) -> tuple[tuple[int, ...], tuple[Hashable, ...]]:
        return tuple(self.ids), self.beside


class Drawing(Protocol):
    """What settings say of sampling."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float: ...
    @property
    def sample_batch(self) -> int: ...


class Runner(Protocol):
    """One model's forward passes over answers that grow, with its cache of keys and values."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Those of the next token (B, V) in float64, after ``ids`` (B, so far), padded on the left."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may come several times."""
        ...


Runners = Callable[[Sequence[Question]], Sequence[Runner]]
"""Makes what answers the given prompts, a row each: one runner, or the policy's and the reference's."""


@torch.no_grad()
def answer(
    models: Sequence[Model],
    settings: Drawing,
    questions: Sequence[Question],
    runners: Runners,
    *,
    share: float | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The ids of one answer for each question, the one that ends it included where it was reached within
    ``settings.max_new_tokens``. Questions are taken by length, so that batches have little padding, and those of one prompt
    together, whose keys and values are computed once.

    Args:
        models: that compute; the first one's tokenizer and positions count.
        share: of the second runner in log m = (1 - share) log p_1 + share log p_2; None is the first alone.

    Raises:
        UserError: a prompt and an answer that are longer than the model's positions.
    """
    refuse_too_long(models[0], settings, questions)
    order = sorted(range(len(questions)), key=lambda place: (len(questions[place].ids), questions[place].prompt))
    answers: list[list[int]] = [[] for _ in questions]
    done = 0
    with evaluating(models):
        for start in range(0, len(order), settings.sample_batch):
            places = order[start : start + settings.sample_batch]
            found = _batch(models[0].parts["pad_id"], settings, [questions[place] for place in places], runners, share)
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


def _batch(
    pad_id: int, settings: Drawing, questions: Sequence[Question], make: Runners, share: float | None
) -> list[list[int]]:
    prompts = {question.prompt: question for question in questions}  # each once, however many answers it is to have
    runners, places = make(list(prompts.values())), {prompt: place for place, prompt in enumerate(prompts)}
    ids, mask = padded_left([question.ids for question in prompts.values()], pad_id)
    rows = torch.tensor([places[question.prompt] for question in questions])
    generators = [torch.Generator("cpu").manual_seed(question.seed) for question in questions]
    answers: list[list[int]] = [[] for _ in questions]
    alive = list(range(len(questions)))  # the questions that are still being answered, and rows where they are in ids
    for _ in range(settings.max_new_tokens):
        found = _next(runners, ids, mask, share)
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


def _next(runners: Sequence[Runner], ids: Tensor, mask: Tensor, share: float | None) -> Tensor:
    """Log-probabilities (B, V) of the next token."""
    first, *other = [runner.logits(ids, mask) for runner in runners]
    if share is None:
        return first.log_softmax(-1)
    return geometric_mixture(first, other[0].to(first.device), reference_share=share)


def _chosen(log_probabilities: Tensor, generators: Sequence[torch.Generator], settings: Drawing) -> Tensor:
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


def in_float64(logits: Tensor) -> Tensor:
    """On the CPU where the device has none (mps)."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def refuse_too_long(model: Model, settings: Drawing, questions: Sequence[Question]) -> None:
    """Raises UserError for a prompt that leaves no room for ``settings.max_new_tokens``."""
    positions = model.parts["positions"]
    if positions is None or not questions:
        return
    longest = max(range(len(questions)), key=lambda place: len(questions[place].ids))
    length = len(questions[longest].ids)
    if length + settings.max_new_tokens > positions:
        begins = model.parts["tokenizer"].decode(questions[longest].ids[:SHOWN])
        raise UserError(
            f"condition {longest}: its prompt has {length} tokens{questions[longest].about}, which with max_new_tokens "
            f"({settings.max_new_tokens}) is more than the model's {positions} positions. Prompts are not cut: shorten it, or "
            f"lower max_new_tokens. It begins with {begins!r}."
        )


@contextmanager
def evaluating(models: Sequence[Model]) -> Iterator[None]:
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
