"""Statistics of token models that tell how a preference training goes, or will go.

CHES ranks pairs *before* training by how much the pair will pull the chosen answer down (likelihood displacement; Razin et al.,
arXiv 2410.08847). The top-k indicators tell *while* training when it begins to over-optimise (Shi et al., arXiv 2410.11677).

Letters: G pairs, U positions, D width of the hidden states, V size of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    largest = log_probabilities.topk(min(k, logits.shape[-1]), dim=-1).values
    among = largest.log_softmax(-1)
    return TopK(largest.exp().sum(-1), _entropy(largest), _entropy(among), mask)


def _entropy(log_probabilities: Tensor) -> Tensor:
    """-sum p log p with 0 log 0 = 0."""
    probabilities = log_probabilities.exp()
    return -torch.where(probabilities > 0, probabilities * log_probabilities, torch.zeros_like(probabilities)).sum(-1)
