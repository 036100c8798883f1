"""Scores against the stock models' own logits of plain sequences, in float64, on every family: to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import BUILDERS, exact, picture
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.rows import beginnings
from polyalign.modalities.vlm.settings import VlmModelSettings

Folder = Callable[[str], Path]

MESSAGES = [
    {"role": "system", "content": "system"},
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "what"},
            {"type": "image"},
            {"type": "text", "text": "colour is it?"},
        ],
    },
]
PICTURES = [picture(1), picture(2, (30, 60))]
ROWS: list[dict[str, Any]] = [
    {
        "pair_id": "two",
        "condition": {"messages": MESSAGES, "images": PICTURES},
        "chosen": "it is red",
        "rejected": "no",
        "rejected_images": [PICTURES[0], picture(3, (60, 31))],
        "rejected_messages": [{"role": "user", "content": [*MESSAGES[1]["content"][::2], {"type": "text", "text": "which"}]}],
    },
    {
        "pair_id": "one, twice",
        "condition": {"prompt": "describe", "images": [PICTURES[0], PICTURES[0]]},
        "chosen": "both",
        "rejected": "it is in the first image",
        "rejected_images": [PICTURES[0], PICTURES[1]],
        "rejected_messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
    },
    {
        "pair_id": "one",
        "condition": {"prompt": "describe", "images": [PICTURES[0]]},
        "chosen": "red red red red red red red",
        "rejected": "please",
        "rejected_images": [picture(4, (64, 64))],
        "rejected_messages": [{"role": "user", "content": [{"type": "text", "text": "it"}, {"type": "image"}]}],
    },
    {
        "pair_id": "none",
        "condition": {"prompt": "what is it"},
        "chosen": "both",
        "rejected": "",
        "rejected_images": [],
        "rejected_messages": [{"role": "user", "content": "who"}],
    },
]
BRANCHES = ("chosen", "response", "image", "context", "image+response")


def asked(*texts: str) -> list[dict[str, Any]]:
    """A turn with a picture before each text but the first."""
    parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
    return [{"role": "user", "content": parts}]


QUESTIONS: list[dict[str, Any]] = [  # that differ behind their pictures: longer, shorter, one the beginning of the other, not
    {
        "pair_id": "longer",
        "condition": {"messages": asked("user system assistant", "what is it in the image?"), "images": PICTURES[:1]},
        "chosen": "it is red",
        "rejected": "no",
        "rejected_images": PICTURES[1:],
        "rejected_messages": asked("user system assistant", "what is it?"),
    },
    {
        "pair_id": "two pictures",
        "condition": {"messages": asked("user system assistant", "", "describe both"), "images": PICTURES},
        "chosen": "both red",
        "rejected": "",
        "rejected_images": PICTURES[::-1],
        "rejected_messages": asked("user system assistant", "", "describe both images, please"),
    },
    {
        "pair_id": "behind the difference",
        "condition": {"messages": asked("what user system assistant", "is it?"), "images": PICTURES[:1]},
        "chosen": "red",
        "rejected": "both",
        "rejected_images": PICTURES[1:],
        "rejected_messages": asked("which user system assistant", "is it?"),
    },
]
EIGHT = (*BRANCHES, "context+response", "context+image", "context+image+response")


def stock(model: Model, condition: dict[str, Any], completion: list[int]) -> Tensor:
    """Log-probabilities of an answer's tokens from the stock model on one plain sequence, by the stock processor."""
    processor, images = model.parts["processor"], condition.get("images") or None
    parts = [*({"type": "image"} for _ in images or ()), {"type": "text", "text": condition.get("prompt")}]
    turns = condition.get("messages", [{"role": "user", "content": parts}])
    contents = [turn["content"] for turn in turns]
    contents = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    turns = [{**turn, "content": content} for turn, content in zip(turns, contents, strict=True)]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    made = processor(text=[text], images=None if images is None else [images], return_tensors="pt")
    inputs = {name: value for name, value in made.items() if name not in ("num_crops", "num_patches")}
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    logprobs = model.network(**inputs).logits[0].log_softmax(-1)[length - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def counted(module: torch.nn.Module) -> list[int]:
    """A list that grows by one with each pass through the module."""
    runs: list[int] = []
    module.register_forward_hook(lambda *_: runs.append(1))
    return runs


def conditions(row: dict[str, Any]) -> list[dict[str, Any]]:
    given = row["condition"]
    other, lost = {**given, "images": row["rejected_images"]}, {**given, "messages": row["rejected_messages"]}
    return [given, given, other, lost, other]


def opened(folder: Path, branches: tuple[str, ...] = BRANCHES, **settings: Any) -> tuple[VlmAdapter, VlmAdapter, Model]:
    """With shared prompts, with separate ones, and the model in float64."""
    both = [
        VlmAdapter(VlmModelSettings(str(folder), device="cpu", branches=branches, prefix_sharing=how, **settings))
        for how in ("on", "off")
    ]
    model = both[0].load()
    exact(model.network)
    return both[0], both[1], model


@torch.no_grad()
@pytest.mark.parametrize("family", BUILDERS)
def test_scores_are_those_of_the_stock_model(family: str, tiny_vlms: Folder) -> None:
    """Batched, with shared prompts, with separate ones, with and without features computed once; several pictures, one, none,
    the same twice; pictures and questions that lose."""
    adapter, apart, model = opened(tiny_vlms(family))
    batch = adapter.prepare(model, ROWS, step=0)
    body = model.network.model
    tower = next(getattr(body, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(body, name))
    runs = counted(tower)
    shared = adapter.score(model, batch, None)
    assert len(runs) == len({key for key in batch.tensors["picture_key"].flatten().tolist() if key})
    separate = apart.score(model, batch, None)
    pixels = Model(
        model.network, {**model.parts, "family": replace(model.parts["family"], takes_features=False)}, model.identity
    )
    plain = adapter.score(pixels, batch, None)
    for group, row in enumerate(ROWS):
        for candidate, condition in enumerate(conditions(row)):
            length = int(shared.mask[group, candidate].sum())
            ids = batch.tensors["completion_ids"][group, candidate, :length].tolist()
            expected = stock(model, condition, ids)
            for found in (shared, separate, plain):
                assert found.values.dtype == torch.float64 and torch.equal(found.mask, shared.mask)
                assert torch.allclose(found.values[group, candidate, :length], expected, rtol=0.0, atol=1e-9)
                assert not found.values[group, candidate, length:].any()
    assert (shared.values[:3, 0].sum(-1) - shared.values[:3, 2].sum(-1)).abs().min() > 1e-3  # pictures matter
    alone = adapter.prepare(model, ROWS[:1], step=0)
    length = alone.tensors["completion_ids"].shape[-1]
    assert torch.allclose(adapter.score(model, alone, None).values[0], shared.values[0, :, :length], rtol=0.0, atol=1e-9)
    assert torch.equal(adapter.score(model, batch[:1], None).mask[0], shared.mask[0])


@torch.no_grad()
@pytest.mark.parametrize("family", BUILDERS)
def test_questions_about_the_same_pictures(family: str, tiny_vlms: Folder) -> None:
    """Their pictures are computed once, and each question and its answers behind them; not where a picture stands behind the
    first difference."""
    adapter, apart, model = opened(tiny_vlms(family), EIGHT)
    batch = adapter.prepare(model, QUESTIONS, step=0)
    rows = beginnings(batch.tensors, model.parts["image_token"])
    assert [(row.group, row.numbers) for row in rows[:4]] == [(0, (0, 2)), (0, (1, 3)), (1, (0, 2)), (1, (1, 3))]
    assert all(len(row.numbers) == 1 for row in rows[4:])
    shared, separate = (one.score(model, batch, None) for one in (adapter, apart))
    assert torch.allclose(shared.values, separate.values, rtol=0.0, atol=1e-9) and torch.equal(shared.mask, separate.mask)
    for group, row in enumerate(QUESTIONS):
        given = {**row["condition"], "messages": row["rejected_messages"]}
        for place, condition in ((3, given), (7, {**given, "images": row["rejected_images"]})):
            length = int(shared.mask[group, place].sum())
            expected = stock(model, condition, batch.tensors["completion_ids"][group, place, :length].tolist())
            assert torch.allclose(shared.values[group, place, :length], expected, rtol=0.0, atol=1e-9)
    assert (shared.values[:, 0].sum(-1) - shared.values[:, 3].sum(-1)).abs().min() > 1e-3  # questions matter


@pytest.mark.parametrize("rows, branches", [(ROWS, BRANCHES), (QUESTIONS, EIGHT)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_gradients_of_shared_prompts(
    family: str, rows: list[dict[str, Any]], branches: tuple[str, ...], tiny_vlms: Folder
) -> None:
    """Of all weights, vision tower and projector among them."""
    adapter, separate, model = opened(tiny_vlms(family), branches, parts=("language", "projector", "vision"))
    model.network.requires_grad_(True)
    batch, found = adapter.prepare(model, rows, step=0), []
    weights = torch.linspace(-1.0, 1.0, batch.tensors["completion_mask"].numel(), dtype=torch.float64)
    for one in (adapter, separate):
        model.network.zero_grad()
        values = one.score(model, batch, None).values
        (values.flatten() * weights).sum().backward()
        found.append({name: weight.grad for name, weight in model.network.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys() and any("vision" in name or "visual" in name for name in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-7, atol=1e-7), name
