"""Train the embedded base: ``python -m polyalign.modalities.text.pretrain FOLDER``.

It learns to summarise stays of the world `clinical`, from summaries that are wrong as often as `clinical.ERRORS` says, so that
there is something to prefer. It is gated at the end, on stays that are held out: of sampled summaries between 0.25 and 0.85 are
right in everything, and of single facts at least 0.9 are right.

Only the summary's tokens count. AdamW with a warm-up and a cosine, and an exponential moving average of the weights, which is
what is kept. Every draw is keyed by its step, so that a killed run continues to the same weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from polyalign.core.randomness import seed_of
from polyalign.datasets.clinical.stay import prompt_of
from polyalign.datasets.worlds import clinical
from polyalign.modalities.pretraining import Pace, Stage, Work, command_line, digest, unfit_in_words, write_record
from polyalign.modalities.text import tiny_architecture as tiny

MODULE = "polyalign.modalities.text.pretrain"
IGNORED = -100
WINDOW = 8
"""Batches that are drawn together and sorted by length, so that little of a batch is padding."""


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were trained with; the command line changes ``steps`` only, for trials."""

    seed: int = 20261121
    steps: int = 2_500
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.998
    tokenizer_stays: int = 3_000
    save_every: int = 500
    measured: int = 400


def random_rows(count: int, seed: int, purpose: str, number: int) -> list[tuple[str, str]]:
    """(prompt, summary as a hurried doctor writes it) of stays that are not held out."""
    draws = random.Random(seed_of(seed, purpose, number))
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        stay = clinical.random_stay(draws)
        prompt = prompt_of(stay)
        if not clinical.held_out(prompt):
            rows.append((prompt, clinical.noisy_summary(stay, draws)))
    return rows


class Data:
    """Batches (ids, labels), each (B, U), by step."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings
        self.pad, self.end = (int(tokenizer.get_vocab()[token]) for token in (tiny.PAD, tiny.END))
        self.window: tuple[int, list[list[tuple[list[int], int]]]] = (-1, [])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        number, place = divmod(step, WINDOW)
        if self.window[0] != number:
            self.window = (number, self._batches(number))
        rows = self.window[1][place]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.pad)
        labels = torch.full((len(rows), longest), IGNORED)
        for index, (row, prompt) in enumerate(rows):
            ids[index, : len(row)] = labels[index, : len(row)] = torch.tensor(row)
            labels[index, :prompt] = IGNORED
        return ids, labels

    def _batches(self, number: int) -> list[list[tuple[list[int], int]]]:
        size = self.settings.batch
        rows = random_rows(size * WINDOW, self.settings.seed, "stays", number)
        encoded = [self._encode(prompt, summary) for prompt, summary in rows]
        encoded.sort(key=lambda row: len(row[0]))
        batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        random.Random(seed_of(self.settings.seed, "order", number)).shuffle(batches)
        return batches

    def _encode(self, prompt: str, summary: str) -> tuple[list[int], int]:
        """Ids of prompt, summary and end, and the prompt's length."""
        first = self.tokenizer(prompt, add_special_tokens=False).input_ids
        second = self.tokenizer(summary, add_special_tokens=False).input_ids
        return [*first, *second, self.end], len(first)


def stage_of(network: LlamaForCausalLM, settings: Settings, folder: Path) -> Stage:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    pace = Pace(settings.steps, settings.rate, settings.warmup, settings.ema, settings.save_every)
    return Stage("summaries", network, optimizer, pace, Work(folder, asdict(settings)))


def loss_at(step: int, network: LlamaForCausalLM, data: Data) -> Tensor:
    """Mean cross-entropy of the summaries' tokens. Rows are padded on the right, where a causal model does not look."""
    ids, labels = data.batch(step)
    logits: Any = network(ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def summaries(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int) -> list[str]:
    """One sample at temperature 1 for each prompt."""
    tokenizer.padding_side = "left"
    sampler: Any = network  # transformers' annotations of generate ask for attributes that its models do not declare
    texts: list[str] = []
    for start in range(0, len(prompts), 100):
        inputs = tokenizer(list(prompts[start : start + 100]), padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + start)
            made = sampler.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, top_k=0, max_new_tokens=220
            )
        texts += tokenizer.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def measure(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, count: int) -> dict[str, float]:
    """Shares over held-out stays: of summaries that are right in everything, and of facts by what became of them."""
    network.eval()
    stays = clinical.stays("heldout", count, settings.seed)
    texts = summaries(network, tokenizer, [prompt_of(stay) for stay in stays], settings.seed)
    network.train()
    verdicts = [clinical.compare(stay, text) for stay, text in zip(stays, texts, strict=True)]
    facts = sum(verdict.facts for verdict in verdicts)
    counts = {
        name: sum(getattr(one, name) for one in verdicts) for name in ("right", "altered", "omitted", "invented", "unreadable")
    }
    shares = {f"facts_{name}": round(value / facts, 4) for name, value in counts.items()}
    return {"right": round(sum(one.score == 1 for one in verdicts) / len(verdicts), 4), **shares}


def unfit(figures: dict[str, float]) -> str | None:
    """Why a base with these figures is none to align, or None."""
    if not 0.25 <= figures["right"] <= 0.85:
        return f"{figures['right']} of its summaries are right in everything; 0.25 to 0.85 leaves something to learn"
    if figures["facts_right"] < 0.9:
        return f"{figures['facts_right']} of its facts are right, which is less than 0.9: it has not learnt to summarise"
    return None


def pretrain(folder: Path, settings: Settings, options: Sequence[str] = ("FOLDER",)) -> dict[str, Any]:
    """Train a base and write it to ``folder`` with ``base.json``, its record, which is returned. ``options`` are the words of
    the command line, for the record.

    Raises:
        UserError: the state in ``FOLDER.work`` is of a run with other settings.
    """
    started = time.time()
    work = folder.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.tokenizer_of(
        text for row in random_rows(settings.tokenizer_stays, settings.seed, "tokenizer", 0) for text in row
    )
    network, data = tiny.build(tokenizer, settings.seed), Data(tokenizer, settings)
    stage_of(network, settings, work).run(
        lambda step: loss_at(step, network, data), lambda: measure(network, tokenizer, settings, settings.measured // 2)
    )
    network.to(torch.float16).save_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    kept = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)  # measured as it is shipped: rounded to float16
    found = {
        "world": "clinical",
        "errors_in_its_summaries": dict(clinical.ERRORS),
        "settings": asdict(settings),
        "sha256": digest(folder),
        "figures": measure(kept, tokenizer, settings, settings.measured),
    }
    return write_record(folder, found, started=started, module=MODULE, options=options)


def main(argv: Sequence[str] | None = None) -> None:
    def train(folder: Path, lengths: dict[str, int], words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        record = pretrain(folder, Settings(**lengths), words)
        return record, unfit_in_words(unfit(record["figures"]))

    command_line(argv, __doc__, {"steps": Settings.steps}, train)


if __name__ == "__main__":
    main()
