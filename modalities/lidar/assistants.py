"""Copies of a teacher to be trained: whole, or as low-rank changes of its weights.

Letters: K^3 offsets of a kernel, r rank.

Four whole networks of Distillation-DPO (teacher, student, two assistants) are reduced to little more than two where the
assistants are low-rank: they share the teacher's weights and have only their changes of their own. peft knows no sparse
convolution, so the change is a parametrisation of torch's: weight = W + B A, with W (K^3 C_in, C_out) or (C_out, C_in).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polyalign.core.errors import UserError
from polyalign.core.references import frozen_copy
from polyalign.modalities.lidar.layers import SparseConv3d, freeze_statistics

Network = TypeVar("Network", bound=nn.Module)


class LowRankChange(nn.Module):
    """weight -> weight + B A. B begins at 0, so that the copy begins as the teacher, to the last bit."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.reshape(-1, weight.shape[-1]).shape
        down = torch.empty(rank, columns)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def whole_copy(network: Network) -> Network:
    """A copy of which everything is trained but batch statistics."""
    copied = copy.deepcopy(network).requires_grad_(True)
    freeze_statistics(copied)
    return copied


def low_rank_copy(network: Network, rank: int, *, seed: int = 0) -> Network:
    """A copy that shares the frozen weights of ``network`` and trains changes of rank ``rank`` to its convolutions and linear
    layers.

    Raises:
        UserError: a rank below 1, or ``network`` itself is being trained.
    """
    if rank < 1:
        raise UserError(f"low-rank copies need a rank of 1 or more, found {rank}")
    if any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("low-rank copies share the weights of the network, which therefore has to be frozen first")
    copied = frozen_copy(network)
    assert isinstance(copied, type(network))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(copied.modules()):
            name = {SparseConv3d: "kernel", nn.Linear: "weight"}.get(type(module))
            if name is not None:
                change = LowRankChange(getattr(module, name), rank).to(getattr(module, name))
                parametrize.register_parametrization(module, name, change)
    freeze_statistics(copied)
    return copied


@torch.no_grad()
def merged(network: Network, like: Network) -> Network:
    """A plain copy of ``like``, the network that ``network`` was copied from, with its weights: changes are part of them."""
    plain = copy.deepcopy(like)
    values = dict(network.named_buffers())
    for place, module in network.named_modules():
        names = [*module._parameters, *getattr(module, "parametrizations", ())]
        values |= {f"{place}.{name}" if place else name: getattr(module, name) for name in names}
    wanted = set(plain.state_dict())
    plain.load_state_dict({name: value for name, value in values.items() if name in wanted})
    return plain
