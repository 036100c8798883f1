"""Families that differ in what an adapter has to get right: where positions and dropout come from, what the head does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_score import by_hand
from tiny_texts import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
)

from polyalign.core.errors import UserError
from polyalign.core.references import AdapterOff
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.tokenise import tokens_of

Make = Callable[..., TextAdapter]

SIZE: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_attention_heads": 4, "hidden_size": 32}
SHAPE = {**SIZE, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
CONFIGS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "opt": (  # drops whole layers, counts positions from 2
        "sdpa",
        lambda words: OPTConfig(
            **SIZE, vocab_size=words, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, layerdrop=0.5, dropout=0.1
        ),
    ),
    "bloom": (  # no positions, which its attention takes from the mask; no sdpa
        "eager",
        lambda words: BloomConfig(vocab_size=words, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    ),
    "mixtral": (  # experts whose routing is random in training
        "sdpa",
        lambda words: MixtralConfig(
            **SHAPE, vocab_size=words, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.1
        ),
    ),
    "gemma2": (  # logits through a soft-cap, layers that look back a few tokens
        "eager",
        lambda words: Gemma2Config(**SHAPE, vocab_size=words, num_key_value_heads=2, head_dim=8, sliding_window=8),
    ),
    "mistral": ("sdpa", lambda words: MistralConfig(**SHAPE, vocab_size=words, num_key_value_heads=2, sliding_window=8)),
    "neox": ("sdpa", lambda words: GPTNeoXConfig(**SHAPE, vocab_size=words, attention_dropout=0.1, hidden_dropout=0.1)),
}


def saved(family: str, folder: Path) -> Path:
    tokens = make_tokenizer("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family][1](len(tokens))).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_margin_values_and_samples(family: str, make_adapter: Make, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """In one: a first margin of exactly zero in training mode, values as the model's own logits have them, and answers that do
    not depend on the batch."""
    base, attention = str(saved(family, tmp_path)), CONFIGS[family][0]
    one, three = (make_adapter(base, attention=attention, sample_batch=size, max_new_tokens=12) for size in (1, 3))
    model = one.trainable(one.load())
    batch = one.prepare(model, rows, step=0)
    with torch.no_grad():
        scores = one.score(model, batch, None)
    assert torch.equal(AdapterOff(model.network).scores(one, model, batch, None, index=0).values, scores.values)
    for group, row in enumerate(rows):
        tokens = tokens_of(model, row, one.settings)
        for candidate, ids in enumerate(tokens.completions):
            found = scores.values[group, candidate][scores.mask[group, candidate].bool()]
            with torch.no_grad():
                assert torch.allclose(found.double(), by_hand(model, tokens.prompt, ids), atol=2e-5)
    prompts, seeds = ["The patient was", "a", "What is it? It is good news"], [0, 1, 2]
    assert one.sample(model, prompts, seeds) == three.sample(model, prompts, seeds)


def test_an_attention_that_a_model_does_not_have(make_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no attention: sdpa; set attention: eager"):
        make_adapter(str(saved("bloom", tmp_path))).load()
