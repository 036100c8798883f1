"""Prompts kept by their content: what comes from memory is what would be made, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import BUILDERS, picture

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import encode_png
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.processing import Prompt, prompt_of
from polyalign.modalities.vlm.prompt_cache import PromptCache
from polyalign.modalities.vlm.settings import VlmModelSettings

torch.set_num_threads(1)


def asked(*seeds: int, words: str = "what is it") -> dict[str, Any]:
    pictures = [{"bytes": encode_png(picture(seed, (40 + 8 * seed, 36))), "path": None} for seed in seeds]
    content = [*({"type": "image"} for _ in seeds), {"type": "text", "text": words}]
    return {"messages": [{"role": "user", "content": content}], "images": pictures}


def same(one: Prompt, other: Prompt) -> bool:
    if one.ids != other.ids or (one.positions is None) != (other.positions is None):
        return False
    if one.positions is not None and other.positions is not None and not torch.equal(one.positions, other.positions):
        return False
    pairs = list(zip(one.pictures, other.pictures, strict=True))
    return all(
        (a.key, a.tokens, a.size, list(a.inputs)) == (b.key, b.tokens, b.size, list(b.inputs))
        and all(
            torch.equal(a.inputs[name], b.inputs[name]) and a.inputs[name].dtype == b.inputs[name].dtype for name in a.inputs
        )
        for a, b in pairs
    )


@pytest.mark.parametrize("family", BUILDERS)
def test_what_is_kept_is_what_is_made(family: str, tiny_vlms: Callable[[str], Path]) -> None:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms(family)), device="cpu"))
    model = adapter.load()
    for condition in (asked(0, 1), asked(2), asked()):
        made = prompt_of(model, condition, where="here")
        assert same(made, adapter.prompt(model, condition, where="here"))
        held = adapter.prompts.kept.bytes
        again = adapter.prompt(model, condition, where="there")
        assert same(made, again) and adapter.prompts.kept.bytes == held > 0
        adapter.sample(model, [condition], [0])
        assert same(made, adapter.prompt(model, condition, where="here")), "sampling leaves it as it was"


@pytest.fixture(scope="module")
def opened() -> tuple[VlmAdapter, Any]:
    adapter = VlmAdapter(VlmModelSettings("tiny", device="cpu"))
    return adapter, adapter.load()


def test_other_content_is_another_prompt(opened: tuple[VlmAdapter, Any]) -> None:
    _, model = opened
    cache, options = PromptCache(2**24), {}
    other = picture(0, (40, 36)).copy()
    other.putpixel((3, 3), (1, 2, 3))
    conditions = [
        asked(0, 1),
        asked(1, 0),
        asked(0, 1, words="what is this"),
        {**asked(0, 1), "images": [{"bytes": encode_png(other), "path": None}, asked(1)["images"][0]]},
        {"prompt": "what is it", "images": asked(0)["images"]},
        "what is it",
    ]
    held = [0]
    for condition in conditions:
        for _ in range(2):
            found = cache.prompt(model, condition, where="here", options=options)
            assert same(found, prompt_of(model, condition, where="here"))
            held.append(cache.kept.bytes)
        assert held[-1] == held[-2] > held[-3], "the first is kept, and taken for the second"
    for other_model, other_options in ((model, {"do_resize": True}), (replace(model, identity="another"), {})):
        cache.prompt(other_model, conditions[0], where="here", options=other_options)
        held.append(cache.kept.bytes)
    assert held[-1] > held[-2] > held[-3]


def test_a_file_is_read_again_and_told_apart_by_what_is_in_it(opened: tuple[VlmAdapter, Any], tmp_path: Path) -> None:
    adapter, model = opened
    condition = {"prompt": "what", "images": [str(tmp_path / "one.png")]}
    keys = []
    for seed in (0, 1):
        picture(seed, (40, 40)).save(tmp_path / "one.png")
        keys.append(adapter.prompt(model, condition, where="here").pictures[0].key)
    assert keys[0] != keys[1]
    (tmp_path / "one.png").unlink()
    with pytest.raises(UserError, match=r"pair 7, images\[0\]: there is no file"):
        adapter.prompt(model, condition, where="pair 7")


def test_memory_is_bounded_and_nothing_depends_on_it(opened: tuple[VlmAdapter, Any]) -> None:
    _, model = opened
    conditions = [asked(seed) for seed in range(4)]
    pictures = prompt_of(model, conditions[0], where="x").pictures
    one = sum(tensor.nbytes for tensor in pictures[0].inputs.values())
    for limit in (0, 2 * one + one // 2):
        cache = PromptCache(limit)
        for condition in conditions * 2:
            assert same(cache.prompt(model, condition, where="x", options={}), prompt_of(model, condition, where="x"))
            assert cache.kept.bytes <= limit
        held = cache.kept.bytes
        assert held > 2 * one or not limit
        cache.prompt(model, asked(0, 1, 2), where="x", options={})
        assert cache.kept.bytes == held, "one that is too large for it puts no other out"


def test_batches_of_kept_prompts_are_the_same_to_the_bit(opened: tuple[VlmAdapter, Any]) -> None:
    adapter, model = opened
    rows = [{"pair_id": str(seed), "condition": asked(seed, 1), "chosen": "a circle", "rejected": "red"} for seed in range(3)]
    first, second = (adapter.prepare(model, rows, step=step).tensors for step in (0, 1))
    fresh = VlmAdapter(adapter.settings).prepare(model, rows, step=0).tensors
    for tensors in (second, fresh):
        assert tensors.keys() == first.keys() and all(torch.equal(tensors[name], first[name]) for name in first)


def test_a_wrong_condition_is_refused_each_time_by_the_name_of_its_place(opened: tuple[VlmAdapter, Any]) -> None:
    adapter, model = opened
    damaged = {"prompt": "a", "images": [encode_png(picture(0))[:60]]}
    for where in ("pair 1", "pair 2"):
        with pytest.raises(UserError, match=rf"{where}, images\[0\]: the picture cannot be decoded"):
            adapter.prompt(model, damaged, where=where)
        with pytest.raises(UserError, match=f"{where}: 1 image placeholder.*and 0 image"):
            adapter.prompt(model, {**asked(0), "images": []}, where=where)
