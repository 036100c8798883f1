"""Scores: log-probabilities as the model's own logits have them, and a first margin of exactly zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from tiny_texts import FAMILIES
from torch import Tensor

from polyalign.core.adapter import Adapter, Model
from polyalign.core.algorithm import DirectPreference
from polyalign.core.errors import UserError
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.recipe import ReferenceConfig
from polyalign.core.references import AdapterOff, FrozenCopy, build_seat
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.tokenise import tokens_of

Make = Callable[..., TextAdapter]
Rows = list[dict[str, Any]]


def by_hand(model: Model, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probabilities of a completion's tokens, from one sequence without padding and all of its logits."""
    logits = model.network(input_ids=torch.tensor([prompt + completion])).logits[0]
    logprobs = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def disturb(model: Model, size: float = 0.1) -> None:
    """What training would do: every trainable number moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["auto", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_models_own_logits(family: str, sharing: str, make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter(family, prefix_sharing=sharing)
    model = adapter.load()
    scores = adapter.score(model, adapter.prepare(model, rows, step=0), None)
    for group, row in enumerate(rows):
        tokens = tokens_of(model, row, adapter.settings)
        for candidate, ids in enumerate(tokens.completions):
            found, mask = scores.values[group, candidate], scores.mask[group, candidate].bool()
            assert torch.allclose(found[mask].double(), by_hand(model, tokens.prompt, ids), atol=2e-5)
            assert int(mask.sum()) == len(ids) and not found[~mask].any()


@torch.no_grad()
def test_conversations_are_scored_after_their_prompt(make_adapter: Make, conversations: Rows) -> None:
    adapter = make_adapter("qwen2")
    model = adapter.load()
    scores = adapter.score(model, adapter.prepare(model, conversations, step=0), None)
    tokens = tokens_of(model, conversations[1], adapter.settings)
    expected = by_hand(model, tokens.prompt, tokens.completions[0])
    assert torch.allclose(scores.values[1, 0][scores.mask[1, 0].bool()].double(), expected, atol=2e-5)


@pytest.mark.parametrize("seat", ["adapter_off", "frozen"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("qwen2", "bfloat16")])
def test_the_first_margin_is_exactly_zero(seat: str, family: str, dtype: str, make_adapter: Make, rows: Rows) -> None:
    """In training mode, with dropout in the base's configuration and in the LoRA; a log-ratio to the reference that is not zero
    for a single token would show a difference of mode, of kernel or of dropout."""
    adapter = make_adapter(family, train="lora" if seat == "adapter_off" else "full", dtype=dtype, dropout=0.3)
    model = adapter.trainable(adapter.load())
    reference = build_seat(ReferenceConfig(seat=seat), model.network)  # type: ignore[arg-type]
    batch = adapter.prepare(model, rows, step=0)
    policy = adapter.score(model, batch, None)
    other = reference.scores(adapter, model, batch, None, index=0)
    assert model.network.training and policy.values.requires_grad and policy.values.dtype == torch.float32
    assert other is not None and torch.equal(policy.values, other.values) and not other.values.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_goes_to_the_lora_alone(family: str, make_adapter: Make, rows: Rows) -> None:
    """And the DPO loss of the first step is ln 2; after a step in its direction the chosen answers are the likelier ones."""
    adapter = make_adapter(family)
    model = adapter.trainable(adapter.load())
    names = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    assert names and all(".default." in name and "lora_" in name and "head" not in name for name in names)
    objective = build(SPEC.validate_python({"name": "dpo"}))
    algorithm = DirectPreference(adapter, model, objective, Beta(0.5, "nats"), {"reference": AdapterOff(model.network)})
    losses = []
    for _ in range(2):
        outcome = algorithm.step(algorithm.prepare(rows, step=0), step=0)["policy"]
        losses.append(float(outcome.loss.detach().mean()))
        outcome.loss.mean().backward()
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.5 * parameter.grad)
                    parameter.grad = None
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[1] < losses[0]


def gradients(adapter: TextAdapter, rows: Rows) -> dict[str, Tensor]:
    model = adapter.trainable(adapter.load())
    disturb(model)
    adapter.score(model, adapter.prepare(model, rows, step=0), None).values.sum().backward()
    return {name: parameter.grad for name, parameter in model.network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_checkpointing_changes_no_gradient(train: str, make_adapter: Make, rows: Rows) -> None:
    found, expected = (gradients(make_adapter("llama", train=train, gradient_checkpointing=on), rows) for on in (True, False))
    assert found.keys() == expected.keys() and len(found) > 8
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def test_full_training_keeps_float32_masters_and_computes_as_asked(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("llama", train="full", dtype="bfloat16")
    model = adapter.trainable(adapter.load())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.network.parameters())
    batch = adapter.prepare(model, rows, step=0)
    low = adapter.score(model, batch, None).values
    high = make_adapter("llama", train="full").score(model, batch, None).values
    assert low.dtype == torch.float32 and not torch.equal(low, high) and torch.allclose(low, high, atol=0.5)


@torch.no_grad()
def test_identical_rows_and_identical_answers_score_the_same(make_adapter: Make, rows: Rows) -> None:
    """The same pair in two places of a batch, and a pair of twice the same answer."""
    adapter = make_adapter("llama")
    model = adapter.load()
    same = {**rows[0], "rejected": rows[0]["chosen"]}
    scores = adapter.score(model, adapter.prepare(model, [rows[0], rows[1], rows[0], same], step=0), None)
    assert torch.allclose(scores.values[0], scores.values[2], atol=1e-6)
    assert torch.allclose(scores.values[3, 0], scores.values[3, 1], atol=1e-6)


@torch.no_grad()
def test_lists_and_singles_score_as_pairs_do(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("llama")
    model = adapter.load()
    pair = adapter.score(model, adapter.prepare(model, rows[:1], step=0), None).values.sum(-1)[0]
    base = {"pair_id": "x", "condition": rows[0]["condition"]}
    answers = [rows[0]["chosen"], "no", rows[0]["rejected"]]
    listed = adapter.score(model, adapter.prepare(model, [{**base, "candidates": answers}], step=0), None).values.sum(-1)[0]
    alone = adapter.score(model, adapter.prepare(model, [{**base, "completion": answers[2]}], step=0), None).values.sum(-1)[0]
    assert torch.allclose(listed[[0, 2]], pair, atol=2e-5) and torch.allclose(alone, pair[1:], atol=2e-5)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("to_q",), r"\['to_q'\] do not fit.*linear layers are named.*q_proj"),
        (("q_proj", "lm_head"), "LoRA on the LM head"),
    ],
)
def test_targets_that_are_not_there_or_not_possible(targets: tuple[str, ...], words: str, make_adapter: Make) -> None:
    adapter = make_adapter("llama", targets=targets)
    with pytest.raises(UserError, match=words):
        adapter.trainable(adapter.load())


def test_a_lora_is_drawn_from_the_seed_and_put_there_once(make_adapter: Make) -> None:
    state = torch.get_rng_state()
    first, again, other = (make_adapter("llama", seed=seed, targets=("q_proj", "v_proj")) for seed in (0, 0, 1))
    models = [adapter.trainable(adapter.load()) for adapter in (first, again, other)]
    drawn = [get_peft_model_state_dict(model.network, adapter_name="default") for model in models]
    assert len(drawn[0]) == 8 and all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not all(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UserError, match="has a LoRA already"):
        first.trainable(models[0])


def test_the_adapter_keeps_the_contract(make_adapter: Make) -> None:
    adapter: Adapter = make_adapter("llama")
    assert adapter.draws(adapter.load(), None, step=0) is None  # type: ignore[arg-type]


def test_a_frozen_copy_stays_where_it_was(make_adapter: Make, rows: Rows) -> None:
    adapter = make_adapter("llama", train="full")
    model = adapter.trainable(adapter.load())
    seat, batch = FrozenCopy(model.network), adapter.prepare(model, rows, step=0)
    before = adapter.score(model, batch, None).values.detach()
    disturb(model)
    assert torch.equal(seat.scores(adapter, model, batch, None, index=0).values, before)
    assert not torch.allclose(adapter.score(model, batch, None).values, before, atol=0.01)


def test_an_answer_joined_to_a_prompt_that_it_does_not_fit_is_refused(make_adapter: Make):
    """As kto's mismatched baseline joins them: every row fits by itself, and the two together do not."""
    adapter = make_adapter("gpt2")
    model = adapter.load()
    positions = model.parts["positions"]
    long = "a " * (positions // 2 - 2)
    texts = [("the " + long, "b"), ("a", "b " + long)]
    rows = [
        {"pair_id": str(place), "condition": {"prompt": prompt}, "chosen": answer, "rejected": "c"}
        for place, (prompt, answer) in enumerate(texts)
    ]
    batch = adapter.prepare(model, rows, step=0)
    adapter.score(model, batch, None)
    rolled = {name: batch.tensors[name].roll(1, 0) for name in ("completion_ids", "completion_mask")}
    joined = replace(batch, tensors={**batch.tensors, **rolled})
    with pytest.raises(UserError, match=f"this model has {positions} positions.*joined to another row's prompt"):
        adapter.score(model, joined, None)
