"""Prompts computed once for all candidates of a group: the same numbers as separate rows, or a refusal in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.core.likelihood import prefix_sharing
from polyalign.core.likelihood.prefix_sharing import ATTENTION, FAMILIES, pays
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.likelihood.tokens_rows import Lengths, SharedLayout, shared_rows

sys.path.insert(0, str(Path(__file__).resolve().parent))

from token_models import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    batch,
    by_the_book,
    farthest,
    gradients,
    model_of,
    with_exact_norms,
)

SHARED, SEPARATE, AUTO = (TokenSettings(prefix_sharing=sharing) for sharing in ("on", "off", "auto"))
KNOWN = ("Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "GPTNeoX", "Phi", "Phi3", "Gemma", "Gemma2", "Gemma3Text", "Cohere")
KNOWN += ("Cohere2", "Granite", "Olmo2", "SmolLM3")
NO_SDPA = ("Gemma2", "sdpa")


def weighted(values: Tensor) -> Tensor:
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=values.dtype)).sum()


def same(network: nn.Module, tensors: dict[str, Tensor], *, gradient: float, value: float = 1e-12) -> None:
    """Shared rows give what separate ones give, and what the book says."""
    shared, separate = (score_tokens(network, tensors, settings) for settings in (SHARED, SEPARATE))
    assert torch.equal(shared.mask, separate.mask)
    torch.testing.assert_close(shared.values, separate.values, rtol=0, atol=value)
    torch.testing.assert_close(shared.values, by_the_book(network, tensors)[0], rtol=0, atol=value)
    assert farthest(gradients(network, weighted(shared.values)), gradients(network, weighted(separate.values))) < gradient


class TestTheSameNumbers:
    @pytest.mark.parametrize(
        ("family", "attention"),
        [(family, attention) for family in KNOWN for attention in ("sdpa", "eager") if (family, attention) != NO_SDPA],
    )
    def test_of_every_known_family(self, family: str, attention: str, capsys: pytest.CaptureFixture[str]) -> None:
        """In float64. Norms and softmaxes that a family always takes in float32 leave its rounding in the gradient: they see
        a prompt's gradient once, summed, and not once for each candidate."""
        network = model_of(family, attention=attention)
        assert network.config.model_type in FAMILIES
        same(network, batch(), gradient=5e-6)
        assert network.config._attn_implementation == (ATTENTION if attention == "sdpa" else "eager")
        assert capsys.readouterr().err == ""

    def test_every_known_family_is_tested(self) -> None:
        import transformers

        assert {getattr(transformers, f"{family}Config").model_type for family in KNOWN} == FAMILIES

    @pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi", "GPT2", "GPTNeoX", "Granite", "Olmo2"])
    def test_to_the_rounding_of_float64(self, family: str) -> None:
        same(with_exact_norms(model_of(family)), batch(), gradient=1e-12)

    @pytest.mark.parametrize("candidates", [2, 3, 5])
    @pytest.mark.parametrize("shape", [(1, 9), (12, 1), (12, 2), (7, 7)])
    def test_of_any_number_of_candidates_and_any_lengths(self, candidates: int, shape: tuple[int, int]) -> None:
        prompt, completion = shape
        tensors = batch(groups=4, candidates=candidates, prompt=prompt, completion=completion, seed=candidates)
        same(with_exact_norms(model_of("Llama")), tensors, gradient=1e-12)

    @pytest.mark.parametrize("family", ["Falcon", "OPT", "DeepseekV3"])
    def test_of_families_that_are_tried_out(self, family: str) -> None:
        network = model_of(family)
        assert network.config.model_type not in FAMILIES
        same(network, batch(), gradient=5e-6)

    def test_in_float32_and_bfloat16(self) -> None:
        same(model_of("Llama", dtype=torch.float32), batch(), value=2e-5, gradient=1e-4)
        network, tensors = model_of("Llama", dtype=torch.bfloat16), batch()
        shared, separate = (score_tokens(network, tensors, settings).values for settings in (SHARED, SEPARATE))
        torch.testing.assert_close(shared, separate, rtol=0.05, atol=0.1)

    def test_under_a_lora_with_gradient_checkpointing(self) -> None:
        torch.manual_seed(1)
        lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
        base: Any = with_exact_norms(model_of("Llama"))
        network = get_peft_model(base, lora).to(torch.float64)
        expected = gradients(network, weighted(score_tokens(network, batch(), SEPARATE).values))
        base.activation_checkpointing_enable()
        network.enable_input_require_grads()
        network.train()
        found = gradients(network, weighted(score_tokens(network, batch(), SHARED).values))
        assert farthest(found, expected) < 1e-12

    def test_dense_statistics(self) -> None:
        network, tensors = model_of("Llama"), batch()
        dense = frozenset({"kl", "confidence", "top_k", "hidden", "runner_up"})
        shared, separate = (
            score_tokens(network, tensors, TokenSettings(prefix_sharing=sharing, dense=dense)) for sharing in ("on", "off")
        )
        assert shared.dense is not None and separate.dense is not None
        for name in ("confidence", "hidden", "runner_up"):
            torch.testing.assert_close(getattr(shared.dense, name), getattr(separate.dense, name), rtol=0, atol=1e-12)
        for name, note in separate.notes.items():
            torch.testing.assert_close(shared.notes[name], note, rtol=0, atol=1e-12)


