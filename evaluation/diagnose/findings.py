"""What a rule answers, and the thresholds of all rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal[
    "improved",
    "no signal",
    "losing pictures without effect",
    "noisy or flipped labels",
    "pairs drawn only from failures",
    "selection bias",
    "off-policy rejected answers",
    "length or size bias",
    "diverged",
    "beta too large",
    "over-optimised",
    "displacement",
    "no change",
    "nothing found",
]


@dataclass(frozen=True)
class Finding:
    """A rule as asked of one run. ``holds`` is None where what it needs is missing: not enough to say. ``rule`` says when it
    holds and why there; ``found`` gives the numbers of the run; ``cure`` what to do."""

    cause: str
    state: State
    holds: bool | None
    rule: str
    found: str
    cure: str


@dataclass(frozen=True)
class Limits:
    """Thresholds with their reasons. They are the same for every run and modality."""

    least_pairs: int = 20
    """Fewer pairs say nothing of their author's habits: of 20 fair coins, 16 fall on one side once in a hundred times."""

    least_steps: int = 10
    """Two windows of five logged steps: with fewer, there is no movement to speak of."""

    identical_share: float = 0.2
    """A fifth of every batch, or of its losing pictures, teaches nothing; nobody does that on purpose."""

    reversed_scores: float = 0.1
    """Pairs against the order of their own scores: the label noise that cDPO's and robust DPO's authors correct for."""

    flipped_scores: float = 0.5
    """Past one half, learning the pairs is unlearning the judge."""

    failure_reached: float = 0.05
    """Pairs for whose prompt the base itself came as far as the chosen side: one in twenty may slip in."""

    failure_elsewhere: float = 0.2
    """Prompts on which the base is as good as the chosen sides: with a fifth of them, there was a skill to leave out."""

    far_words: float = 0.2
    """Distance of the chosen answers' telling words from all questions': a fifth of the pairs would have to be others."""

    far_beyond_chance: float = 2.0
    """Times the distance of as many pairs drawn evenly, which is its mean, and spreads by a third or less over ten words."""

    other_author: float = 0.9
    """Share of pairs with a chosen side that the base did not write, from which their author is said to be another one."""

    off_policy_nats: float = 1.0
    """The reference's log-probability of a token, chosen less rejected: at 1 each token of the rejected side is e times less
    likely, and an answer of ten tokens 20,000 times: the base would not have written it."""

    off_policy_error: float = 3.0
    """The reference's error on the rejected side over that on the chosen one. Errors of a model's own samples differ up to
    about twofold with their detail and with how well they fit their prompt."""

    size_share: float = 0.8
    """Pairs that size alone puts in the right order: with four of five, a policy that learns nothing but size looks learnt."""

    collapse_nats: float = 1.0
    """Fall of a chosen token's log-probability: every token e times less likely, perplexity 2.7-fold."""

    collapse_error: float = 1.0
    """Relative rise of the chosen outputs' error: at twice the error the policy no longer models them (as in the report)."""

    speed_nats: float = 0.1
    """Change of a token's log-probability in one step. A step that changes every token by a tenth follows a gradient that was
    computed for another policy; ten of them make a factor of e."""

    speed_error: float = 1.0
    """Relative change of the error in one step, of windows of five: one noise level a pair makes means of batches differ by
    tenths, so only a change by the error's own size is beyond doubt."""

    reversed_share: float = 0.1
    """Pairs with a gradient weight above 0.99, whose loss is 4.6 or more: with one in ten they alone put the mean loss at two
    thirds of what a policy has that has learnt nothing. A beta that fits has next to none."""

    satisfied_share: float = 0.5
    """Pairs with a gradient weight below 0.01: with half of them satisfied, beta decides where the policy stops."""

    satisfied_odds: float = 1.0
    """Nats by which the odds of chosen against rejected have changed when a pair is satisfied: at less than a factor of e, the
    policy has hardly changed what it writes."""

    satisfied_error: float = 0.02
    """The same for denoising models, as a relative change of the errors' difference: below the spread of one draw of noise."""

    still_margin: float = 0.02
    """Mean reward margin that counts as none: the loss is then within 0.01 of ln 2."""

    still_size: float = 0.1
    """Mean size of a pair's margin that counts as none: at 0.1 a pair's gradient weight is between 0.475 and 0.525."""

    moved: float = 0.01
    """Nats a token, or relative change of the error, from which the policy has moved at all: a hundredth."""

    zero_gradient: float = 1e-9
    """Gradient norms at or below this are none: float32's rounding of sums that cancel."""

    displaced: float = 0.1
    """Fall of the chosen side, in nats a token or relative to the error: a tenth less likely a token; smaller falls are common
    and harmless."""

    standard_errors: float = 3.0
    """A change within so many standard errors of the mean is noise."""

    learnt_accuracy: float = 0.8
    """Training accuracy from which the pairs count as learnt."""

    unlearnt_accuracy: float = 0.55
    """Training accuracy that is a coin's, within the error of a few hundred pairs."""


LIMITS = Limits()


def unknown(cause: str, state: State, rule: str, what: str) -> Finding:
    """A rule that cannot be asked, since ``what`` is missing."""
    return Finding(cause, state, None, rule, f"not enough to say: {what}", "")
