"""Sampling: each answer from its own seed and prompt, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_adapter_score import disturb
from tiny_texts import FAMILIES

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.modalities.text import sampling, tokenise
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.sampling import exponentials, pick

Make = Callable[..., TextAdapter]

PROMPTS = ["The patient was", "a", "What is it? It is good news, yes it is", "Größe", "went home and", "", "no"]
SEEDS = [3, 1, 4, 1, 5, 9, 2]


def ids_of(adapter: TextAdapter, model: Model, prompts: list[Any], seeds: list[int], **more: Any) -> list[list[int]]:
    questions = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids = tokenise.prompt_ids(model, prompt, where="here")
        questions.append(sampling.Question(ids, tokenise.ends_of(model, prompt, where="here"), seed))
    return sampling.sample(model, adapter.settings, questions, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(family: str, make_adapter: Make) -> None:
    """One prompt at once, five at once, in another order, and beside others; the same answers each time."""
    one, five = (make_adapter(family, sample_batch=size, max_new_tokens=24) for size in (1, 5))
    model = one.load()
    expected = one.sample(model, PROMPTS, SEEDS)
    assert five.sample(model, PROMPTS, SEEDS) == expected
    assert five.sample(model, PROMPTS[::-1], SEEDS[::-1]) == expected[::-1]
    assert five.sample(model, PROMPTS[3:4], SEEDS[3:4]) == expected[3:4]
    assert len(set(expected)) == len(expected)


def test_many_answers_to_one_prompt(make_adapter: Make) -> None:
    """The prompt is computed once for all of them in a batch; the answers are those that it gets alone."""
    adapter = make_adapter("llama", max_new_tokens=24, sample_batch=8)
    model = adapter.load()
    prompts, seeds = [*["What is it?"] * 5, "a", *["no, it is"] * 4, "What is it?"], list(range(11))
    expected = [adapter.sample(model, [prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert adapter.sample(model, prompts, seeds) == expected and len(set(expected)) == 11
    again = adapter.sample_mixture(model, prompts, seeds, share=0.5, reference=model)
    assert again == expected  # the mixture of the policy with itself


def test_seeds_decide(make_adapter: Make) -> None:
    adapter = make_adapter("llama", max_new_tokens=12)
    model = adapter.load()
    first, again, other = adapter.sample(model, ["a", "a", "a"], [7, 7, 8])
    assert first == again != other
    state = torch.get_rng_state()
    adapter.sample(model, ["a"], [7])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str, make_adapter: Make) -> None:
    adapter = make_adapter(family, temperature=0.0, max_new_tokens=16)
    model = adapter.load()
    for prompt, found in zip(PROMPTS, ids_of(adapter, model, PROMPTS, SEEDS), strict=True):
        ids = torch.tensor([tokenise.prompt_ids(model, prompt, where="here")])
        network: Any = model.network
        stock = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=model.parts["pad_id"]
        )
        assert found == stock[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_gives_what_all_of_the_sequence_gives(family: str, make_adapter: Make) -> None:
    """Left-padded prompts, rows that end and leave the batch, and the cache, against one sequence at a time in full: every
    token is the one that wins its race."""
    adapter = make_adapter(family, max_new_tokens=24, temperature=0.8, top_k=40, top_p=0.9)
    model = adapter.load()
    for prompt, seed, found in zip(PROMPTS, SEEDS, ids_of(adapter, model, PROMPTS, SEEDS), strict=True):
        generator = torch.Generator().manual_seed(seed)
        ids = tokenise.prompt_ids(model, prompt, where="here")
        for token in found:
            with torch.no_grad():
                logits = model.network(input_ids=torch.tensor([ids])).logits[:, -1].double()
            race = exponentials([generator], logits.shape[-1])
            assert token == int(pick(logits.log_softmax(-1), race, temperature=0.8, top_k=40, top_p=0.9))
            ids = [*ids, token]


def test_an_answer_stops_at_its_end(make_adapter: Make) -> None:
    """Made likely here by a head that gives the end a high logit; no token after it, none of it in the text."""
    adapter = make_adapter("llama", max_new_tokens=40)
    model = adapter.load()
    (end,) = model.parts["eos_ids"]
    network: Any = model.network
    bias = torch.zeros(network.config.vocab_size)
    bias[end] = 4.0
    network.lm_head.bias = torch.nn.Parameter(bias)
    found = ids_of(adapter, model, PROMPTS, SEEDS)
    lengths = [len(ids) for ids in found]
    assert len(set(lengths)) > 2 and max(lengths) < 40
    assert all(ids.index(end) == len(ids) - 1 for ids in found)
    assert not any("</s>" in text for text in adapter.sample(model, PROMPTS, SEEDS))


def test_a_conversation_stops_at_the_end_of_the_turn(make_adapter: Make, conversations: list[dict[str, Any]]) -> None:
    adapter = make_adapter("qwen2", max_new_tokens=12)
    model = adapter.load()
    model = replace(model, parts={**model.parts, "eos_ids": ()})  # a base may know nothing of the template's token
    end = model.parts["tokenizer"].convert_tokens_to_ids("<|im_end|>")
    assert tokenise.ends_of(model, conversations[0]["condition"], where="here") == {end}
    assert tokenise.ends_of(model, "plain", where="here") == frozenset()
    texts = adapter.sample(model, [row["condition"] for row in conversations], [0, 1])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_pick_has_the_distribution_it_is_given() -> None:
    """Each id's share of many picks is its probability, to four standard errors."""
    count = 40_000
    rows = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64).log().expand(count, -1)
    race = exponentials([torch.Generator().manual_seed(0)], 4 * count).view(count, 4)

    def shares(**options: Any) -> list[float]:
        found = pick(rows, race, **{"temperature": 1.0, "top_k": None, "top_p": 1.0, **options})
        return (found.bincount(minlength=4) / count).tolist()

    assert shares() == pytest.approx([0.5, 0.2, 0.0, 0.3], abs=0.01)
    assert shares(top_k=2) == pytest.approx([0.625, 0.0, 0.0, 0.375], abs=0.01)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.0, 0.0, 0.375], abs=0.01)
    assert shares(top_p=0.01) == [1.0, 0.0, 0.0, 0.0]
    assert shares(temperature=0.5) == pytest.approx([0.25 / 0.38, 0.04 / 0.38, 0.0, 0.09 / 0.38], abs=0.01)
    assert shares(temperature=0.0) == [1.0, 0.0, 0.0, 0.0]


