"""Answers: each from its own seed and prompt, greedy ones those of the stock model's generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_vlm_exactness import MESSAGES, PICTURES
from tiny_vlms import BUILDERS, picture

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.settings import VlmModelSettings

Folder = Callable[[str], Path]
CONDITIONS: list[Any] = [
    {"messages": MESSAGES, "images": PICTURES},
    {"prompt": "describe", "images": PICTURES[:1]},
    {"prompt": "describe", "images": [picture(5)]},  # other pixels, and for most families the same ids
    "what is it",
    {"messages": MESSAGES, "images": PICTURES},
]


def adapters(folder: Path, **settings: Any) -> list[VlmAdapter]:
    """That answer one at a time, and four."""
    return [
        VlmAdapter(VlmModelSettings(str(folder), device="cpu", sample_batch=size, max_new_tokens=8, **settings))
        for size in (1, 4)
    ]


@pytest.mark.parametrize("family", BUILDERS)
def test_answers_do_not_depend_on_the_batch(family: str, tiny_vlms: Folder) -> None:
    one, four = adapters(tiny_vlms(family))
    model = one.load()
    seeds = [3, 4, 4, 5, 6]
    alone = one.sample(model, CONDITIONS, seeds)
    assert alone == four.sample(model, CONDITIONS, seeds)
    assert alone[::-1] == four.sample(model, CONDITIONS[::-1], seeds[::-1])
    assert alone[0] != alone[4]
    if family in ("llava", "gemma3"):  # in the others the two pictures do not change the winner within eight tokens
        assert alone[1] != alone[2]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen3_vl", "smolvlm", "gemma3"])
def test_greedy_answers_are_those_of_generate(family: str, tiny_vlms: Folder) -> None:
    _, four = adapters(tiny_vlms(family), temperature=0.0)
    model = four.load()
    answers = four.sample(model, CONDITIONS[:2], [0, 0])
    processor, network = model.parts["processor"], cast(Any, model.network)
    for condition, answer in zip(CONDITIONS[:2], answers, strict=True):
        parts = [*({"type": "image"} for _ in condition["images"]), {"type": "text", "text": condition.get("prompt")}]
        turns = condition.get("messages", [{"role": "user", "content": parts}])
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn["role"] == "system" else turn
            for turn in turns
        ]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[condition["images"]], return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name not in ("num_crops", "num_patches")}
        with torch.no_grad():
            ids = network.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == answer


def test_what_cannot_be_asked(tiny_vlms: Folder) -> None:
    one, _ = adapters(tiny_vlms("llava"))
    model = one.load()
    with pytest.raises(UserError, match="1 conditions and 2 seeds"):
        one.sample(model, ["a"], [0, 1])
    with pytest.raises(UserError, match="condition 1: 1 image placeholder"):
        one.sample(model, ["a", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}], [0, 1])
    with pytest.raises(UserError, match="more than the model's 2048 positions"):
        one.sample(model, ["red " * 2100], [0])
