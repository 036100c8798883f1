"""What an evaluation harness asks of a vision-language model: a base, perhaps with a trained LoRA, that answers and scores.

Knows no harness: :mod:`polyalign.modalities.vlm.lmms_eval` translates for lmms-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.modalities.vlm import processing
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.settings import VlmModelSettings

LONGEST = 1024
"""New tokens of an answer where a task does not say."""
UNUSED = frozenset({"image_aspect_ratio", "use_cache"})
"""Of a task's generation options, those that say nothing about the answer here."""
PARAGRAPH = "\n\n"
"""The end that the harness gives tasks that name none. An answer may have paragraphs, so it ends none here."""


@dataclass(frozen=True)
class Wanted:
    """How a task wants its answers: settings of the sampler, and texts that end an answer."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = LONGEST
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Wanted:
        """From a task's ``generation_kwargs``.

        Raises:
            UserError: an option that is not known, or beam search.
        """
        known = {"temperature", "top_p", "top_k", "max_new_tokens", "until", "do_sample", "num_beams"} | UNUSED
        if set(options) - known:
            raise UserError(f"generation_kwargs: {', '.join(sorted(set(options) - known))}; known: {', '.join(sorted(known))}")
        if options.get("num_beams") not in (None, 1):
            raise UserError(f"generation_kwargs: num_beams is {options['num_beams']}, and there is no beam search here")
        sampled = options.get("do_sample", True) and (options.get("temperature") or 0.0) > 0.0
        until = options.get("until") or ()
        return cls(
            temperature=float(options["temperature"]) if sampled else 0.0,
            top_p=1.0 if options.get("top_p") is None or not sampled else float(options["top_p"]),
            top_k=None if not options.get("top_k") or not sampled else int(options["top_k"]),
            max_new_tokens=int(options.get("max_new_tokens") or LONGEST),
            until=tuple(end for end in ([until] if isinstance(until, str) else until) if end and end != PARAGRAPH),
        )

    def cut(self, answer: str) -> str:
        """The answer up to the first text that ends it."""
        return answer[: min((place for end in self.until if (place := answer.find(end)) >= 0), default=len(answer))]


class Harness:
    """A base and, under ``lora``, what was trained on it (a run's ``adapter`` folder, or any folder of peft)."""

    def __init__(self, settings: VlmModelSettings, lora: str | Path | None = None, *, seed: int = 0):
        """Raises:
        UserError: no such base or LoRA.
        """
        self.adapter, self.seed = VlmAdapter(settings), seed
        self.model: Model = self.adapter.load()
        if lora is not None:
            folder = Path(lora).expanduser()
            if not folder.is_dir():
                raise UserError(f"there is no LoRA folder {folder}; name the folder 'adapter' of a run")
            self.adapter.load_lora(self.model, folder)
        self.model.network.eval()

    def answers(self, conditions: Sequence[Any], wanted: Wanted, keys: Sequence[str]) -> list[str]:
        """An answer to each condition; where it is sampled, by its key and the seed."""
        seeds = [seed_of(self.seed, "harness", key) for key in keys]
        found = self._like(wanted).sample(self.model, conditions, seeds)
        return [wanted.cut(answer) for answer in found]

    def likelihoods(self, conditions: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, int, bool]]:
        """For each (condition, answer) the log-probability of the answer's tokens in nats, without the end of the turn, their
        number, and whether greedy decoding gives just them.

        Raises:
            UserError: an answer without tokens, or a condition that is wrong.
        """
        tokens = [self._ids(place, *pair) for place, pair in enumerate(zip(conditions, answers, strict=True))]
        found = []
        size = self.adapter.settings.sample_batch
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            sums = self._sums(conditions[part], answers[part], [len(ids) for ids in tokens[part]])
            greedy = self._greedy(conditions[part], tokens[part])
            lengths = [len(ids) for ids in tokens[part]]
            found += list(zip(sums, lengths, greedy, strict=True))
        return found

    def _ids(self, place: int, condition: Any, answer: str) -> list[int]:
        where = f"request {place}"
        ends = processing.ends_of(self.model, condition, where=where)
        ids = processing.completion_of(self.model, condition, answer, False, where=where)
        ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
        if not ids:
            raise UserError(f"{where}: the answer {answer!r} has no tokens, so it has no likelihood")
        return ids

    def _sums(self, conditions: Sequence[Any], answers: Sequence[str], lengths: Sequence[int]) -> list[float]:
        rows = [
            {"pair_id": str(place), "condition": condition, "completion": answer}
            for place, (condition, answer) in enumerate(zip(conditions, answers, strict=True))
        ]
        with torch.no_grad():
            values = self.adapter.score(self.model, self.adapter.prepare(self.model, rows, step=0), None).values
        return [float(row[0, :length].double().sum()) for row, length in zip(values, lengths, strict=True)]

    def _greedy(self, conditions: Sequence[Any], tokens: Sequence[Sequence[int]]) -> list[bool]:
        wanted = Wanted(max_new_tokens=max(len(ids) for ids in tokens))
        found = self._like(wanted).answers(self.model, conditions, [0] * len(tokens))
        return [answer.ids[: len(ids)] == list(ids) for answer, ids in zip(found, tokens, strict=True)]

    def _like(self, wanted: Wanted) -> VlmAdapter:
        """An adapter that samples as it is wanted, with what is known of pictures."""
        settings = replace(
            self.adapter.settings,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            max_new_tokens=wanted.max_new_tokens,
        )
        adapter = VlmAdapter(settings)
        adapter.cache = self.adapter.cache
        return adapter
