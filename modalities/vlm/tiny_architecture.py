"""The embedded base's architecture: LLaVA in every part, small in every size.

A CLIP tower that sees a 32 x 32 picture as 4 patches, a projector, a Llama, and a byte-level tokenizer learnt from the world's
texts, saved with LLaVA's processor as the stock models are. Matrices start at 1 / sqrt(fan in) and embeddings at 0.3:
transformers' 0.02 is made for widths of thousands. At a width of 100 it leaves the language model blind for the pictures, and
unable to tell which of two it is asked about, for thousands of steps.

Pictures of any other size are stretched to 32 x 32: a collage stays whole, and is hardly to be made out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VOCABULARY = 448
CONTEXT = 512
SIDE, PATCH = 32, 16
IMAGE_TOKENS = (SIDE // PATCH) ** 2
MEAN = STD = (0.5, 0.5, 0.5)
PAD, END, IMAGE = "<pad>", "</s>", "<image>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set said = message['content'] %}{% else %}{% set said %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endset %}{% endif %}"
    "{% if message['role'] == 'assistant' %} ASSISTANT: {{ said | trim }}</s>"
    "{% else %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ message['role'] | upper }}: {{ said }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's, ``USER: <image>\\nquestion ASSISTANT: answer</s>``, any number of turns. Answers are trimmed: a sampled one
begins with the space behind the colon."""


def tokenizer_of(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows any text, and has the words of ``texts`` whole. Every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's, whose picture is 32 x 32 whatever it was."""
    pictures = CLIPImageProcessor(
        do_center_crop=False,
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def config_of(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """0.9 million parameters."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Matrices and patches by fan-in, embeddings and positions at 0.3, biases at nothing."""
    for name, parameter in network.named_parameters():
        if "embed_tokens" in name or "position_embedding" in name or "class_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def build(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The network with random weights that follow from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlavaForConditionalGeneration(config_of(tokenizer))
        initialise(network)
    return network


def save(folder: Path, network: LlavaForConditionalGeneration, processor: Any) -> None:
    """A stock LLaVA folder, weights as they are."""
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
