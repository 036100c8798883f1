"""The text adapter: any causal language model of transformers.

Letters: G groups, K candidates in a group, P prompt tokens, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.modalities.text import loading, lora, sampling, tokenise
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.token_rows import (
    RowLength,
    group_of,
    refuse_beyond_positions,
    refuse_unequal,
    refuse_what_does_not_fit,
    text_of,
)
from polyalign.modalities.transformers_export import Opening, export

Progress = Callable[[int, int], None]
OPENING = Opening("AutoModelForCausalLM", "tokenizer", "AutoTokenizer", "text-generation")


class TextAdapter:
    """The contract of :mod:`polyalign.core.adapter` for causal language models. Holds settings, no model."""

    def __init__(self, settings: TextModelSettings):
        self.settings = settings
        self.scoring = TokenSettings(
            prefix_sharing=settings.prefix_sharing, head_chunk=settings.head_chunk, dense=settings.dense
        )

    def load(self) -> Model:
        return loading.load(self.settings)

    def trainable(self, model: Model, *, fresh: bool = True) -> Model:
        """The model with a fresh LoRA, or with all of its network, to be trained. Not ``fresh``: it goes on with the LoRA that
        ``load_lora`` has put there."""
        network: Any = model.network
        if self.settings.train == "full":
            network.requires_grad_(True)
        elif fresh:
            lora.add(network, self.settings)
        if self.settings.gradient_checkpointing:
            loading.checkpoint_activations(network)
        network.train()
        return model

    def load_lora(self, model: Model, folder: Path, *, name: str = lora.NAME) -> Model:
        """The model with the LoRA of ``folder`` (peft's format) on its network; under another ``name`` it is a second one
        beside the trained one, for a named-adapter reference."""
        lora.load(loading.plain(model.network), Path(folder), name)
        return model

    def lengths(self, model: Model, rows: Sequence[Row]) -> list[RowLength]:
        """Each row's lengths in tokens, and why it does not fit (None: it does). Nothing is ever cut: a row that does not fit
        is for the caller to leave out and to count, and ``prepare`` refuses it."""
        return [tokenise.length_of(model, row, self.settings) for row in rows]

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        """Rows as tensors: ``prompt_ids``, ``prompt_mask`` (G, P), padded on the left, ``completion_ids``, ``completion_mask``
        (G, K, U), padded on the right. ``step`` changes nothing.

        A row has ``chosen`` and ``rejected``, or ``candidates`` with ``target`` (a share each), or ``completion`` with
        ``label`` (whether it is desirable). It may also have ``target``, ``margins`` (one number a candidate), ``desirable``
        and ``weight``.

        Raises:
            UserError: a row without prompt or answers, one that is too long, or rows of different numbers of candidates; with
            the pair's id.
        """
        tokens = [tokenise.tokens_of(model, row, self.settings) for row in rows]
        refuse_what_does_not_fit(rows, [tokenise.length_of_tokens(model, found, self.settings) for found in tokens])
        refuse_unequal(rows, [found.completions for found in tokens])
        return Batch.of_groups(
            [group_of(row, _candidates(row)) for row in rows], tokenise.collate(tokens, model.parts["pad_id"])
        )

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        """The likelihood of tokens needs no randomness."""
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        """The log-probabilities of every completion's tokens, (G, K, U)."""
        prompts, answers = (batch.tensors[name].sum(-1) for name in ("prompt_mask", "completion_mask"))
        refuse_beyond_positions(prompts.unsqueeze(1), answers, model.parts["positions"])
        device = next(model.network.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        with loading.autocast(self.settings, device):
            return score_tokens(model.network, tensors, self.scoring)

    def sample(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, progress: Progress | None = None
    ) -> list[str]:
        """One answer for each (condition, seed); a condition is a prompt or a mapping with ``prompt`` or ``messages``. Each
        depends on its own condition and seed and not on the others.

        Raises:
            UserError: not as many seeds as conditions, a condition without a prompt, or a prompt that leaves no room.
        """
        return self._sampled(model, conditions, seeds, progress=progress)

    def sample_base(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, progress: Progress | None = None
    ) -> list[str]:
        """As ``sample``, from the base under the LoRA.

        Raises:
            UserError: all of the network was trained, so the base is no longer inside it.
        """
        self._refuse_without_base("sample from it")
        with adapters_off(model.network):
            return self.sample(model, conditions, seeds, progress=progress)

    def sample_mixture(
        self,
        model: Model,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        *,
        share: float,
        reference: Model | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """As ``sample``, from the geometric mixture of policy and reference at each token (IPO-MD, arXiv 2403.08635):
        log m = log_softmax((1 - b) log p_policy + b log p_reference), with b = ``share``. ``reference`` None is the policy with
        its LoRA off. Two passes a token; b = 0 gives the policy's own answers.

        Raises:
            UserError: a share outside of 0 to 1, or no reference although all of the network was trained.
        """
        if not 0.0 <= share <= 1.0:
            raise UserError(f"the reference's share of the mixture is {share}; allowed: 0 (the policy) to 1 (the reference)")
        if reference is None:
            self._refuse_without_base("mix it in, and give it as reference")
        return self._sampled(model, conditions, seeds, mixture=sampling.Mixture(share, reference), progress=progress)

    def export(self, model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
        export(model, Path(folder), OPENING, card)

    def prompt_length(self, model: Model, condition: Any, *, where: str) -> tuple[int, str]:
        """A prompt's length in tokens, and nothing more to say of them."""
        return len(tokenise.prompt_ids(model, condition, where=where)), ""

    def _sampled(
        self,
        model: Model,
        conditions: Sequence[Any],
        seeds: Sequence[int],
        *,
        mixture: sampling.Mixture | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        if len(conditions) != len(seeds):
            raise UserError(f"{len(conditions)} conditions and {len(seeds)} seeds: sampling needs one seed for each answer")
        questions = []
        for place, (condition, seed) in enumerate(zip(conditions, seeds, strict=True)):
            where = f"condition {place}"
            ids = tokenise.prompt_ids(model, condition, where=where)
            questions.append(sampling.Question(ids, tokenise.ends_of(model, condition, where=where), int(seed)))
        answers = sampling.sample(model, self.settings, questions, mixture=mixture, progress=progress)
        return [text_of(model, ids, question.ends) for ids, question in zip(answers, questions, strict=True)]

    def _refuse_without_base(self, purpose: str) -> None:
        if self.settings.train == "full":
            raise UserError(f"all of the network was trained: load the base anew to {purpose}")


def _candidates(row: Row) -> tuple[Candidate, ...]:
    return tuple(Candidate(row["condition"], answer) for answer in tokenise.answers_of(row))
