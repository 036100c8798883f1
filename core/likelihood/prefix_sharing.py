"""Attention over rows in which the completions of one prompt stand behind each other and do not see one another.

The mask is a full one (R, 1, L, L), which any attention of transformers takes. Where the network uses SDPA, an attention of our
own takes its place, which does the same in two calls: the prompt is plainly causal and needs no mask, and only the completions'
rows of the mask are read. Asked without such a mask it is transformers' own, to the last bit.

Letters: R rows (groups), L columns.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.core.likelihood.tokens_network import is_cut_up, plain, states_and_head, without_noise
from polyalign.core.likelihood.tokens_rows import Lengths, SharedLayout, separate_rows, shared_rows

ATTENTION = "polyalign_shared_prefix"
"""The name of our attention in transformers' registry."""

FAMILIES = frozenset(
    "cohere cohere2 gemma gemma2 gemma3_text gpt2 gpt_neox granite llama mistral olmo2 phi phi3 qwen2 qwen3 smollm3".split()
)
"""Families for which the tests show that shared rows give what separate ones give; others are tried out first."""

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window",
    "local_attention",
    "attention_chunk_size",
)
WHOLE = frozenset({"full_attention", "sliding_attention"})

_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
_announced: set[tuple[str, str]] = set()


def shared_inputs(network: nn.Module, layout: SharedLayout) -> dict[str, Any]:
    """What ``network`` is called with for rows of ``layout``; its attention has to be one that takes masks."""
    model = plain(network)
    if model.config._attn_implementation == "sdpa" and _follows_registry(model):
        _register()
        model.set_attn_implementation(ATTENTION)
    attention = model.config._attn_implementation
    if attention == "flex_attention":
        return layout.inputs() | {"attention_mask": _block_mask(layout)}
    mask: Any = mask_for(network, layout.visible())
    mask.prompt_columns = layout.prompt_columns
    return layout.inputs() | {"attention_mask": mask}


def mask_for(network: nn.Module, visible: Tensor) -> Tensor:
    """``visible`` (R, L, L) bool as a mask (R, 1, L, L) in the form that the network's attention takes."""
    mask = visible.unsqueeze(1)
    if plain(network).config._attn_implementation != "eager":
        return mask
    dtype = next(network.parameters()).dtype  # eager attention adds the mask to what goes into its softmax
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def why_not(network: nn.Module, layout: SharedLayout) -> str | None:
    """Why ``network`` cannot share the prompts of these rows, in words, or None."""
    config = plain(network).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    assert layout.positions is not None
    return (
        _wrong_attention(plain(network), layout)
        or _wrong_layers(config)
        or _short_window(config, int(layout.positions.max()) + 1)
        or (None if config.model_type in FAMILIES else _try_out(network, layout.ids.device))
    )


def announce(network: nn.Module, reason: str) -> None:
    """Say once, on stderr, that a model's sequences are computed separately."""
    name = type(plain(network)).__name__
    if (name, reason) not in _announced:
        _announced.add((name, reason))
        print(f"{name}: prompts are computed once for each answer, and not shared: {reason}", file=sys.stderr, flush=True)


def pays(config: Any, shared: SharedLayout, separate: tuple[int, int]) -> bool:
    """Whether sharing is less work than ``separate`` (rows, columns). A token's layers cost as much as its attention to four
    times the model's width of others (measured on a CPU); of shared rows the completions' part of the mask is computed in full,
    of separate ones a half."""
    width = 4 * int(getattr(config, "hidden_size", 0) or 768)
    rows, length = shared.ids.shape
    tail = length - shared.prompt_columns
    pairs = rows * (shared.prompt_columns**2 // 2 + tail * length)
    others, columns = separate
    return rows * length * width + pairs < others * columns * width + others * columns**2 // 2


def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA (batch, heads, columns, width) for transformers' registry of attentions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    start = getattr(attention_mask, "prompt_columns", None)
    if start is None or attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    prompt, completions = query.tensor_split([start], dim=2)
    parts = [sdpa_attention_forward(module, prompt, key[:, :, :start], value[:, :, :start], None, **kwargs)[0]]
    if completions.shape[2]:
        rest = attention_mask[:, :, start:]
        parts.append(sdpa_attention_forward(module, completions, key, value, rest, **kwargs)[0])
    return torch.cat(parts, 1), None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _follows_registry(model: Any) -> bool:
    return bool(model._can_set_attn_implementation())


def _block_mask(layout: SharedLayout) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    owner = layout.owner
    assert owner is not None
    parent = owner if layout.parent is None else layout.parent

    def sees(row: Tensor, _: Tensor, column: Tensor, other: Tensor) -> Tensor:
        own = (owner[row, other] == owner[row, column]) | (owner[row, other] == parent[row, column])
        return (other <= column) & ((owner[row, other] == -1) | own)

    rows, length = owner.shape
    return create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=owner.device)


def _wrong_attention(model: Any, layout: SharedLayout) -> str | None:
    attention = model.config._attn_implementation
    if attention in ("sdpa", "eager", ATTENTION) or (attention == "flex_attention" and layout.ids.is_cuda):
        return None
    return f"its attention ({attention}) takes no mask of such a form here; sdpa does"


def _wrong_layers(config: Any) -> str | None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - WHOLE)
    return f"it has layers of the kind {', '.join(others)}, which read a row in its order" if others else None


def _short_window(config: Any, longest: int) -> str | None:
    """Layers that look back over a few columns would see other completions instead of the prompt."""
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    for name in WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and not isinstance(window, bool) and 0 < window < longest:
            return f"it looks back over {window} tokens ({name}), and there are longer sequences"
    return None


def _try_out(network: nn.Module, device: torch.device) -> str | None:
    """Whether a family that we do not know gives for a few tokens in shared rows what it gives in separate ones."""
    model = plain(network)
    if is_cut_up(network):  # others would wait for this process's forward passes
        return (
            f"{model.config.model_type} is not among the families known to be able, nor tried out while cut up over processes"
        )
    if model not in _tried:
        _tried[model] = _compare(network, device)
    return _tried[model]


@torch.no_grad()
def _compare(network: nn.Module, device: torch.device) -> str | None:
    vocabulary = int(plain(network).get_input_embeddings().weight.shape[0])
    tokens = torch.arange(3, 20, device=device) * 7 % vocabulary
    tensors = {
        "prompt_ids": tokens[:5].unsqueeze(0),
        "prompt_mask": torch.ones(1, 5, dtype=torch.long, device=device),
        "completion_ids": tokens[5:17].reshape(1, 3, 4),
        "completion_mask": torch.ones(1, 3, 4, dtype=torch.long, device=device),
    }
    lengths = Lengths.of(tensors)
    separate, shared = separate_rows(tensors, lengths), shared_rows(tensors, lengths)
    with without_noise(network):
        expected, _ = states_and_head(network, separate.inputs())
        try:
            found, _ = states_and_head(network, shared_inputs(network, shared))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as wrong:  # of code that is not ours
            return f"it does not take such rows ({type(wrong).__name__}: {str(wrong).splitlines()[0] if str(wrong) else ''})"
    expected = expected.flatten(0, 1)[separate.predicting].double()
    found = found.flatten(0, 1)[shared.predicting].double()
    allowed = {torch.float64: 1e-9, torch.float32: 1e-4}.get(next(network.parameters()).dtype, 0.05)
    off = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    return None if off <= allowed else f"it does not give the same in shared rows (states are {off:.0e} off)"
