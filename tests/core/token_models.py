"""Tiny causal language models of many families with random weights, a padded batch, and token likelihoods by the book."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | dict.fromkeys(
    ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0
)
BLOOM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": COMMON,
    "Qwen2": COMMON | {"use_sliding_window": False},
    "Qwen3": COMMON | {"head_dim": 8},
    "Mistral": COMMON,
    "Phi": COMMON,
    "Phi3": COMMON,
    "Gemma": COMMON | {"head_dim": 8},
    "Gemma2": COMMON | {"head_dim": 8, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0},
    "Gemma3Text": COMMON | {"head_dim": 8, "final_logit_softcapping": 1.5},
    "Cohere": COMMON | {"logit_scale": 0.3},
    "Cohere2": COMMON | {"logit_scale": 0.3},
    "Granite": COMMON | {"logits_scaling": 3.0},
    "Olmo2": COMMON,
    "SmolLM3": COMMON,
    "GPTNeoX": COMMON,
    "GPT2": OLD | NO_TOKENS,
    "GPTJ": OLD | NO_TOKENS | {"rotary_dim": 8},
    "OPT": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Falcon": BLOOM | NO_TOKENS | {"num_hidden_layers": 2, "num_attention_heads": 4},
    "Bloom": BLOOM | NO_TOKENS,
    "Mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4} | NO_TOKENS,
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | NO_TOKENS,
    "Mixtral": COMMON | {"num_local_experts": 4},
    "DeepseekV3": COMMON
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "first_k_dense_replace": 2}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
}
NAMES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def model_of(family: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model of ``family`` whose weights are large enough for everything to matter."""
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family] | changes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, NAMES.get(family, f"{family}ForCausalLM"))(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.to(dtype).eval()


def batch(*, groups: int = 3, candidates: int = 2, prompt: int = 6, completion: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Padded prompts and completions of different lengths; among them an empty completion, if there are three groups."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, prompt + 1, (groups,), generator=draw)
    completions = torch.randint(1, completion + 1, (groups, candidates), generator=draw)
    prompts[-1], completions[0, -1] = prompt, completion
    if groups > 2:
        completions[1, 0] = 0
    return {
        "prompt_ids": torch.randint(0, VOCABULARY, (groups, prompt), generator=draw),
        "prompt_mask": (torch.arange(prompt) >= prompt - prompts.unsqueeze(1)).long(),
        "completion_ids": torch.randint(0, VOCABULARY, (groups, candidates, completion), generator=draw),
        "completion_mask": (torch.arange(completion) < completions.unsqueeze(2)).long(),
    }


def by_the_book(network: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions' tokens (G, K, U), and the next-token log-probabilities that they are taken from
    (G, K, U, V): each sequence alone, in full, without padding."""
    groups, candidates, units = tensors["completion_ids"].shape
    values, whole = [], []
    for place in range(groups * candidates):
        g, k = divmod(place, candidates)
        prompt = tensors["prompt_ids"][g][tensors["prompt_mask"][g].bool()]
        completion = tensors["completion_ids"][g, k][tensors["completion_mask"][g, k].bool()]
        logits = network(input_ids=torch.cat([prompt, completion]).unsqueeze(0), use_cache=False).logits[0]
        found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[len(prompt) - 1 : -1]
        missing = units - len(completion)
        values.append(nn.functional.pad(found.gather(1, completion.unsqueeze(1)).squeeze(1), (0, missing)))
        whole.append(nn.functional.pad(found, (0, 0, 0, missing)))
    shape = (groups, candidates, units)
    return torch.stack(values).view(shape), torch.stack(whole).view(*shape, -1)


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Those of the trained parameters; of one that ``loss`` does not depend on, zeros."""
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(own) if gradient is None else gradient
        for (name, own), gradient in zip(named.items(), found, strict=True)
    }


def farthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the largest entry."""
    assert first.keys() == second.keys()
    size = max(float(gradient.abs().max()) for gradient in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / size


def with_exact_norms(network: nn.Module) -> nn.Module:
    """RMS norms in the weights' own precision. Those of transformers are always in float32, and their gradients, summed in a
    different order, differ by float32's rounding in a float64 model."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                weight: Any = child.weight
                exact = nn.RMSNorm(weight.shape, eps=getattr(child, "variance_epsilon", None), dtype=weight.dtype)
                exact.weight = weight
                setattr(parent, name, exact)
    return network
