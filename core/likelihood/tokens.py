"""Token likelihoods: log-probabilities of the tokens of completions under a causal language model.

Letters: G groups, K candidates (completions of one prompt) in a group, P and U padded lengths of prompts and completions,
R rows of a forward pass, L their length, N completion tokens of a batch, D width of the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.core.likelihood.chunked_head import Head, Statistics, divergence, likeliest_others, token_statistics
from polyalign.core.likelihood.prefix_sharing import announce, pays, shared_inputs, why_not
from polyalign.core.likelihood.tokens_network import plain, states_and_head
from polyalign.core.likelihood.tokens_rows import Layout, Lengths, separate_rows, shared_rows
from polyalign.core.scores import DenseStatistics, Scores, Unit

HEAD_CHUNK = 1024
TOP_K = 10
DENSE = frozenset({"kl", "confidence", "top_k", "hidden", "runner_up"})


@dataclass(frozen=True)
class TokenSettings:
    """How token likelihoods are computed.

    prefix_sharing: compute the prompt once for all candidates of a group. ``auto`` does where the model can, ``on`` refuses
        a model that cannot.
    head_chunk: positions whose logits exist at the same time; fewer with a vocabulary so large that they would exceed 256 MiB.
    dense: what else is wanted of each position. ``kl``: what a KL to another pass's distributions needs (TDPO).
        ``confidence``: log p - log sum p^2 (WPO). ``top_k``: mass and entropies of the 10 most probable tokens, into ``notes``.
        ``hidden``: the states that the head sees (CHES), detached. ``runner_up``: the log-probability of the likeliest token
        that is not the one that stands there (Re-Align's code), which takes the head twice more.

    Raises:
        UserError: another value.
    """

    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    head_chunk: int = HEAD_CHUNK
    dense: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise UserError(f"prefix_sharing is {self.prefix_sharing!r}; allowed: auto, on, off")
        if self.head_chunk < 1:
            raise UserError(f"head_chunk is {self.head_chunk}; allowed: 1 or more")
        if self.dense - DENSE:
            raise UserError(f"dense is {sorted(self.dense)}; allowed: {sorted(DENSE)}")


@dataclass(frozen=True)
class TokenDistributions:
    """The next-token distributions at the positions of a batch's completions, as states (N, D) and a head."""

    states: Tensor
    head: Head
    mask: Tensor  # (G, K, U)
    rows: int

    def divergence_from(self, reference: TokenDistributions) -> Tensor:
        """KL(reference || self) (G, K, U), with gradient for self; 0 where there is no token."""
        flat = divergence(self.head, self.states, reference.head, reference.states, rows=self.rows)
        return _spread(flat, self.mask)

    def detach(self) -> TokenDistributions:
        return replace(self, states=self.states.detach(), head=self.head.detach())


def score_tokens(network: nn.Module, tensors: Mapping[str, Tensor], settings: TokenSettings) -> Scores:
    """Scores (G, K, U) whose values are the log-probabilities of the completions' tokens in nats, in float32 or wider, with
    gradient; 0 beyond a completion's end.

    Args:
        network: a causal language model of transformers, in peft or not.
        tensors: ``prompt_ids``, ``prompt_mask`` (G, P), padded on the left; ``completion_ids``, ``completion_mask`` (G, K, U),
            padded on the right.

    A completion's first token is predicted from the prompt's last, so a prompt has at least one. The last token of a completion
    is predicted and never read. Without a cache, in the network's own mode and precision.

    Raises:
        UserError: a model without an LM head or with an adapter on it; prefix sharing asked of a model that cannot.
        ValueError: an empty prompt, or padding on the wrong side.
    """
    layout, inputs = _rows(network, tensors, settings.prefix_sharing)
    return score_rows(network, layout, inputs, tensors["completion_ids"], settings)


def score_rows(
    network: nn.Module, layout: Layout, inputs: Mapping[str, Any], completion_ids: Tensor, settings: TokenSettings
) -> Scores:
    """As :func:`score_tokens`, for rows that are laid out already: the network is called with ``inputs``, whose ids are the
    layout's and which may hold more than ids (pictures, positions, masks)."""
    states, head = states_and_head(network, inputs)
    return _scores(_at(states, layout), head, layout, completion_ids, settings)


def _rows(network: nn.Module, tensors: Mapping[str, Tensor], sharing: str) -> tuple[Layout, dict[str, Any]]:
    """Rows for the network, shared or separate, and what it is called with."""
    lengths = Lengths.of(tensors)
    if sharing != "off" and lengths.completion.shape[1] > 1:
        shared = shared_rows(tensors, lengths)
        if sharing == "on" or pays(plain(network).config, shared, lengths.separate):
            reason = why_not(network, shared)
            if reason is None:
                return shared, shared_inputs(network, shared)
            if sharing == "on":
                raise UserError(
                    f"prefix_sharing is on, and {type(plain(network)).__name__} cannot share prompts: {reason}. "
                    "Set it to auto or off"
                )
            announce(network, reason)
    separate = separate_rows(tensors, lengths)
    return separate, separate.inputs()


def _at(states: Tensor, layout: Layout) -> Tensor:
    """The states (N, D) from which the tokens of completions are predicted."""
    return states.flatten(0, 1).index_select(0, layout.predicting)


def _scores(states: Tensor, head: Head, layout: Layout, completion_ids: Tensor, settings: TokenSettings) -> Scores:
    mask, dense, tokens = layout.mask, settings.dense, completion_ids[layout.mask]
    found = token_statistics(
        head,
        states,
        tokens,
        rows=settings.head_chunk,
        confidence="confidence" in dense,
        k=TOP_K if "top_k" in dense else None,
    )
    if "hidden" in dense and head.weight is None:
        raise UserError(
            "this model's LM head is more than a linear map, so the states before it are not at hand (hidden, CHES)"
        )
    statistics = DenseStatistics(
        confidence=None if found.confidence is None else _spread(found.confidence, mask),
        hidden=_spread(states.detach(), mask) if "hidden" in dense else None,
        runner_up=_spread(_runner_up(head, states, tokens, settings.head_chunk), mask) if "runner_up" in dense else None,
        distributions=TokenDistributions(states, head, mask, settings.head_chunk) if "kl" in dense else None,
    )
    return Scores(
        values=_spread(found.value, mask),
        mask=mask,
        unit=Unit("token"),
        dense=statistics if dense - {"top_k"} else None,
        notes=_notes(found, mask),
    )


def _runner_up(head: Head, states: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """(N,), with gradient: which token it is has none."""
    others = likeliest_others(head, states, tokens, rows=rows)
    return token_statistics(head, states, others, rows=rows).value


def _notes(found: Statistics, mask: Tensor) -> dict[str, Tensor]:
    named = {"top_k_mass": found.mass, "top_k_entropy": found.entropy, "top_k_renormalised": found.renormalised}
    return {name: _spread(values, mask) for name, values in named.items() if values is not None}


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Values (N, ...) of the tokens under ``mask`` (G, K, U), in its order, as (G, K, U, ...) with zeros elsewhere."""
    spread = flat.new_zeros(*mask.shape, *flat.shape[1:])
    return spread.index_put(mask.nonzero(as_tuple=True), flat)