class TestCandidatesDoNotSeeOneAnother:
    @pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
    def test_to_the_last_bit(self, family: str) -> None:
        network, tensors = model_of(family, attention="eager" if family == "Gemma2" else "sdpa"), batch()
        before = score_tokens(network, tensors, SHARED).values
        for candidate in (0, 1):
            changed = {name: tensor.clone() for name, tensor in tensors.items()}
            changed["completion_ids"][:, candidate] = (changed["completion_ids"][:, candidate] + 11) % 61
            after = score_tokens(network, changed, SHARED).values
            assert torch.equal(after[:, 1 - candidate], before[:, 1 - candidate])
            assert not torch.equal(after[:, candidate], before[:, candidate])

    def test_the_mask(self) -> None:
        """A prompt of two tokens padded to three, completions of which two and one tokens are read."""
        tensors = {
            "prompt_ids": torch.tensor([[0, 1, 2], [3, 4, 5]]),
            "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "completion_ids": torch.tensor([[[6, 7, 8], [9, 10, 0]], [[11, 12, 0], [13, 14, 15]]]),
            "completion_mask": torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 0], [1, 1, 1]]]),
        }
        layout = shared_rows(tensors, Lengths.of(tensors))
        assert layout.ids[0].tolist() == [1, 2, 2, 6, 7, 9] and layout.ids[1].tolist() == [3, 4, 5, 11, 13, 14]
        assert layout.positions is not None and layout.positions[0].tolist() == [0, 1, 2, 2, 3, 2]
        assert layout.visible()[0].int().tolist() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [1, 1, 0, 0, 0, 1],
        ]
        assert layout.predicting.tolist() == [1, 3, 4, 1, 5, 6 + 2, 6 + 3, 6 + 2, 6 + 4, 6 + 5]

    def test_the_mask_of_completions_behind_others(self) -> None:
        """Two pieces behind a prompt of two tokens padded to three, and behind each of them one more. FlexAttention's mask says
        the same."""
        owner = torch.tensor([[-1, -1, -2, 0, 0, 1, 2, 3]])
        parent = torch.tensor([[-1, -1, -1, -1, -1, -1, 0, 1]])
        nothing = torch.zeros_like(owner)
        layout = SharedLayout(nothing, nothing[0, :0], nothing.bool(), nothing, 3, owner, parent)
        visible = layout.visible()
        assert visible[0].int().tolist() == [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0, 1, 0],
            [1, 1, 0, 0, 0, 1, 0, 1],
        ]
        columns, none = torch.arange(8), torch.zeros(8, 8, dtype=torch.long)
        assert torch.equal(prefix_sharing._block_mask(layout).mask_mod(none, none, columns[:, None], columns), visible[0])


