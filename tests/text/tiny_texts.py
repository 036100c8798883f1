"""Tiny random language models of three families with tokenizers of their own, made in memory or saved into a folder.

llama: byte-level BPE that puts a beginning-of-sequence token, no padding token, RoPE, grouped heads. gpt2: one special token,
which is everything, learnt positions, layers with their weight the other way round, dropout in its configuration, tied
embeddings. qwen2: a chat template whose turns end in a token of their own, biases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES = ("llama", "gpt2", "qwen2")
SPECIAL = {"llama": ["<s>", "</s>"], "gpt2": ["<|endoftext|>"], "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = ["the patient was given a drug and went home", "what is it? it is good news, yes it is", "system user assistant"]


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL[family], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(LETTERS, trainer)
    if family == "llama":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if family == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_network(family: str, tokens: PreTrainedTokenizerFast) -> Any:
    size = {"vocab_size": len(tokens), "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 192,
        "initializer_range": 0.2,
    }
    torch.manual_seed(FAMILIES.index(family))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**size, **shape, attention_dropout=0.1))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**size, **shape))
    return GPT2LMHeadModel(
        GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=192, initializer_range=0.2)  # dropout 0.1, its default
    )


def save_model(family: str, folder: Path) -> Path:
    tokens = make_tokenizer(family)
    make_network(family, tokens).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
