"""Reference seats: what a policy is compared with.

A seat turns the policy's model into scores of something else under the *same* draws, without gradient and through the same
network code in the same mode and precision. That is what makes the first margins of a fresh LoRA exactly zero: policy and
reference then run the same kernels on the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from polyalign.core.adapter import Adapter, Model
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.recipe import ReferenceConfig
from polyalign.core.reference_cache import ScoreCache
from polyalign.core.scores import Scores


class Seat(Protocol):
    """One seat. ``index`` names the draws: the step, or a place in a bank of draws."""

    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores | None: ...

    def to(self, device: torch.device) -> None: ...

    def after_step(self, network: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """What most seats do where there is nothing to move, to follow or to save."""

    def to(self, device: torch.device) -> None: ...

    def after_step(self, network: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoReference(Stateless):
    """The empty seat: the log-ratio is the policy's own score."""

    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> None:
        return None


class AdapterOff(Stateless):
    """The base under the adapter, by switching the adapter off: no second copy of anything.

    Raises:
        UserError: the network has no adapter, or trains something that switching off does not undo.
    """

    def __init__(self, network: nn.Module):
        refuse_unless_base_is_frozen(network)

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        with adapters_off(model.network):
            return adapter.score(model, batch, draws).detach()


class NamedAdapter(Stateless):
    """Another adapter on the same base: an earlier round's, or a guide's (TGDPO). ``seat`` and ``key`` say in messages what it
    is for and where it was asked for.

    Raises:
        UserError: the network has no adapter of that name, or it would be trained.
    """

    def __init__(self, network: nn.Module, name: str, *, seat: str = "reference", key: str = "train.reference.adapter_name"):
        self.name = name
        names = sorted({name for layer in adapter_layers(network) for name in adapter_names(layer)})
        if name not in names:
            raise UserError(
                f"the {seat} is the adapter {name!r} ({key}), and the network has "
                f"{f'only {names}' if names else 'no adapter at all'}"
            )
        moving = [key for key, parameter in network.named_parameters() if parameter.requires_grad and f".{name}." in f".{key}."]
        if moving:
            raise UserError(
                f"the adapter {name!r} is the {seat} and is also being trained ({moving[0]} and {len(moving) - 1} more): "
                f"a {seat} must stand still. Train another adapter, or freeze this one."
            )

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        with adapter_chosen(model.network, self.name):
            return adapter.score(model, batch, draws).detach()


class FrozenCopy(Stateless):
    """A copy of the weights as they are when the seat is made. What the policy does not train is shared, not copied, so that
    under a LoRA this costs the LoRA's size and under full training the network's."""

    def __init__(self, network: nn.Module):
        self.network = frozen_copy(network)

    def to(self, device: torch.device) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in self.network.parameters()):
            raise UserError(
                "train.reference.seat: frozen or ema shares the untrained weights with the policy, which DeepSpeed's stage 3 "
                "has cut up. Use adapter_off, which costs nothing, or zero2.yaml."
            )
        self.network.to(device)

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        self.network.train(model.network.training)
        return adapter.score(model.with_network(self.network), batch, draws).detach()


