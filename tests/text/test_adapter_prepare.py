"""Rows as tokens: order, beginning and end, conversations, limits, groups of other shapes than pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_texts import CHATML, FAMILIES
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.text.adapter import TextAdapter

Make = Callable[..., TextAdapter]
Rows = list[dict[str, Any]]

REWRITING = (  # shows earlier answers only in part, as templates do that hide what a model thought
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last or m['role'] != 'user' %}{{ m['content'] }}{% else %}{{ m['content'][:2] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHATML


def unpadded(ids: Tensor, mask: Tensor) -> list[int]:
    return ids[mask.bool()].tolist()


def texts(model: Model, tensors: Any, row: int, *, special: bool = False) -> list[str]:
    """Prompt and completions as text."""
    decode = model.parts["tokenizer"].decode
    found = [decode(unpadded(tensors["prompt_ids"][row], tensors["prompt_mask"][row]), skip_special_tokens=not special)]
    for ids, mask in zip(tensors["completion_ids"][row], tensors["completion_mask"][row], strict=True):
        found.append(decode(unpadded(ids, mask), skip_special_tokens=not special))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_comes_back_chosen_first(family: str, make_adapter: Make, rows: Rows) -> None:
    """Unicode, an empty prompt and an empty answer included; the prompt ends and the completions begin at the same place."""
    rows = [row for row in rows if row["condition"]["prompt"]] if family == "qwen2" else rows
    adapter = make_adapter(family)
    model = adapter.load()
    tensors = adapter.prepare(model, rows, step=0).tensors
    for place, row in enumerate(rows):
        assert texts(model, tensors, place) == [row["condition"]["prompt"], row["chosen"], row["rejected"]]
    assert tensors["prompt_mask"][:, -1].all() and tensors["completion_mask"][:, :, 0].all()
    assert (tensors["prompt_mask"].diff(dim=-1) >= 0).all() and (tensors["completion_mask"].diff(dim=-1) <= 0).all()
    end = model.parts["tokenizer"].eos_token_id
    for ids, mask in zip(tensors["completion_ids"].flatten(0, 1), tensors["completion_mask"].flatten(0, 1), strict=True):
        assert unpadded(ids, mask)[-1] == end and unpadded(ids, mask).count(end) == 1


def test_the_beginning_token_stands_once(make_adapter: Make) -> None:
    """As the tokenizer has it: Llama's puts one, even before an empty prompt and not again where the text has it; GPT-2's puts
    none, and an empty prompt is its one special token."""
    for family, prompt, expected in (
        ("llama", "a", ["<s>", "a"]),
        ("llama", "<s>a", ["<s>", "a"]),
        ("llama", "", ["<s>"]),
        ("gpt2", "a", ["a"]),
        ("gpt2", "", ["<|endoftext|>"]),
        ("qwen2", "", ["<|im_end|>"]),
    ):
        adapter = make_adapter(family)
        model = adapter.load()
        row = {"pair_id": "p", "condition": {"prompt": prompt}, "chosen": "x", "rejected": "y"}
        tensors = adapter.prepare(model, [row], step=0).tensors
        ids = unpadded(tensors["prompt_ids"][0], tensors["prompt_mask"][0])
        assert model.parts["tokenizer"].convert_ids_to_tokens(ids) == expected, (family, prompt)


def test_an_end_is_appended_once_and_only_where_asked(make_adapter: Make) -> None:
    row = {"pair_id": "p", "condition": {"prompt": "a"}, "chosen": "x", "rejected": "y</s>"}
    for append, expected in ((True, ["x</s>", "y</s>"]), (False, ["x", "y</s>"])):
        adapter = make_adapter("llama", append_eos=append)
        model = adapter.load()
        assert texts(model, adapter.prepare(model, [row], step=0).tensors, 0, special=True)[1:] == expected


def test_an_empty_answer_needs_an_end(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("llama", append_eos=False)
    with pytest.raises(UserError, match="pair p2: an answer is empty.*append_eos"):
        adapter.prepare(adapter.load(), rows, step=0)


def test_conversations_with_a_system_turn(make_adapter: Make, conversations: Rows) -> None:
    adapter = make_adapter("qwen2")
    model = adapter.load()
    tensors = adapter.prepare(model, conversations, step=0).tensors
    start, end = "<|im_start|>", "<|im_end|>\n"
    first = f"{start}system\nBe brief.{end}{start}user\nWhat is it?{end}"
    second = f"{first}{start}assistant\nIt is news.{end}{start}user\nGood?{end}"
    for place, prompt in enumerate((first, second)):
        assert texts(model, tensors, place, special=True) == [f"{prompt}{start}assistant\n", f"yes, it is{end}", f"no{end}"]


def test_a_template_without_an_end_of_turn_gets_the_end_of_the_sequence(
    make_adapter: Make, conversations: Rows, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(WITHOUT_END)
    adapter = make_adapter("llama", chat_template=tmp_path / "t.jinja")
    model = adapter.load()
    prompt, chosen, _ = texts(model, adapter.prepare(model, conversations[:1], step=0).tensors, 0, special=True)
    assert prompt.endswith("user: What is it?\nassistant:") and chosen == " yes, it is\n</s>"
    assert not prompt.startswith("<s>")  # the template says what stands first


@pytest.mark.parametrize(
    ("family", "template", "words"),
    [
        ("qwen2", REWRITING, r"pair c0: .*chat template.*not the beginning of the conversation.*chat_template"),
        ("qwen2", NO_SYSTEM, r"pair c0: the chat template refuses.*\['system', 'user'\].*no system turn here"),
        ("qwen2", "{{ 1 / 0 }}", r"pair c0: the chat template refuses.*division by zero"),
        ("llama", None, "pair c0: .*the tokenizer has no chat template"),
    ],
)
def test_templates_that_do_not_fit(
    family: str, template: str | None, words: str, make_adapter: Make, conversations: Rows, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template or "")
    adapter = make_adapter(family, chat_template=tmp_path / "t.jinja" if template else None)
    with pytest.raises(UserError, match=words):
        adapter.prepare(adapter.load(), conversations, step=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "pair p0: chosen is None"),
        ({"condition": {}}, "pair p0: the prompt is missing"),
        ({"candidates": []}, "pair p0: candidates is empty"),
        ({"candidates": ["a", 3]}, r"candidates\[1\] is 3"),
        ({"condition": {"messages": []}}, "messages is empty"),
        ({"condition": {"messages": [{"role": "user"}]}}, r"messages\[0\]"),
        ({"candidates": ["a", "b", "c"], "target": (0.5, 0.5)}, "pair p0: .*3 candidates but 2 values in target"),
    ],
)
def test_rows_that_are_not_complete(change: dict[str, Any], words: str, make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("llama")
    with pytest.raises(UserError, match=words):
        adapter.prepare(adapter.load(), [{**rows[0], **change}], step=0)


def test_lengths_and_limits(make_adapter: Make, rows: Rows) -> None:
    """Nothing is cut: a row beyond a limit is named by ``lengths`` and refused by ``prepare``."""
    free = make_adapter("llama")
    model = free.load()
    lengths = free.lengths(model, rows)
    assert [found.reason for found in lengths] == [None] * 3
    tensors = free.prepare(model, rows, step=0).tensors
    for place, found in enumerate(lengths):
        assert found.prompt == int(tensors["prompt_mask"][place].sum())
        assert [found.chosen, found.rejected] == tensors["completion_mask"][place].sum(-1).tolist()
    longest = max(max(found.completions) for found in lengths)
    for settings, words in (
        ({"max_prompt_tokens": lengths[0].prompt - 1}, "max_prompt_tokens"),
        ({"max_completion_tokens": longest - 1}, "max_completion_tokens"),
        ({"max_length": max(found.longest for found in lengths) - 1}, "max_length"),
    ):
        adapter = make_adapter("llama", **settings)
        assert any(found.reason is not None and words in found.reason for found in adapter.lengths(model, rows))
        with pytest.raises(UserError, match=f"does not fit.*{words}"):
            adapter.prepare(model, rows, step=0)
    exact = make_adapter("llama", max_completion_tokens=longest)
    assert all(found.reason is None for found in exact.lengths(model, rows))


def test_more_tokens_than_positions(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("gpt2")
    model = adapter.load()
    (found,) = adapter.lengths(model, [{**rows[0], "rejected": "ÿ" * 200}])
    assert found.reason is not None and "192 positions" in found.reason


def test_lists_singles_and_margins(make_adapter: Make) -> None:
    adapter = make_adapter("llama")
    model = adapter.load()
    condition = {"prompt": "a"}
    listed = [{"pair_id": "l", "condition": condition, "candidates": ["x", "yes", "z"], "target": [0.5, 0.3, 0.2]}]
    batch = adapter.prepare(model, listed, step=0)
    assert batch.tensors["completion_ids"].shape[1] == 3 and torch.allclose(batch.target, torch.tensor([[0.5, 0.3, 0.2]]))
    even = adapter.prepare(model, [{**listed[0], "target": None}], step=0)
    assert torch.allclose(even.target, torch.full((1, 3), 1 / 3))

    single = [{"pair_id": str(place), "condition": condition, "completion": "x", "label": bool(place)} for place in range(2)]
    batch = adapter.prepare(model, single, step=0)
    assert (
        batch.desirable is not None and batch.desirable.tolist() == [[False], [True]] and batch.target.tolist() == [[1.0]] * 2
    )

    pair = {"pair_id": "m", "condition": condition, "chosen": "x", "rejected": "y", "margins": [1.5, -0.5], "weight": 2}
    batch = adapter.prepare(model, [pair], step=0)
    assert batch.margins is not None and batch.margins.tolist() == [[1.5, -0.5]] and batch.target.tolist() == [[1.0, 0.0]]
    assert batch.weight is not None and batch.weight.tolist() == [2.0] and batch.desirable is None

    with pytest.raises(UserError, match=r"same number of candidates, found \[1, 2\]"):
        adapter.prepare(model, [pair, single[0]], step=0)
