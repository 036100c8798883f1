"""The geometric mixture of two models of the next token, from which IPO-MD samples.

    log m = log_softmax((1 - b) log p_policy + b log p_reference)

is taken at each token (arXiv 2403.08635, section 4); it is not the mixture of whole sequences. b = 0 is the policy.
"""

from __future__ import annotations

from torch import Tensor


def geometric_mixture(policy_logits: Tensor, reference_logits: Tensor, *, reference_share: float) -> Tensor:
    """Log-probabilities (..., V) of the mixture, from logits of both models; ``reference_share`` is b in [0, 1].

    Raises:
        ValueError: another share.
    """
    if not 0.0 <= reference_share <= 1.0:
        raise ValueError(f"the reference has a share between 0 and 1 of the mixture, found {reference_share}")
    policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    if reference_share == 0.0:  # a token that the reference gives no probability would make 0 times infinity
        return policy
    if reference_share == 1.0:
        return reference
    return ((1.0 - reference_share) * policy + reference_share * reference).log_softmax(-1)
