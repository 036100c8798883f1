"""A language model small enough to be trained in a test, and its answers: some 'well', then the name of a thing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from zoo_world import THINGS, Prompt, every_prompt, taught  # pyright: ignore[reportMissingImports]

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.randomness import rng
from polyalign.core.scores import Scores

WORDS = ["<pad>", "<end>", "first", "second", "well", *(f"thing{place}" for place in range(THINGS))]
NUMBER = {word: number for number, word in enumerate(WORDS)}
LONGEST = 8


def encode(text: str) -> list[int]:
    return [NUMBER[word] for word in text.split()]


def answer(thing: int, wells: int) -> str:
    return " ".join(["well"] * wells + [f"thing{thing}"])


BETA = {"value": 0.1, "convention": "nats"}
OBJECTIVE: dict[str, float] = {}
TRAIN = {
    "steps": 60,
    "batch_size": 32,
    "micro_batch_size": 32,
    "optimizer": {"learning_rate": 3e-4},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "save_every": 1000,
}


class WordsJudge:
    """1 where the answer ends with the thing asked for, 0 where with another, -1 where it does not end with a thing."""

    name, version, broken_below, right_from = "words", "1", 0.0, 1.0

    def score(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> list[float]:
        return [self._one(prompt, output.split()) for prompt, output in zip(prompts, outputs, strict=True)]

    @staticmethod
    def _one(prompt: Prompt, words: list[str]) -> float:
        if not words or not words[-1].startswith("thing") or any(word != "well" for word in words[:-1]):
            return -1.0
        return float(words[-1] == f"thing{prompt.answer}")


class WordsAdapter:
    """The adapter contract for the language model."""

    modality = "text"

    def __init__(self, base: dict[str, Tensor]):
        self.base = base

    def load(self) -> Model:
        network = new_network()
        network.load_state_dict(self.base)
        return Model(network, {}, "words")

    def trainable(self, model: Model) -> Model:
        return model

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        groups = [Group(row["pair_id"], (Candidate(None, None), Candidate(None, None))) for row in rows]
        answers = [[[*encode(row[side]), NUMBER["<end>"]] for side in ("chosen", "rejected")] for row in rows]
        longest = max(len(tokens) for sides in answers for tokens in sides)
        padded = [[tokens + [0] * (longest - len(tokens)) for tokens in sides] for sides in answers]
        lengths = torch.tensor([[len(tokens) for tokens in sides] for sides in answers])
        prompts = torch.tensor([encode(row["asked"].text) for row in rows])
        tensors = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": torch.tensor(padded),
            "completion_mask": torch.arange(longest) < lengths.unsqueeze(-1),
        }
        return Batch.of_groups(groups, tensors)

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        return score_tokens(model.network, batch.tensors, TokenSettings(prefix_sharing="off", dense=frozenset({"top_k"})))

    @torch.no_grad()
    def sample(self, model: Model, conditions: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        """At temperature 1, each answer with numbers of its own seed."""
        draws = torch.stack([torch.rand(LONGEST, generator=rng(seed, "sample")) for seed in seeds])
        tokens = torch.tensor([encode(prompt.text) for prompt in conditions])
        start = tokens.shape[1]
        for place in range(LONGEST):
            sums = model.network(tokens).logits[:, -1].float().softmax(-1).cumsum(-1)
            following = (sums < draws[:, place : place + 1] * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=len(WORDS) - 1)
            tokens = torch.cat([tokens, following], 1)
        rows = tokens[:, start:].tolist()
        return [" ".join(WORDS[token] for token in row[: row.index(1) if 1 in row else None]) for row in rows]

    def export(self, model: Model, folder: Path) -> None: ...


def new_network() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def right_answer(prompt: Prompt, seed: int) -> str:
    return answer(prompt.answer, random.Random(seed).randrange(4))


def garbage(prompt: Prompt, seed: int) -> str:
    """An answer that the base would never give."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS[2:]) for _ in range(1 + generator.randrange(4)))


def trained_base(steps: int = 400) -> dict[str, Tensor]:
    """The weights of a base that has learnt the data with their mistakes."""
    chooser, generator, known = random.Random(0), rng(0, "words"), every_prompt()
    torch.manual_seed(0)
    network = new_network()
    rows = []
    for _ in range(6000):
        prompt = chooser.choice(known)
        tokens = encode(f"{prompt.text} {answer(taught(prompt, chooser), chooser.randrange(4))}") + [NUMBER["<end>"]]
        rows.append(tokens + [0] * (LONGEST - len(tokens)))
    data = torch.tensor(rows)
    labels = torch.where(data == 0, -100, data)
    labels[:, :3] = -100
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(data), (96,), generator=generator)
        loss = network(data[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