class EMA(FrozenCopy):
    """A reference that follows the policy: mean <- decay * mean + (1 - decay) * policy after every ``every`` steps. Part of the
    checkpoint. With decay 0 it is a copy of the policy of that step (the hard update of TR-DPO, arXiv 2404.09656, and the
    refreshed reference of iterated DPO)."""

    def __init__(self, network: nn.Module, decay: float, *, every: int = 1):
        super().__init__(network)
        self.decay, self.every, self.steps = decay, every, 0
        self.followed = [name for name, parameter in network.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def after_step(self, network: nn.Module) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        mean = dict(self.network.named_parameters())
        policy = {name.removeprefix("module."): parameter for name, parameter in network.named_parameters()}  # an engine's
        if any(hasattr(parameter, "ds_id") for parameter in policy.values()):
            raise UserError("train.reference.seat: ema does not work at DeepSpeed's stage 3; use zero2.yaml or fsdp2.yaml")
        for name in self.followed:
            value = policy[name].detach()
            full = getattr(value, "full_tensor", None)  # a sharded parameter
            mean[name].lerp_((full() if full is not None else value).to(mean[name]), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        mean = dict(self.network.named_parameters())
        counted = {} if self.every == 1 else {"steps": self.steps}
        return {name: mean[name].detach() for name in self.followed} | counted

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.every != 1:
            self.steps = int(state["steps"])
        mean = dict(self.network.named_parameters())
        for name in self.followed:
            mean[name].copy_(state[name])


class StartingWeights(Stateless):
    """The policy itself, which is the reference as long as no step has been taken. Only :class:`Cached` sits on it."""

    def __init__(self) -> None:
        self.steps_taken = False

    def after_step(self, network: nn.Module) -> None:
        self.steps_taken = True

    def state_dict(self) -> dict[str, Any]:
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps_taken = bool(state["steps_taken"])

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        if self.steps_taken:
            raise UserError(
                f"the reference cache lacks pair {batch.group_ids[0]!r}, draw {index}, and training has begun, so the starting "
                "weights are gone. Start anew, or use train.reference.seat: frozen."
            )
        return adapter.score(model, batch, draws).detach()


class Cached:
    """Another seat's scores, computed once for each pair and place in the bank of draws, and kept on the disk.

    A score found is what the seat gave when asked in a batch of the same shape, bit for bit on a CPU; how a GPU sums may depend
    on the shape. ``filled_before_training`` says that the scores have to be there before the first step.
    """

    def __init__(self, seat: Seat, cache: ScoreCache):
        self.seat, self.cache = seat, cache
        self.filled_before_training = isinstance(seat, StartingWeights)

    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores | None:
        found = self.cache.get(batch.group_ids, index, device=next(model.network.parameters()).device)
        if found is not None:
            return found
        live = self.seat.scores(adapter, model, batch, draws, index=index)
        if live is None:
            return None
        self.cache.put(batch.group_ids, index, live)
        # Of pairs that were there before, the kept scores: which of a batch's pairs a resumed run finds is chance.
        return self.cache.get(batch.group_ids, index, device=live.values.device)

    def to(self, device: torch.device) -> None:
        self.seat.to(device)

    def after_step(self, network: nn.Module) -> None:
        self.seat.after_step(network)

    def state_dict(self) -> dict[str, Any]:
        self.cache.flush()
        return self.seat.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seat.load_state_dict(state)


def build_seat(config: ReferenceConfig, network: nn.Module, *, folder: Path | None = None, identity: str = "") -> Seat:
    """The seat a recipe names.

    Args:
        network: the policy's network, with its adapter, before training.
        folder: where ``cached`` keeps its scores.
        identity: everything the cached scores depend on besides the pair's id and the draw: the base with its hash, the pair
            store's hash, the adapter's settings and the seed. Another identity is another cache.
    """
    if config.seat == "none":
        return NoReference()
    if config.seat == "frozen":
        return FrozenCopy(network)
    if config.seat == "adapter":
        return NamedAdapter(network, config.adapter_name)
    if config.seat == "ema":
        return EMA(network, config.ema_decay, every=config.ema_every)
    if config.seat == "adapter_off":
        return AdapterOff(network)
    if folder is None or not identity:
        raise ValueError("a cached reference needs a folder and an identity")
    live: Seat = AdapterOff(network) if adapter_layers(network) else StartingWeights()
    return Cached(live, ScoreCache(folder, identity))


def adapter_layers(network: nn.Module) -> list[Any]:
    """The modules of a network that peft has put an adapter into, by ``get_peft_model`` or diffusers' ``add_adapter``."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_names(layer: Any) -> set[str]:
    """Names of the adapters that a layer holds."""
    return {key for holder in _holders(layer) if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for key in holder.keys()}


def _holders(layer: Any) -> list[Any]:
    """What holds a layer's adapter weights; peft gives dotted paths, some of which a layer may not have."""
    found = [reduce(lambda part, name: getattr(part, name, None), path.split("."), layer) for path in layer.adapter_layer_names]
    return [holder for holder in found if isinstance(holder, nn.Module)]


def adapter_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of the adapter ``name``, in the order of the layers; two adapters of one configuration have them alike."""
    held = [holder[name] for layer in adapter_layers(network) for holder in _holders(layer) if _holds(holder, name)]
    return [weight for part in held for weight in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def _holds(holder: Any, name: str) -> bool:
    return isinstance(holder, nn.ModuleDict | nn.ParameterDict) and name in holder


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The base under the adapters. The flag is set directly: peft's ``enable_adapters`` also changes ``requires_grad``, which
    must not happen between the policy's forward pass and its backward pass."""
    with _attribute(adapter_layers(network), "_disable_adapters", True):
        yield


@contextlib.contextmanager
def adapter_chosen(network: nn.Module, name: str) -> Iterator[None]:
    """The base with the adapter ``name``; layers without it are the base's. ``requires_grad`` stays as it is."""
    with _attribute(adapter_layers(network), "_active_adapter", [name]):
        yield


def choose_adapter(network: nn.Module, name: str) -> None:
    """As :func:`adapter_chosen`, for good."""
    for layer in adapter_layers(network):
        layer._active_adapter = [name]


@contextlib.contextmanager
def _attribute(modules: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    before = [getattr(module, name) for module in modules]
    try:
        for module in modules:
            setattr(module, name, value)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, name, old)


def refuse_unless_base_is_frozen(network: nn.Module) -> None:
    """Raises UserError if switching the adapters off would not give back the weights that training began with."""
    layers = adapter_layers(network)
    if not layers:
        raise UserError(
            "train.reference.seat: adapter_off needs a LoRA or another peft adapter on the network, and there is none. "
            "For full training use seat: frozen (a second copy), cached, or none."
        )
    switched = {id(weight) for layer in layers for holder in _holders(layer) for weight in holder.parameters()}
    outside = [name for name, value in network.named_parameters() if value.requires_grad and id(value) not in switched]
    if outside:
        raise UserError(
            f"train.reference.seat: adapter_off, but {len(outside)} trained parameters lie outside the adapter "
            f"({', '.join(outside[:3])}): with the adapter off they would still move, and with them the reference. "
            "Freeze them, or use seat: frozen."
        )


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that no optimiser knows, sharing the parameters that ``network`` does not train.

    ``requires_grad`` stays as it is, although nothing asks for a gradient: torch chooses CPU convolution kernels by that flag,
    and the copy must give what the policy gives, to the last bit.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared)
