"""Token likelihoods, each candidate in a row of its own, against full logits; the chunked head and its dense statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from polyalign.core.diagnostics import ches, indicator_figures, top_k
from polyalign.core.errors import UserError
from polyalign.core.likelihood import chunked_head
from polyalign.core.likelihood.chunked_head import Head, divergence, token_statistics
from polyalign.core.likelihood.tokens import DENSE, TokenSettings, score_tokens
from polyalign.core.references import adapters_off

sys.path.insert(0, str(Path(__file__).resolve().parent))

from token_models import VOCABULARY, batch, by_the_book, farthest, gradients, model_of  # noqa: E402  # pyright: ignore[reportMissingImports]

PLAIN = TokenSettings(prefix_sharing="off")
FAMILIES = ("Llama", "GPT2", "GPTNeoX", "Phi", "Gemma2", "Gemma3Text", "Cohere", "Granite", "OPT", "Falcon")
WITHOUT_SDPA = {"Gemma2": "eager", "Bloom": "eager", "Mpt": "eager", "Mamba": "eager", "GPTJ": "eager"}


def weighted(values: Tensor, seed: int = 1) -> Tensor:
    """A loss in which every value has a weight of its own."""
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)).sum()


class TestAgainstFullLogits:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_values_and_all_gradients(self, family: str) -> None:
        network = model_of(family, attention=WITHOUT_SDPA.get(family, "sdpa"))
        tensors = batch()
        scores = score_tokens(network, tensors, PLAIN)
        expected, _ = by_the_book(network, tensors)
        assert scores.values.dtype == torch.float64 and scores.unit.kind == "token"
        assert torch.equal(scores.mask, tensors["completion_mask"].bool())
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-12)
        loose = 2e-6 if family.startswith("Gemma") or family == "Cohere" else 1e-12  # norms in float32 whatever the model is
        assert farthest(gradients(network, weighted(scores.values)), gradients(network, weighted(expected))) < loose

    @pytest.mark.parametrize("family", ["Bloom", "Mpt", "Mamba", "GPTJ", "Mixtral"])
    def test_families_that_compute_in_float32(self, family: str) -> None:
        network, tensors = model_of(family, attention=WITHOUT_SDPA.get(family, "sdpa"), dtype=torch.float32), batch()
        expected, _ = by_the_book(network, tensors)
        torch.testing.assert_close(score_tokens(network, tensors, PLAIN).values, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chunk", [1, 3, 1000])
    @pytest.mark.parametrize("trained", ["all", "body", "head"])
    def test_any_chunk_and_any_part_trained(self, chunk: int, trained: str) -> None:
        network, tensors = model_of("GPT2" if trained == "all" else "Llama"), batch()
        if trained != "all":  # GPT-2 ties its head to its embeddings
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith("lm_head") == (trained == "head"))
        scores = score_tokens(network, tensors, replace(PLAIN, head_chunk=chunk))
        expected, _ = by_the_book(network, tensors)
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-12)
        assert farthest(gradients(network, weighted(scores.values)), gradients(network, weighted(expected))) < 1e-12

    def test_a_large_vocabulary_makes_chunks_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, tensors = model_of("Llama"), batch()
        whole = score_tokens(network, tensors, PLAIN).values
        monkeypatch.setattr(chunked_head, "MOST_LOGITS", 2 * VOCABULARY)
        assert [part.stop - part.start for part in Head(network.lm_head.weight).chunks(torch.zeros(5, 32), 1000)] == [2, 2, 1]
        torch.testing.assert_close(score_tokens(network, tensors, PLAIN).values, whole, rtol=0, atol=1e-12)

    def test_half_precision_is_reduced_in_float32(self) -> None:
        network, tensors = model_of("Llama", dtype=torch.bfloat16), batch()
        scores = score_tokens(network, tensors, PLAIN)
        expected, _ = by_the_book(network, tensors)
        assert scores.values.dtype == torch.float32
        torch.testing.assert_close(scores.values, expected, rtol=0.05, atol=0.05)
        found = gradients(network, weighted(scores.values))
        assert all(gradient.dtype == torch.bfloat16 and bool(gradient.isfinite().all()) for gradient in found.values())

    def test_autocast_reaches_the_head(self) -> None:
        network, tensors = model_of("Llama", dtype=torch.float32), batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = score_tokens(network, tensors, PLAIN)
            expected, _ = by_the_book(network, tensors)
        assert scores.values.dtype == torch.float32
        torch.testing.assert_close(scores.values, expected, rtol=0.02, atol=0.02)
        found, wanted = gradients(network, weighted(scores.values)), gradients(network, weighted(expected))
        assert found["lm_head.weight"].dtype == torch.float32 and farthest(found, wanted) < 0.05

    def test_gradient_checkpointing(self) -> None:
        network, tensors = model_of("Llama"), batch()
        expected = gradients(network, weighted(score_tokens(network, tensors, PLAIN).values))
        network.gradient_checkpointing_enable()
        network.train()
        for sharing in ("off", "on"):
            scores = score_tokens(network, tensors, TokenSettings(prefix_sharing=sharing))
            assert farthest(gradients(network, weighted(scores.values)), expected) < 2e-6


class TestEdges:
    def test_an_empty_completion_is_worth_nothing(self) -> None:
        network, tensors = model_of("Llama"), batch()
        scores = score_tokens(network, tensors, PLAIN)
        assert not scores.mask[1, 0].any() and torch.equal(scores.values[1, 0], torch.zeros(5, dtype=torch.float64))
        found = gradients(network, scores.values[1, 0].sum())
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_a_batch_of_empty_completions(self, sharing: Any) -> None:
        network, tensors = model_of("Llama"), batch()
        tensors["completion_mask"] = torch.zeros_like(tensors["completion_mask"])
        scores = score_tokens(network, tensors, TokenSettings(prefix_sharing=sharing, dense=DENSE))
        assert torch.equal(scores.values, torch.zeros(3, 2, 5, dtype=torch.float64))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(network, scores.values.sum()).values())

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_an_impossible_token_makes_no_nan(self, softcap: float | None) -> None:
        states = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 8, dtype=torch.float64)
        bias = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
        head = Head(weight, bias, softcap=softcap)
        found = token_statistics(head, states, torch.tensor([0, 1, 3, 4]), rows=3, confidence=True, k=10)
        kl = divergence(head, states, Head(weight, bias, softcap=softcap), states.detach() + 0.1, rows=3)
        (gradient,) = torch.autograd.grad(found.value.sum() + kl.sum(), states)
        everything = (found.value, found.confidence, found.mass, found.entropy, found.renormalised, kl, gradient)
        assert all(part is not None and bool(part.isfinite().all()) for part in everything)

    def test_padding_does_not_matter(self) -> None:
        network, tensors = model_of("Llama"), batch()
        wider = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in ("prompt_ids", "prompt_mask"):
            wider[name] = nn.functional.pad(wider[name], (4, 0))
        for name in ("completion_ids", "completion_mask"):
            wider[name] = nn.functional.pad(wider[name], (0, 3))
        wider["prompt_ids"][wider["prompt_mask"] == 0] = 7
        wider["completion_ids"][wider["completion_mask"] == 0] = 9
        for settings in (PLAIN, TokenSettings(prefix_sharing="on")):
            first, second = (score_tokens(network, part, settings).values for part in (tensors, wider))
            assert torch.equal(first, second[..., :5]) and not second[..., 5:].any()

    def test_rows_that_no_one_could_score_are_refused(self) -> None:
        network, tensors = model_of("Llama"), batch()
        with pytest.raises(ValueError, match="at least one token"):
            score_tokens(network, tensors | {"prompt_mask": torch.zeros_like(tensors["prompt_mask"])}, PLAIN)
        with pytest.raises(ValueError, match="padding on the left"):
            score_tokens(network, tensors | {"prompt_mask": tensors["prompt_mask"].flip(1)}, PLAIN)
        with pytest.raises(ValueError, match="padding on the right"):
            score_tokens(network, tensors | {"completion_mask": tensors["completion_mask"].flip(2)}, PLAIN)

    def test_settings_outside_of_what_is_allowed(self) -> None:
        wrong: list[dict[str, Any]] = [{"prefix_sharing": "yes"}, {"head_chunk": 0}, {"dense": frozenset({"entropy"})}]
        for settings in wrong:
            with pytest.raises(UserError, match=f"{next(iter(settings))} is .*; allowed"):
                TokenSettings(**settings)

    def test_training_mode_and_random_numbers_are_left_alone(self) -> None:
        network, tensors = model_of("Llama"), batch()
        network.model.train()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        score_tokens(network, tensors, TokenSettings(prefix_sharing="on"))
        assert torch.equal(torch.get_rng_state(), before)
        assert network.model.training and not network.training and not network.lm_head._forward_pre_hooks


class TestMemory:
    @pytest.mark.parametrize("trained", ["all", "body"])
    def test_nothing_of_the_size_of_the_logits_is_kept(self, trained: str) -> None:
        network, tensors = model_of("Llama", vocab_size=997), batch()
        network.lm_head.requires_grad_(trained == "all")
        kept: list[tuple[int, ...]] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            dense = frozenset({"kl", "confidence", "top_k", "runner_up"})
            scores = score_tokens(network, tensors, TokenSettings(prefix_sharing="off", dense=dense))
            assert scores.dense is not None and scores.dense.distributions is not None
            kl = scores.dense.distributions.divergence_from(scores.dense.distributions.detach())
        assert kept and {tuple(sorted(shape)) for shape in kept if 997 in shape} <= {(32, 997)}  # the head's weight
        assert bool(scores.values.requires_grad and kl.requires_grad)


class TestDense:
    def settings(self, *names: str) -> TokenSettings:
        return TokenSettings(prefix_sharing="off", dense=frozenset(names), head_chunk=4)

    @pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Cohere"])
    def test_confidence_and_top_k(self, family: str) -> None:
        network, tensors = model_of(family), batch()
        scores = score_tokens(network, tensors, self.settings("confidence", "top_k"))
        values, whole = by_the_book(network, tensors)
        mask = scores.mask
        assert scores.dense is not None and scores.dense.confidence is not None and scores.dense.distributions is None
        confidence = scores.dense.confidence
        assert not confidence.requires_grad and not confidence[~mask].any()
        torch.testing.assert_close(confidence[mask], (values - (2 * whole).logsumexp(-1))[mask], rtol=0, atol=1e-11)
        wanted = top_k(whole, mask)
        for name, expected in (("mass", wanted.mass), ("entropy", wanted.entropy), ("renormalised", wanted.renormalised)):
            torch.testing.assert_close(scores.notes[f"top_k_{name}"][mask], expected[mask], rtol=0, atol=1e-11)
        figures = indicator_figures(scores)
        torch.testing.assert_close(
            figures["top_k/entropy"][0, 1],
            wanted.mean_bits(wanted.entropy * 0) + wanted.entropy[0, 1].mean() / 0.6931471805599453,
        )
        assert float(figures["top_k/mass"][1, 0]) == 0.0

    @pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere"])
    def test_runner_up(self, family: str) -> None:
        """The likeliest token besides the one that is there, with the gradient of its log-probability."""
        network, tensors = model_of(family, attention="eager" if family == "Gemma2" else "sdpa"), batch()
        scores = score_tokens(network, tensors, self.settings("runner_up"))
        _, whole = by_the_book(network, tensors)
        labels = tensors["completion_ids"].unsqueeze(-1)
        expected = whole.scatter(-1, labels, -torch.inf).amax(-1)
        mask = scores.mask
        assert scores.dense is not None and scores.dense.runner_up is not None and "runner_up" in scores.provides
        found = scores.dense.runner_up
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-11)
        assert not found[~mask].any()
        ours, theirs = (gradients(network, weighted(values * mask)) for values in (found, expected))
        assert farthest(ours, theirs) < (1e-12 if family == "Llama" else 2e-6)  # norms in float32 whatever the model is
        detached = scores.detach().dense
        assert detached is not None and detached.runner_up is not None and not detached.runner_up.requires_grad

    def test_asking_for_nothing_gives_nothing(self) -> None:
        scores = score_tokens(model_of("Llama"), batch(), PLAIN)
        assert scores.dense is None and scores.notes == {} and scores.provides == {"value", "per_unit"}

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_hidden_states_for_ches(self, sharing: Any) -> None:
        network, tensors = model_of("Llama"), batch(groups=2)
        scores = score_tokens(network, tensors, TokenSettings(prefix_sharing=sharing, dense=frozenset({"hidden"})))
        assert scores.dense is not None and scores.dense.hidden is not None
        hidden = scores.dense.hidden
        assert hidden.shape == (2, 2, 5, 32) and not hidden.requires_grad
        logits = (hidden @ network.lm_head.weight.T).log_softmax(-1)
        found = logits.gather(3, tensors["completion_ids"].unsqueeze(3)).squeeze(3)
        torch.testing.assert_close(found[scores.mask], scores.values[scores.mask], rtol=0, atol=1e-12)
        assert ches(hidden[:, 0], hidden[:, 1], scores.mask[:, 0], scores.mask[:, 1]).shape == (2,)

    @pytest.mark.parametrize("trained", ["all", "body"])
    @pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
    def test_divergence_in_value_and_gradient(self, family: str, trained: str) -> None:
        network, tensors = model_of(family), batch()
        if trained == "body":
            network.lm_head.requires_grad_(False)
        other = model_of(family)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        policy, reference = (score_tokens(part, tensors, self.settings("kl")).dense for part in (network, other))
        assert policy is not None and policy.distributions is not None and reference is not None
        kl = policy.distributions.divergence_from(reference.detach().distributions)
        (_, own), (_, theirs) = by_the_book(network, tensors), by_the_book(other, tensors)
        expected = (theirs.detach().exp() * (theirs.detach() - own)).sum(-1)
        torch.testing.assert_close(kl, expected, rtol=0, atol=1e-11)
        assert bool((kl[tensors["completion_mask"].bool()] > 0).all())
        loose = 2e-6 if family.startswith("Gemma") else 1e-11
        assert farthest(gradients(network, weighted(kl)), gradients(network, weighted(expected))) < loose

    def test_divergence_from_oneself_is_exactly_zero(self) -> None:
        network, tensors = model_of("Llama", dtype=torch.float32), batch()
        policy = score_tokens(network, tensors, self.settings("kl"))
        with torch.no_grad():
            reference = score_tokens(network, tensors, self.settings("kl"))
        assert policy.dense is not None and policy.dense.distributions is not None and reference.dense is not None
        kl = policy.dense.distributions.divergence_from(reference.dense.distributions)
        assert torch.equal(kl, torch.zeros_like(kl))
        assert torch.equal(policy.values, reference.values)


class OddHead(nn.Module):
    """A head that is not linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, states: Tensor) -> Tensor:
        return torch.sinh(self.linear(states))


