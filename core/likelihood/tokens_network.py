"""A causal language model taken apart: the states that its LM head sees, and the head itself.

The body is run by calling the network as a whole, with the head's input cut down to nothing by a hook, so that every wrapper
(peft, data parallel, sharding) does what it does for any call, and no logits are made.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Partial

from polyalign.core.errors import UserError
from polyalign.core.likelihood.chunked_head import Head

FACTORS = (
    ("logit_scale", 1),
    ("logits_scaling", -1),
    ("logits_scaling", 1),
    ("lm_head_multiplier", 1),
    ("output_multiplier", 1),
)
"""Names in a model's configuration of what its logits are multiplied by (1) or divided by (-1)."""


@dataclass(frozen=True)
class After:
    """What a family does with the product of its head: logits = softcap tanh(scale z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


_after: weakref.WeakKeyDictionary[nn.Module, After | None] = weakref.WeakKeyDictionary()


def plain(network: nn.Module) -> Any:
    """The model out of a data-parallel wrapper or an engine; peft's wrapper is seen through by itself."""
    return network if hasattr(network, "get_output_embeddings") else getattr(network, "module", network)


def is_cut_up(network: nn.Module) -> bool:
    """Whether FSDP2 has cut the network up over processes."""
    return isinstance(network, FSDPModule)


def states_and_head(network: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Head]:
    """The states (R, L, D) that the LM head of ``network`` sees for rows ``inputs`` (R, L), with gradient, and the head. Where
    the head is more than a linear map with a factor and a soft-cap, they are the network's own logits and a head that leaves
    them as they are.

    Raises:
        UserError: an adapter on the head.
    """
    module = head_module(network)
    after = _what_follows(network, module)
    if after is None:
        return network(**inputs, use_cache=False).logits, Head(None)
    captured: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(args[0])
        return (args[0][:, :0], *args[1:])

    with _hooked(module.register_forward_pre_hook(take)):
        nothing = network(**inputs, use_cache=False).logits
    linear = _in_use(module)
    states = captured[0]
    if is_cut_up(network):
        # A network cut up over processes notices the backward pass by its outputs, so they have to be part of the graph.
        states = states + nothing.sum().to(states.dtype)
    return states, Head(_full(linear.weight), _full(getattr(linear, "bias", None)), after.scale, after.softcap)


def head_module(network: nn.Module) -> nn.Module:
    """The LM head of ``network``.

    Raises:
        UserError: it has none, or one with an adapter.
    """
    model = plain(network)
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise UserError(f"{type(model).__name__} has no LM head: token likelihoods need a causal language model")
    if hasattr(module, "adapter_layer_names") and not hasattr(module, "modules_to_save"):
        raise UserError(
            "the LM head has an adapter, and its weight is used directly here, in chunks, where an adapter does not reach. "
            "Leave the head out of the LoRA's targets (all-linear does), or train it as a whole (peft's modules_to_save)."
        )
    return module


def _in_use(module: nn.Module) -> Any:
    """The layer that computes: peft keeps two of a head that is trained as a whole, its copy and the original."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    wrapper: Any = module
    active = [name for name in wrapper.active_adapters if name in copies]
    return copies[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module


def _full(weight: Tensor | None) -> Any:
    """A sharded weight put together; its gradient is averaged over processes as it is cut up again, as FSDP does."""
    full = getattr(weight, "full_tensor", None)
    return weight if full is None else full(grad_placements=[Partial("avg")])


def _what_follows(network: nn.Module, module: nn.Module) -> After | None:
    """Found out once for each model, from two tokens: whether the logits are the head's product, times a factor or under a
    soft-cap that the configuration has a name for. None where they are something else, or the weight is out of reach."""
    model = plain(network)
    if model not in _after:
        _after[model] = _find_out(network, module)
    return _after[model]


@torch.no_grad()
def _find_out(network: nn.Module, module: nn.Module) -> After | None:
    linear = _in_use(module)
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point() or hasattr(linear.weight, "ds_id"):
        return None  # DeepSpeed's stage 3 has a weight at hand only while its own layer computes
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output.detach())

    device = next(network.parameters()).device
    tokens = torch.tensor([[0, 1]], device=device) % linear.weight.shape[0]
    with _hooked(module.register_forward_hook(look)), without_noise(network):
        logits = network(input_ids=tokens, use_cache=False).logits
    if len(seen) != 1 or seen[0].shape != logits.shape:
        return None
    product = seen[0].double()
    if bool(product.isnan().any()):
        raise UserError(
            "the model gives NaN as logits of two tokens: its weights are damaged, or float16 is too narrow for it. Take "
            "another base, or set dtype: bfloat16 or float32"
        )
    tolerance = 32.0 * torch.finfo(seen[0].dtype).eps
    for after in _candidates(plain(network).config):
        expected = after.scale * product
        if after.softcap is not None:
            expected = after.softcap * torch.tanh(expected / after.softcap)
        if torch.allclose(logits.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return after
    return None


def _candidates(config: Any) -> Iterator[After]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scales = [1.0]
    for name, power in FACTORS:
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value:
            scales.append(float(value) ** power)
    softcap = getattr(text, "final_logit_softcapping", None)
    for cap in (softcap, None) if softcap else (None,):
        yield from (After(scale, cap) for scale in scales)


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def without_noise(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, for a look at a network that must not move the random numbers of its training."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
