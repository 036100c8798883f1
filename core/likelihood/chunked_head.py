"""What an LM head says of positions, without ever holding the logits of all of them.

    z = c tanh(s (h W' + b) / c)        logits; s and c are 1 and absent for most families
    l = z_y - log sum_v exp z_v         log-probability of the token y

is taken in chunks of positions. Nothing of the size positions x vocabulary outlives its chunk. Where the head is frozen (a
LoRA on the body), the gradient dl/dh = s (W_y - sum_v p_v W_v) is made in the forward pass, since the probabilities are at
hand there: as small as h, and the backward pass is a multiplication. Where the head is trained too, the backward pass computes
each chunk's logits again.

Letters: N positions, D width of the states, V size of the vocabulary. Sums over the vocabulary are in float32, or in float64
where the states are; a product with W is in the head's own precision, as the model itself takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from polyalign.core.diagnostics import indicators_of

MOST_LOGITS = 1 << 26
"""Logits at once, 256 MiB in float32: with a large vocabulary a chunk has fewer positions than asked for."""


@dataclass(frozen=True)
class Head:
    """A linear map and what follows it. ``weight`` (V, D), or None where the states are logits already; ``bias`` (V,)."""

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> Head:
        parts = (None if part is None else part.detach() for part in (self.weight, self.bias))
        return Head(*parts, scale=self.scale, softcap=self.softcap)

    def cast(self, states: Tensor) -> tuple[Tensor, Head]:
        """States and head in the precision of their product: the head's, or autocast's."""
        if self.weight is None:
            return states, self
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return states.to(dtype), Head(self.weight.to(dtype), bias, self.scale, self.softcap)

    def logits(self, states: Tensor) -> Tensor:
        """(n, V), in float32 or wider, in memory of their own."""
        product = states.clone() if self.weight is None else functional.linear(states, self.weight, self.bias)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def bend(self, logits: Tensor) -> Tensor | None:
        """The soft-cap's derivative at ``logits``; None without one."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square_()

    def chunks(self, states: Tensor, rows: int) -> Iterator[slice]:
        vocabulary = states.shape[-1] if self.weight is None else self.weight.shape[0]
        size = max(1, min(rows, MOST_LOGITS // vocabulary))
        return (slice(start, min(start + size, len(states))) for start in range(0, max(1, len(states)), size))


@dataclass(frozen=True)
class Statistics:
    """Of each position (N,). ``value`` has gradient; the others are detached, and None unless asked for: ``confidence`` is
    log p - log sum p^2, the rest is of the k most probable tokens, as in :class:`polyalign.core.diagnostics.TopK`."""

    value: Tensor
    confidence: Tensor | None
    mass: Tensor | None
    entropy: Tensor | None
    renormalised: Tensor | None


def token_statistics(
    head: Head, states: Tensor, targets: Tensor, *, rows: int, confidence: bool = False, k: int | None = None
) -> Statistics:
    """Statistics of the tokens ``targets`` (N,) under the distributions that ``head`` makes of ``states`` (N, D), ``rows``
    positions at a time."""
    states, head = head.cast(states)
    with torch.autocast(states.device.type, enabled=False):
        return Statistics(*_LogProbability.apply(states, head.weight, head.bias, head, targets, rows, confidence, k, _tracks()))


@torch.no_grad()
def likeliest_others(head: Head, states: Tensor, targets: Tensor, *, rows: int) -> Tensor:
    """The most probable token at each position (N,) other than ``targets`` (N,): the arg-max, or the second best where that is
    the target."""
    states, head = head.detach().cast(states.detach())
    found = []
    with torch.autocast(states.device.type, enabled=False):
        for part in head.chunks(states, rows):
            logits = head.logits(states[part])
            found.append(logits.scatter_(1, targets[part].unsqueeze(1), -torch.inf).argmax(-1))
    return torch.cat(found)


def divergence(policy: Head, states: Tensor, reference: Head, reference_states: Tensor, *, rows: int) -> Tensor:
    """KL(reference || policy) at each position (N,), with gradient for the policy's states and head alone.

    Exactly 0 where the two agree, and 0 log 0 = 0 where the reference gives a token no probability.
    """
    states, policy = policy.cast(states)
    other_states, reference = reference.detach().cast(reference_states.detach())
    with torch.autocast(states.device.type, enabled=False):
        return _Divergence.apply(states, policy.weight, policy.bias, policy, other_states, reference, rows, _tracks())


def _tracks() -> bool:
    """Whether a graph is being made: inside of a Function torch no longer says."""
    return torch.is_grad_enabled()


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        rows: int,
        confidence: bool,
        k: int | None,
        tracks: bool,
    ) -> tuple[Tensor | None, ...]:
        head = Head(weight, bias, head.scale, head.softcap)
        ctx.again = tracks and any(ctx.needs_input_grad[1:3])
        slopes = torch.empty_like(states) if tracks and ctx.needs_input_grad[0] and not ctx.again else None
        found = []
        for part in head.chunks(states, rows):
            logits = head.logits(states[part])
            found.append(_chunk_statistics(logits, targets[part], confidence, k))
            if slopes is not None:
                slopes[part] = _slope(head, logits, targets[part])
        ctx.head, ctx.rows = (head.scale, head.softcap), rows
        ctx.save_for_backward(*((states, weight, bias, targets) if ctx.again else (slopes,)))
        outputs = tuple(None if column[0] is None else torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rest = (None,) * 6
        if not ctx.again:
            (slopes,) = ctx.saved_tensors
            return None if slopes is None else _scaled(slopes, gradient), None, None, *rest
        states, weight, bias, targets = ctx.saved_tensors
        head, sums = Head(weight, bias, *ctx.head), _Gradients.like(ctx, states, weight, bias)
        for part in head.chunks(states, ctx.rows):
            logits = head.logits(states[part])
            bend = head.bend(logits)
            logits = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            change = logits.div_(-logits.sum(-1, keepdim=True))
            change.scatter_add_(1, targets[part].unsqueeze(1), torch.ones_like(change[:, :1]))
            sums.add(head, part, states, _bent(change.mul_(gradient[part].unsqueeze(1)), bend))
        return *sums.finished(), *rest


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        reference_states: Tensor,
        reference: Head,
        rows: int,
        tracks: bool,
    ) -> Tensor:
        head = Head(weight, bias, head.scale, head.softcap)
        ctx.again = tracks and any(ctx.needs_input_grad[1:3])
        slopes = torch.empty_like(states) if tracks and ctx.needs_input_grad[0] and not ctx.again else None
        found = []
        for part in head.chunks(states, rows):
            logits = head.logits(states[part])
            bend = head.bend(logits) if slopes is not None else None
            own, other = logits.log_softmax(-1), reference.logits(reference_states[part]).log_softmax(-1)
            share = other.exp()
            found.append(torch.where(share > 0, share * (other - own), torch.zeros_like(share)).sum(-1))
            if slopes is not None:
                slopes[part] = _through(head, _bent(own.exp_().sub_(share), bend))
        ctx.head, ctx.reference, ctx.rows = (head.scale, head.softcap), reference, rows
        ctx.save_for_backward(*((states, weight, bias, reference_states) if ctx.again else (slopes,)))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 5
        if not ctx.again:
            (slopes,) = ctx.saved_tensors
            return None if slopes is None else _scaled(slopes, gradient), None, None, *rest
        states, weight, bias, reference_states = ctx.saved_tensors
        head, sums = Head(weight, bias, *ctx.head), _Gradients.like(ctx, states, weight, bias)
        for part in head.chunks(states, ctx.rows):
            logits = head.logits(states[part])
            bend = head.bend(logits)
            change = logits.softmax(-1).sub_(ctx.reference.logits(reference_states[part]).softmax(-1))
            sums.add(head, part, states, _bent(change.mul_(gradient[part].unsqueeze(1)), bend))
        return *sums.finished(), *rest


def _chunk_statistics(logits: Tensor, targets: Tensor, confidence: bool, k: int | None) -> tuple[Tensor | None, ...]:
    total = logits.logsumexp(-1)
    value = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - total
    sure = value - ((2.0 * logits).logsumexp(-1) - 2.0 * total) if confidence else None
    if k is None:
        return value, sure, None, None, None
    largest = logits.topk(min(k, logits.shape[-1]), dim=-1).values - total.unsqueeze(1)
    return value, sure, *indicators_of(largest)


def _slope(head: Head, logits: Tensor, targets: Tensor) -> Tensor:
    """dl/dh (n, D). Takes ``logits`` as its working space."""
    if head.weight is None or head.softcap is not None:
        bend = head.bend(logits)
        change = logits.softmax(-1).neg_()
        change.scatter_add_(1, targets.unsqueeze(1), torch.ones_like(change[:, :1]))
        return _through(head, _bent(change, bend))
    shares = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    total = shares.sum(-1, keepdim=True)
    mean = (shares.to(head.weight.dtype) @ head.weight).to(total.dtype) / total
    return (head.weight[targets].to(total.dtype) - mean).mul_(head.scale)


def _bent(change: Tensor, bend: Tensor | None) -> Tensor:
    return change if bend is None else change.mul_(bend)


def _through(head: Head, change: Tensor) -> Tensor:
    """A change of the logits before the soft-cap (n, V) as one of the states (n, D)."""
    if head.weight is None:
        return change * head.scale
    return (change.to(head.weight.dtype) @ head.weight) * head.scale


def _scaled(slopes: Tensor, gradient: Tensor) -> Tensor:
    return (slopes * gradient.unsqueeze(1)).to(slopes.dtype)


@dataclass
class _Gradients:
    """Gradients of states, weight and bias, put together chunk by chunk; those of the head in float32 or wider."""

    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype | None, torch.dtype | None]

    @classmethod
    def like(cls, ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Gradients:
        wide = torch.promote_types(states.dtype, torch.float32)
        parts = zip((states, weight, bias), (states.dtype, wide, wide), ctx.needs_input_grad[:3], strict=True)
        made = [torch.zeros_like(part, dtype=dtype) if part is not None and needed else None for part, dtype, needed in parts]
        dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        return cls(made[0], made[1], made[2], dtypes)

    def add(self, head: Head, part: slice, states: Tensor, change: Tensor) -> None:
        if self.states is not None:
            self.states[part] = _through(head, change)
        if self.weight is not None:
            self.weight.add_((change.T.to(states.dtype) @ states[part]).to(self.weight.dtype), alpha=head.scale)
        if self.bias is not None:
            self.bias.add_(change.sum(0), alpha=head.scale)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        return self.states, weight, None if self.bias is None else self.bias.to(self.dtypes[1])