def test_rounding_does_not_decide_in_a_large_vocabulary() -> None:
    """The noise of another batch size's kernels, 1e-6 on every logit, changes none of 500 picks among 10,000 ids. (A number
    that picks from the cumulative distribution would change several: each boundary moves by some 1e-7.)"""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        logits = 2.0 * torch.randn(50, 10_000, generator=generator, dtype=torch.float64)
        noisy = logits + 1e-6 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        race = exponentials([generator], logits.numel()).view_as(logits)
        first, second = (pick(x.log_softmax(-1), race, temperature=1.0, top_k=None, top_p=1.0) for x in (logits, noisy))
        assert torch.equal(first, second)


def test_a_mixture_of_share_zero_is_the_policy(make_adapter: Make) -> None:
    adapter = make_adapter("llama", max_new_tokens=20)
    model = adapter.trainable(adapter.load())
    disturb(model)
    policy = adapter.sample(model, PROMPTS, SEEDS)
    base = adapter.sample_base(model, PROMPTS, SEEDS)
    assert policy != base and base == adapter.sample(adapter.load(), PROMPTS, SEEDS)
    assert adapter.sample_mixture(model, PROMPTS, SEEDS, share=0.0) == policy
    assert adapter.sample_mixture(model, PROMPTS, SEEDS, share=1.0) == base
    assert adapter.sample_mixture(model, PROMPTS, SEEDS, share=1.0, reference=adapter.load()) == base
    assert model.network.training  # as it was


@torch.no_grad()
def test_a_mixture_is_taken_at_each_token(make_adapter: Make) -> None:
    """Both caches, rows that leave the batch, against both models' full passes."""
    adapter = make_adapter("qwen2", max_new_tokens=16)
    model, reference = adapter.trainable(adapter.load()), adapter.load()
    disturb(model)
    found = ids_of(adapter, model, PROMPTS, SEEDS, mixture=sampling.Mixture(0.25))
    assert found == ids_of(adapter, model, PROMPTS, SEEDS, mixture=sampling.Mixture(0.25, reference))
    for prompt, seed, answer in zip(PROMPTS, SEEDS, found, strict=True):
        generator = torch.Generator().manual_seed(seed)
        ids = tokenise.prompt_ids(model, prompt, where="here")
        for token in answer:
            logits = [part.network(input_ids=torch.tensor([ids])).logits[:, -1].double() for part in (model, reference)]
            mixed = geometric_mixture(logits[0], logits[1], reference_share=0.25)
            race = exponentials([generator], mixed.shape[-1])
            assert token == int(pick(mixed, race, temperature=1.0, top_k=None, top_p=1.0))
            ids = [*ids, token]


def test_progress_and_an_empty_list(make_adapter: Make) -> None:
    adapter = make_adapter("llama", max_new_tokens=2, sample_batch=3)
    model, told = adapter.load(), []
    adapter.sample(model, PROMPTS, SEEDS, progress=lambda done, of: told.append((done, of)))
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert adapter.sample(model, [], []) == []


def test_what_cannot_be_sampled(make_adapter: Make) -> None:
    adapter = make_adapter("gpt2", train="full", max_new_tokens=180)
    model = adapter.load()
    with pytest.raises(UserError, match="2 conditions and 1 seeds"):
        adapter.sample(model, ["a", "b"], [0])
    with pytest.raises(UserError, match="condition 1: the prompt is missing"):
        adapter.sample(model, ["a", {}], [0, 0])
    with pytest.raises(UserError, match="condition 1: its prompt has 30 tokens.*192 positions"):
        adapter.sample(model, ["a", "ÿ" * 15], [0, 0])
    with pytest.raises(UserError, match="load the base anew"):
        adapter.sample_base(model, ["a"], [0])
    with pytest.raises(UserError, match="load the base anew"):
        adapter.sample_mixture(model, ["a"], [0], share=0.5)
    with pytest.raises(UserError, match="share of the mixture is 1.5"):
        adapter.sample_mixture(model, ["a"], [0], share=1.5)


def test_a_model_that_gives_no_numbers_is_refused(make_adapter: Make) -> None:
    """NaN would win every comparison, and the first id of the vocabulary be taken each time: answers of nothing."""
    adapter = make_adapter("llama")
    model = adapter.load()
    with torch.no_grad():
        model.network.get_input_embeddings().weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match="gives NaN as the probabilities"):
        adapter.sample(model, ["a"], [0])


def test_a_prompt_that_is_too_long_is_named_by_its_words(make_adapter: Make) -> None:
    adapter = make_adapter("llama")
    with pytest.raises(UserError, match=r"condition 1: its prompt has .* It begins with '.*went home"):
        adapter.sample(adapter.load(), ["a", "went home " * 2000], [0, 1])
