"""Statistics that tell how a preference training goes, or will go; most are of token models.

CHES ranks pairs *before* training by how much the pair will pull the chosen answer down (likelihood displacement; Razin et al.,
arXiv 2410.08847). The top-k indicators tell *while* training when it begins to over-optimise (Shi et al., arXiv 2410.11677).

Letters: G pairs, U positions, D width of the hidden states, V size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyalign.core.scores import Scores

SATURATED = 0.01
"""Gradient weight sigmoid(-m) below which a pair teaches nothing any more, and above 1 - it one that is wrong beyond doubt."""


def margin_figures(margin: Tensor) -> dict[str, Tensor]:
    """Of each pair's reward margin m (G,): its size |m|, whether it is a tie (m = 0), whether the pair is ``satisfied``
    (sigmoid(-m) < 0.01) or ``reversed`` (sigmoid(-m) > 0.99, a loss above 4.6), each 0 or 1 (G,).

    Few pairs of either kind are reversed where beta fits the likelihood's scale; many at once, on both sides, are the mark of
    margins that are noise times too large a beta."""
    weight = torch.sigmoid(-margin)
    return {
        "margins/size": margin.abs(),
        "margins/ties": (margin == 0).to(margin),
        "margins/satisfied": (weight < SATURATED).to(margin),
        "margins/reversed": (weight > 1.0 - SATURATED).to(margin),
    }


def token_figures(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Lengths in tokens, and each seat's mean log-probability of a token, (G, K) each, whatever reduction the objective takes.

    Sums over an answer grow with its length; what a token costs does not, so that answers of different length, and the two
    sides of pairs of different authors, can be compared by it."""
    figures: dict[str, Tensor] = {}
    for seat, found in scores.items():
        counted = found.mask.bool()
        values = torch.where(counted, found.values, torch.zeros_like(found.values)).detach()
        lengths = counted.sum(-1)
        figures[f"logps_per_token/{seat}"] = values.sum(-1) / lengths.clamp(min=1)
        figures.setdefault("tokens", lengths.to(values))
    return figures


def indicator_figures(policy: Scores) -> dict[str, Tensor]:
    """The top-k indicators of a policy's scores that carry them, (G, K) each: means over an answer's tokens, entropies in bits
    as in the publication (see :class:`TopK`)."""
    counted, figures = policy.mask.bool(), {}
    for name in ("mass", "entropy", "renormalised"):
        if f"top_k_{name}" in policy.notes:
            values = policy.notes[f"top_k_{name}"].detach()
            mean = torch.where(counted, values, torch.zeros_like(values)).sum(-1) / counted.sum(-1).clamp(min=1)
            figures[f"top_k/{name}"] = mean if name == "mass" else mean / math.log(2.0)
    return figures


def ches(
    chosen_states: Tensor, rejected_states: Tensor, chosen_mask: Tensor, rejected_mask: Tensor, *, normalised: bool = True
) -> Tensor:
    """<H_w, H_l> - |H_w|^2 of each pair (G,), with H the sum of an answer's hidden states; the mean instead if ``normalised``.

    Args:
        chosen_states: (G, U, D), the states that the unembedding sees (after the last norm); U may differ between the two.
        chosen_mask: (G, U), true from the last token of the prompt to the second-to-last of the answer: the states from which
            the answer's tokens are predicted.
        normalised: divide by the numbers of states, n_w n_l and n_w^2. The plain score grows with length.

    High is dangerous: the answers look alike to the model, and lowering the one lowers the other. Not symmetric. States are
    added up in float32 or wider. The original (princeton-nlp/unintentional-unalignment@dc50030 ches/ches.py) finds the same
    positions from left-padded rows.
    """
    chosen, rejected = _summed(chosen_states, chosen_mask, normalised), _summed(rejected_states, rejected_mask, normalised)
    return (chosen * rejected).sum(-1) - chosen.square().sum(-1)


def _summed(states: Tensor, mask: Tensor, normalised: bool) -> Tensor:
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    total = torch.where(mask.unsqueeze(-1), states, torch.zeros_like(states)).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1) if normalised else total


@dataclass(frozen=True)
class TopK:
    """Of the k most probable next tokens at each position (..., U), in nats: their ``mass``, their ``entropy`` -sum p log p
    with probabilities as they are, and ``renormalised``, the entropy of the distribution over them alone. ``mask`` is as given.

    The publication does not say which entropy it means; with the first, entropy and mass are complementary, and it is the one
    to watch. It takes k = 10 and bits. A run is over-optimised when the entropy turns down (DPO, IPO), or when it keeps rising
    while the mass falls (hinge).
    """

    mass: Tensor
    entropy: Tensor
    renormalised: Tensor
    mask: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all positions under the mask."""
        return torch.where(self.mask, values, torch.zeros_like(values)).sum() / self.mask.sum().clamp(min=1)

    def mean_bits(self, values: Tensor) -> Tensor:
        return self.mean(values) / math.log(2.0)


def top_k(logits: Tensor, mask: Tensor, *, k: int = 10) -> TopK:
    """The indicators of next-token ``logits`` (..., U, V) at positions ``mask`` (..., U). A vocabulary smaller than k is taken
    whole."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = logits.to(dtype).log_softmax(-1)
    return TopK(*indicators_of(log_probabilities.topk(min(k, logits.shape[-1]), dim=-1).values), mask)


def indicators_of(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, entropy and renormalised entropy (..., U) of log-probabilities (..., U, k), as in :class:`TopK`."""
    return largest.exp().sum(-1), _entropy(largest), _entropy(largest.log_softmax(-1))


def _entropy(log_probabilities: Tensor) -> Tensor:
    """-sum p log p with 0 log 0 = 0."""
    probabilities = log_probabilities.exp()
    return -torch.where(probabilities > 0, probabilities * log_probabilities, torch.zeros_like(probabilities)).sum(-1)
