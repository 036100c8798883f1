"""One network with its optimiser, on one process, copied to several, or sharded over them.

Copies are kept equal by summing their gradients once a step, instead of by a wrapper around the network. So nothing is sent
for micro-batches but the last, a network may be called any number of times in a step or not at all, and adapters always see
the network itself. Sharded parameters (FSDP2's ``fully_shard``, by accelerate or by hand) bring their own reduction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from polyalign.core.errors import UserError
from polyalign.core.optimisers import build_optimizer
from polyalign.core.recipe import OptimizerConfig

BUCKET_ELEMENTS = 1 << 26


class Learner(Protocol):
    """What the trainer does with a network."""

    network: nn.Module

    def backward(self, loss: Tensor, *, alone: bool, last: bool) -> None:
        """Add the gradient of this process's share of the loss; losses of all processes and micro-batches sum to the batch's.
        ``alone``: no other network has a loss in this step. ``last``: no further micro-batch follows."""
        ...

    def gradient_norm(self) -> float | None:
        """The norm of the whole batch's gradient, after which ``update`` or ``discard`` follows; None where only an update
        tells it."""
        ...

    def update(self, *, learning_rate: float, clip_norm: float | None) -> float:
        """One step of the optimiser. Returns the norm before clipping."""
        ...

    def discard(self) -> None:
        """Forget the gradient."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trainable weights, whole and on the CPU. All processes must call it together."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """As ``weights``, for the optimiser."""
        ...

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None: ...


class TorchLearner:
    """A :class:`Learner` of plain torch."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, accelerator: Accelerator):
        self.accelerator = accelerator
        if accelerator.is_fsdp2:
            optimizer = build_optimizer(trained(network).values(), config)
            self.network, prepared = accelerator.prepare(network, optimizer)
            self.optimizer: torch.optim.Optimizer = prepared.optimizer
        else:
            self.network = network if is_sharded(network) else network.to(accelerator.device)
            self.optimizer = build_optimizer(trained(network).values(), config)
        self.parameters = trained(self.network)
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        self.scaler = accelerator.scaler
        self.norm = 0.0

    def backward(self, loss: Tensor, *, alone: bool, last: bool) -> None:
        if self.sharded:
            loss = loss * self.accelerator.num_processes  # fully_shard takes the mean over processes, we the sum
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if alone:
            loss.backward()
        else:  # this network's loss must leave no gradient in the others, whose losses may share a graph with it
            loss.backward(inputs=list(self.parameters.values()), retain_graph=True)

    def gradient_norm(self) -> float:
        if not self.sharded and self.accelerator.num_processes > 1:
            sum_gradients(list(self.parameters.values()))
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = get_total_norm(self._gradients())
        self.norm = float(whole(norm))
        return self.norm

    def update(self, *, learning_rate: float, clip_norm: float | None) -> float:
        if clip_norm is not None and clip_norm < self.norm < math.inf:
            torch._foreach_mul_(self._gradients(), clip_norm / self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # does nothing where the gradient overflowed
        else:
            self.optimizer.step()
        self.discard()
        return self.norm

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(parameter.detach()).cpu() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        moments = {place: {key: whole(value) for key, value in own.items()} for place, own in state["state"].items()}
        return {"state": moments, "param_groups": state["param_groups"]}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        refuse_other_names(self.parameters, weights)
        for name, parameter in self.parameters.items():
            parameter.copy_(like(weights[name], parameter))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            place: {key: like(value, parameters[int(place)]) for key, value in own.items()}
            for place, own in optimizer_state["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer_state["param_groups"]})


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def is_sharded(network: nn.Module) -> bool:
    """Whether processes hold parts of the weights: FSDP2's, or (with ``ds_id``) those of DeepSpeed's stage 3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in network.parameters())


def refuse_float16(network: nn.Module, mixed_precision: str) -> None:
    """Raises UserError where gradients would vanish in float16: its smallest number is 6e-8, and only fp16's loss scale keeps
    them above it. Weights that are trained cannot be float16 at all, since torch's loss scaling refuses them."""
    halves = [parameter for parameter in network.parameters() if parameter.dtype == torch.float16]
    if halves and mixed_precision != "fp16":
        raise UserError(
            f"model.dtype: float16 with train.mixed_precision: {mixed_precision}: gradients would vanish, since nothing scales "
            "the loss. Set train.mixed_precision to fp16, or model.dtype to bfloat16 or float32."
        )
    if any(parameter.requires_grad for parameter in halves):
        raise UserError("weights that are trained must not be float16: set model.dtype to float32, and fp16 casts as it goes")


def refuse_other_names(parameters: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError unless a checkpoint holds exactly the trained weights."""
    odd = sorted(set(parameters) ^ set(weights))
    if odd:
        raise UserError(
            f"the checkpoint does not fit this network: {len(odd)} names of trained weights are in one of the two only, "
            f"for instance {odd[0]!r}. Was the LoRA's rank or its targets changed?"
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise UserError(
                f"the checkpoint does not fit this network: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here"
            )


def whole(value: Any) -> Any:
    """A sharded tensor put together; all processes must call this together. Anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, parameter: Tensor) -> Any:
    """``value`` sharded as ``parameter`` is, where it has its shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make every process's gradient the sum over processes. A parameter that some process did not reach counts as zero there;
    one that no process reached keeps having no gradient, as it would on one process."""
    reached = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device).int()
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    used = [parameter for parameter, flag in zip(parameters, reached.tolist(), strict=True) if flag]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in buckets([parameter.grad for parameter in used if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most ``BUCKET_ELEMENTS`` elements, so that few messages are sent."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.numel() for other in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