class TestHeads:
    def lora(self, network: Any, **options: Any) -> Any:
        torch.manual_seed(1)
        options = {"target_modules": ["q_proj", "v_proj", "gate_proj"]} | options
        return get_peft_model(network, LoraConfig(r=4, init_lora_weights=False, **options)).to(torch.float64)

    def test_a_lora_on_the_body(self) -> None:
        network, tensors = self.lora(model_of("Llama")), batch()
        scores = score_tokens(network, tensors, PLAIN)
        expected, _ = by_the_book(network, tensors)
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-12)
        found = gradients(network, weighted(scores.values))
        assert all("lora_" in name for name in found)
        assert farthest(found, gradients(network, weighted(expected))) < 1e-12
        with adapters_off(network):
            base = score_tokens(network, tensors, PLAIN).values
        torch.testing.assert_close(base, by_the_book(model_of("Llama"), tensors)[0], rtol=0, atol=1e-12)

    def test_a_lora_on_the_head_is_refused(self) -> None:
        network = self.lora(model_of("Llama"), target_modules=["q_proj", "lm_head"])
        with pytest.raises(UserError, match="the LM head has an adapter"):
            score_tokens(network, batch(), PLAIN)

    def test_a_head_trained_as_a_whole_beside_a_lora(self) -> None:
        network, tensors = self.lora(model_of("Llama"), modules_to_save=["lm_head"]), batch()
        with torch.no_grad():
            network.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        scores = score_tokens(network, tensors, PLAIN)
        expected, _ = by_the_book(network, tensors)
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-12)
        assert farthest(gradients(network, weighted(scores.values)), gradients(network, weighted(expected))) < 1e-12
        with adapters_off(network):
            base = score_tokens(network, tensors, PLAIN).values
        torch.testing.assert_close(base, by_the_book(model_of("Llama"), tensors)[0], rtol=0, atol=1e-12)

    def test_a_head_with_a_bias(self) -> None:
        network, tensors = model_of("Phi"), batch()
        assert network.lm_head.bias is not None
        scores = score_tokens(network, tensors, PLAIN)
        found, wanted = (gradients(network, weighted(v)) for v in (scores.values, by_the_book(network, tensors)[0]))
        torch.testing.assert_close(found["lm_head.bias"], wanted["lm_head.bias"], rtol=0, atol=1e-12)
        assert bool(wanted["lm_head.bias"].abs().max() > 0.01)

    def test_a_head_that_is_more_than_a_linear_map(self) -> None:
        network, tensors = model_of("Llama"), batch()
        network.lm_head = OddHead(network.lm_head)
        settings = TokenSettings(prefix_sharing="on", dense=frozenset({"confidence", "kl"}), head_chunk=3)
        scores = score_tokens(network, tensors, settings)
        expected, whole = by_the_book(network, tensors)
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-11)
        assert farthest(gradients(network, weighted(scores.values)), gradients(network, weighted(expected))) < 2e-6
        with pytest.raises(UserError, match="more than a linear map"):
            score_tokens(network, tensors, replace(settings, dense=frozenset({"hidden"})))

    def test_a_model_without_a_head_is_refused(self) -> None:
        with pytest.raises(UserError, match="LlamaModel has no LM head"):
            score_tokens(model_of("Llama").model, batch(), PLAIN)


def test_a_network_that_gives_no_numbers_is_refused_in_words() -> None:
    network = model_of("Llama")
    with torch.no_grad():
        network.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="gives NaN as logits"):
        score_tokens(network, batch(), PLAIN)