class TestModelsThatCannot:
    def refusal(self, network: Any, tensors: dict[str, Tensor]) -> str:
        with pytest.raises(UserError, match="prefix_sharing is on, and .* cannot share prompts: ") as caught:
            score_tokens(network, tensors, SHARED)
        return str(caught.value)

    def falls_back(self, network: Any, capsys: pytest.CaptureFixture[str]) -> str:
        """With ``auto`` such a model says so once, and scores rows separately."""
        prefix_sharing._announced.clear()
        capsys.readouterr()
        tensors = batch(prompt=30, completion=2)
        first, second = (score_tokens(network, tensors, AUTO).values for _ in range(2))
        torch.testing.assert_close(first, by_the_book(network, tensors)[0].to(first.dtype), rtol=1e-4, atol=1e-4)
        assert torch.equal(first, second)
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "computed once for each answer, and not shared: " in said[0]
        return said[0]

    def test_a_sliding_window_shorter_than_the_sequence(self, capsys: pytest.CaptureFixture[str]) -> None:
        for family in ("Mistral", "Gemma3Text"):
            network = model_of(family, sliding_window=8)
            assert "looks back over 8 tokens" in self.refusal(network, batch(prompt=6, completion=5))
            same(network, batch(prompt=4, completion=5), gradient=5e-6)  # the longest has eight tokens to read
            assert "looks back over 8 tokens (sliding_window)" in self.falls_back(network, capsys)

    def test_layers_with_a_state(self, capsys: pytest.CaptureFixture[str]) -> None:
        network = model_of("Mamba", attention="eager", dtype=torch.float32)
        assert "layers of the kind linear_attention" in self.refusal(network, batch())
        assert "linear_attention" in self.falls_back(network, capsys)

    def test_masks_and_positions_that_are_not_heeded(self, capsys: pytest.CaptureFixture[str]) -> None:
        bloom = model_of("Bloom", attention="eager")
        assert "does not take such rows (ValueError" in self.refusal(bloom, batch())
        mpt = model_of("Mpt", attention="eager", dtype=torch.float32)
        assert "does not give the same in shared rows" in self.refusal(mpt, batch())
        assert "does not give the same" in self.falls_back(mpt, capsys)

    def test_an_attention_without_masks(self) -> None:
        network = model_of("Llama")
        network.config._attn_implementation = "flash_attention_2"
        assert "its attention (flash_attention_2) takes no mask of such a form" in self.refusal(network, batch())
        network.config._attn_implementation = "flex_attention"  # asked for on a CPU
        assert "its attention (flex_attention)" in self.refusal(network, batch())


class TestWhenItPays:
    def full(self, prompt: int, completion: int) -> dict[str, Tensor]:
        """A batch without padding."""
        tensors = batch(groups=2, prompt=prompt, completion=completion)
        return tensors | {name: torch.ones_like(tensors[name]) for name in ("prompt_mask", "completion_mask")}

    def shared(self, prompt: int, completion: int) -> bool:
        tensors = self.full(prompt, completion)
        lengths = Lengths.of(tensors)
        return pays(model_of("Llama").config, shared_rows(tensors, lengths), lengths.separate)

    def test_long_prompts_with_short_answers(self) -> None:
        assert self.shared(50, 4) and self.shared(20, 10) and not self.shared(1, 60) and not self.shared(10, 200)

    def test_auto_shares_where_it_pays_and_only_there(self) -> None:
        for (prompt, completion), expected in (((30, 2), ATTENTION), ((1, 40), "sdpa")):
            network = model_of("Llama")
            score_tokens(network, self.full(prompt, completion), AUTO)
            assert network.config._attn_implementation == expected

    def test_single_candidates_have_nothing_to_share(self) -> None:
        network, tensors = model_of("Llama"), batch(candidates=1)
        assert torch.equal(score_tokens(network, tensors, SHARED).values, score_tokens(network, tensors, SEPARATE).values)
        assert network.config._attn_implementation == "sdpa"


def test_our_attention_is_that_of_transformers_for_everything_else() -> None:
    network = model_of("Llama", dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = network(input_ids=ids, attention_mask=mask).logits, network.generate(ids, max_new_tokens=5, do_sample=False)
    score_tokens(network, batch(), SHARED)
    assert network.config._attn_implementation == ATTENTION
    after = network(input_ids=ids, attention_mask=mask).logits, network.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
