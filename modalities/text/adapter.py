"""The text adapter: any causal language model of transformers.

Letters: G groups, K candidates in a group, P prompt tokens, U completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.references import adapters_off
from polyalign.core.scores import Scores
from polyalign.modalities.text import export, loading, lora, sampling, tokenise
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.text.tokenise import RowLength

Progress = Callable[[int, int], None]


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
            _checkpoint_activations(network)
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
        for row, found in zip(rows, tokens, strict=True):
            reason = tokenise.measure(model, found, self.settings).reason
            if reason is not None:
                raise UserError(f"pair {row['pair_id']} does not fit: {reason}. Nothing is cut; leave the pair out")
        counts = {len(found.completions): row["pair_id"] for row, found in zip(rows, tokens, strict=True)}
        if len(counts) > 1:
            raise UserError(
                f"rows of one batch need the same number of candidates, found {sorted(counts)} (for instance pairs "
                f"{sorted(map(str, counts.values()))})"
            )
        return Batch.of_groups([_group(row) for row in rows], tokenise.collate(tokens, model.parts["pad_id"]))

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        """The likelihood of tokens needs no randomness."""
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        """The log-probabilities of every completion's tokens, (G, K, U)."""
        _refuse_beyond_positions(batch, model.parts["positions"])
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
        export.export(model, Path(folder), card)

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
        return [self._text(model, ids, question.ends) for ids, question in zip(answers, questions, strict=True)]

    @staticmethod
    def _text(model: Model, ids: list[int], ends: frozenset[int]) -> str:
        """An answer without its end and without special tokens; spaces stay as the model wrote them."""
        ids = ids[:-1] if ids[-1] in ends else ids
        return model.parts["tokenizer"].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _refuse_without_base(self, purpose: str) -> None:
        if self.settings.train == "full":
            raise UserError(f"all of the network was trained: load the base anew to {purpose}")


def _checkpoint_activations(network: Any) -> None:
    """By the name that transformers has for it since 5.x, or by the older one."""
    try:
        if hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable()
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing is not possible with this model ({error}); leave it out") from error


def _refuse_beyond_positions(batch: Batch, positions: int | None) -> None:
    """Rows fit, each by itself; an answer that a baseline joins to another prompt (kto's mismatched) may not."""
    if positions is None:
        return
    prompts, answers = (batch.tensors[name].sum(-1) for name in ("prompt_mask", "completion_mask"))
    longest = int((prompts.unsqueeze(1) + answers).max())
    if longest > positions:
        raise UserError(
            f"a prompt and an answer have {longest} tokens together, and this model has {positions} positions. Each row fits "
            "by itself, so the answer was joined to another row's prompt (objective.baseline: mismatched): set "
            f"prepare.max_prompt_tokens and prepare.max_completion_tokens so that they add up to {positions} at most, or take "
            "another baseline"
        )


def _group(row: Row) -> Group:
    """The preference side of a row. Candidates without a target share it evenly, unless they are a pair."""
    given: dict[str, Any] = {name: tuple(row[name]) for name in ("target", "margins", "desirable") if row.get(name) is not None}
    if row.get("weight") is not None:
        given["weight"] = float(row["weight"])
    count = len(tokenise.answers_of(row))
    if row.get("completion") is not None and row.get("candidates") is None:
        if row.get("label") is not None:
            given["desirable"] = (bool(row["label"]),)
        given.setdefault("target", (1.0,))
    elif row.get("candidates") is not None:
        given.setdefault("target", (1.0 / count,) * count)
    candidates = tuple(Candidate(row["condition"], answer) for answer in tokenise.answers_of(row))
    try:
        return Group(str(row["pair_id"]), candidates, **given)
    except ValueError as error:
        raise UserError(f"pair {row['pair_id']}: {error}") from error
