"""The vision-language adapter: image-text models of transformers. What differs between families is in
:mod:`polyalign.modalities.vlm.families`; the likelihood is the core's.

Letters: G groups, K candidates in a group, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.modalities.content_cache import ContentCache
from polyalign.modalities.injected_lora import NAME
from polyalign.modalities.token_rows import (
    RowLength,
    answers_of,
    group_of,
    measure,
    refuse_beyond_positions,
    refuse_empty,
    refuse_unequal,
    refuse_what_does_not_fit,
    text_of,
)
from polyalign.modalities.transformers_export import Opening, export
from polyalign.modalities.transformers_folders import autocast, checkpoint_activations, plain
from polyalign.modalities.vlm import batches, features, loading, lora, processing, sampling, scoring
from polyalign.modalities.vlm.batches import VlmRow
from polyalign.modalities.vlm.families import stands_still
from polyalign.modalities.vlm.features import Features
from polyalign.modalities.vlm.processing import Prompt
from polyalign.modalities.vlm.prompt_cache import PromptCache
from polyalign.modalities.vlm.settings import VlmModelSettings, losing_in

Progress = Callable[[int, int], None]
OPENING = Opening("AutoModelForImageTextToText", "processor", "AutoProcessor", "image-text-to-text")
MADE_BY = {"rejected_images": "{image: {kind: diffused}}", "rejected_messages": "{context: true}"}
LOSING_COLUMNS = {"image": "rejected_images", "context": "rejected_messages"}


@dataclass(frozen=True)
class Branch:
    """One candidate of a row before it is tokens."""

    condition: Any
    answer: str


@dataclass(frozen=True)
class Answer:
    """A sampled answer: the prompt that it follows, its ids, the one that ends it included, and its text."""

    prompt: Prompt
    ids: list[int]
    text: str


class VlmAdapter:
    """The contract of :mod:`polyalign.core.adapter` for vision-language models. Holds settings and caches, no model."""

    def __init__(self, settings: VlmModelSettings):
        self.settings = settings
        self.scoring = TokenSettings(
            prefix_sharing=settings.prefix_sharing, head_chunk=settings.head_chunk, dense=settings.dense
        )
        self.cache = ContentCache(settings.cache_folder, settings.cache_bytes)
        self.prompts = PromptCache(settings.prompt_bytes)

    def load(self) -> Model:
        return loading.load(self.settings)

    def trainable(self, model: Model, *, fresh: bool = True) -> Model:
        """The model with a fresh LoRA, or with all weights, of the parts that are trained. Not ``fresh``: it goes on with the
        LoRA that ``load_lora`` has put there."""
        network: Any = model.network
        if self.settings.train == "full":
            lora.train_whole(network, self.settings)
        elif fresh:
            lora.add(network, self.settings)
        if self.settings.gradient_checkpointing:
            checkpoint_activations(network)
        network.train()
        return model

    def load_lora(self, model: Model, folder: Path, *, name: str = NAME) -> Model:
        """The model with the LoRA of ``folder`` (peft's format) on its network; under another ``name`` it is a second one
        beside the trained one, for a named-adapter reference."""
        lora.load(plain(model.network), Path(folder), name)
        return model

    def lengths(self, model: Model, rows: Sequence[Row]) -> list[RowLength]:
        """Each row's lengths in tokens, image tokens among them, and why it does not fit (None: it does). Nothing is ever cut:
        a row that does not fit is for the caller to leave out and to count, and ``prepare`` refuses it."""
        return [self._length(model, self._tokens(model, row)) for row in rows]

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        """Rows as the tensors of :mod:`polyalign.modalities.vlm.batches`. ``step`` changes nothing.

        A row has a ``condition`` (:mod:`polyalign.modalities.vlm.processing`) and, for ``settings.branches``, ``chosen``,
        ``rejected``, ``rejected_images`` and ``rejected_messages``; or ``candidates`` with ``target``; or ``completion`` with
        ``label``. It may also have ``target``, ``margins`` (one number a candidate), ``desirable`` and ``weight``.

        Raises:
            UserError: a row without prompt or answers, with another number of images than of their places, with a damaged
                image, one that is too long, or rows of different numbers of candidates; with the pair's id.
        """
        tokens = [self._tokens(model, row) for row in rows]
        refuse_what_does_not_fit(rows, [self._length(model, found) for found in tokens])
        refuse_unequal(rows, [found.completions for found in tokens])
        groups = [group_of(row, tuple(Candidate(one.condition, one.answer) for one in self._branches(row))) for row in rows]
        return Batch.of_groups(groups, batches.collate(tokens, model.parts["pad_id"]))

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        """The likelihood of tokens needs no randomness."""
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        """The log-probabilities of every completion's tokens, (G, K, U)."""
        lengths = batch.tensors["prompt_mask"].sum(-1).gather(1, batch.tensors["prompt_of"])
        refuse_beyond_positions(lengths, batch.tensors["completion_mask"].sum(-1), model.parts["positions"])
        device = next(model.network.parameters()).device
        tensors = {  # pictures follow where their features are not known yet
            name: tensor if name.startswith(batches.PICTURE) else tensor.to(device) for name, tensor in batch.tensors.items()
        }
        with autocast(self.settings, device):
            return scoring.score(
                model.network,
                model.parts["family"],
                tensors,
                self.scoring,
                image_token=model.parts["image_token"],
                pad_id=model.parts["pad_id"],
                features_of=self.features_of(model),
            )

    def sample(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, progress: Progress | None = None
    ) -> list[str]:
        """One answer for each (condition, seed); a condition is a prompt, or a mapping with ``messages`` or ``prompt``, and
        ``images``. Each depends on its own condition and seed and not on the others.

        Raises:
            UserError: not as many seeds as conditions, a condition that is wrong, or a prompt that leaves no room.
        """
        return [answer.text for answer in self.answers(model, conditions, seeds, progress=progress)]

    def answers(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, progress: Progress | None = None
    ) -> list[Answer]:
        """As ``sample``, with prompts and ids, which a pass over sampled answers needs."""
        if len(conditions) != len(seeds):
            raise UserError(f"{len(conditions)} conditions and {len(seeds)} seeds: sampling needs one seed for each answer")
        questions = []
        for place, (condition, seed) in enumerate(zip(conditions, seeds, strict=True)):
            where = f"condition {place}"
            prompt = self.prompt(model, condition, where=where)
            questions.append((prompt, processing.ends_of(model, condition, where=where), int(seed)))
        found = sampling.sample(model, self.settings, questions, self.features_of(model), progress=progress)
        return [Answer(prompt, ids, text_of(model, ids, ends)) for ids, (prompt, ends, _) in zip(found, questions, strict=True)]

    def sample_base(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, progress: Progress | None = None
    ) -> list[str]:
        """As ``sample``, from the base under the LoRA.

        Raises:
            UserError: weights of the base were trained, so it is no longer inside.
        """
        if self.settings.train == "full":
            raise UserError("all of the network was trained: load the base anew to sample from it")
        with adapters_off(model.network):
            return self.sample(model, conditions, seeds, progress=progress)

    def export(self, model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
        export(model, Path(folder), OPENING, card)

    def prompt(self, model: Model, condition: Any, *, where: str) -> Prompt:
        """The ids, pictures and spans of a condition (:func:`polyalign.modalities.vlm.processing.prompt_of`)."""
        return self.prompts.prompt(model, condition, where=where, options=self.settings.picture_options)

    def prompt_length(self, model: Model, condition: Any, *, where: str) -> tuple[int, str]:
        """A prompt's length in tokens, image tokens among them, and how many of them these are, in words."""
        prompt = self.prompt(model, condition, where=where)
        return len(prompt.ids), processing.tell_image_tokens(model, prompt)

    def _branches(self, row: Row) -> list[Branch]:
        """The row's candidates: its branches, or its list of answers.

        Raises:
            UserError: a column is missing that a branch needs.
        """
        if row.get("candidates") is not None or row.get("completion") is not None:
            return [Branch(row.get("condition"), answer) for answer in answers_of(row)]
        found = []
        for name in self.settings.branches:
            losing = losing_in(name)
            answer = row.get("rejected" if "response" in losing else "chosen")
            condition: Any = row.get("condition")
            if not isinstance(answer, str):
                column = "rejected" if "response" in losing else "chosen"
                raise UserError(f"pair {row.get('pair_id')}: {column} is {answer!r}, and has to be text (branch {name})")
            for kind, column in LOSING_COLUMNS.items():
                if kind in losing:
                    condition = self._lost(row, condition, column, name)
            found.append(Branch(condition, answer))
        return found

    @staticmethod
    def _lost(row: Row, condition: Any, column: str, branch: str) -> dict[str, Any]:
        """A condition with its images or messages replaced by the losing ones."""
        if row.get(column) is None or not isinstance(condition, Mapping):
            raise UserError(
                f"pair {row.get('pair_id')}: there is no {column}, which the branch {branch} needs. Have it made "
                f"(pairs.negatives: {MADE_BY[column]}), give the column, or leave the branch out"
            )
        return {**condition, column.removeprefix("rejected_"): row[column]}

    def _tokens(self, model: Model, row: Row) -> VlmRow:
        """A row's prompts, each different one once, and its answers."""
        where = f"pair {row.get('pair_id')}"
        prompts: list[Prompt] = []
        known: dict[tuple[int, int], int] = {}  # by the objects that a condition holds
        places, completions = [], []
        for branch in self._branches(row):
            parts = branch.condition if isinstance(branch.condition, Mapping) else {"prompt": branch.condition}
            key = id(parts.get("messages", parts.get("prompt"))), id(parts.get("images"))
            if key not in known:
                known[key] = len(prompts)
                prompts.append(self.prompt(model, branch.condition, where=where))
            places.append(known[key])
            completions.append(
                processing.completion_of(model, branch.condition, branch.answer, self.settings.append_eos, where=where)
            )
        refuse_empty(completions, where=where)
        return VlmRow(tuple(prompts), tuple(places), tuple(completions))

    def _length(self, model: Model, tokens: VlmRow) -> RowLength:
        prompts = [len(tokens.prompts[place].ids) for place in tokens.prompt_of]
        longest = max(tokens.prompts, key=lambda prompt: len(prompt.ids))
        told = processing.tell_image_tokens(model, longest)
        return measure(model, prompts, [len(ids) for ids in tokens.completions], self.settings, about_prompt=told)

    def features_of(self, model: Model) -> Callable[[int, Mapping[str, Tensor]], Features]:
        """What gives a picture's features: kept for good where they stay the same, else computed for this pass, with
        gradient."""
        parameter = next(model.network.parameters())
        still = set(self.settings.parts) == {"language"} and stands_still(plain(model.network))
        about = ("features", model.identity, str(parameter.dtype), self.settings.dtype)

        def features_of(key: int, inputs: Mapping[str, Tensor]) -> Features:
            def make() -> dict[str, Tensor]:
                with autocast(self.settings, parameter.device):
                    return features.of_picture(model.network, inputs)

            if not still:
                return make()
            with torch.no_grad():
                return self.cache.get((*about, str(key)), make)

        return features_of
