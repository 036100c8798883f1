"""Rules about the training: what the curves say, whatever the judge says."""

from __future__ import annotations

import math

from polyalign.core.diagnostics import SATURATED
from polyalign.evaluation.diagnose.evidence import WINDOW, Evidence, Movement
from polyalign.evaluation.diagnose.findings import LIMITS, Finding, unknown

NO_MOVEMENT = "likelihoods of policy and reference, by token or as errors, were not logged for enough steps"
SATISFIED_MARGIN = math.log((1 - SATURATED) / SATURATED)
"""The reward margin at which a pair's gradient weight is 0.01: 4.6."""


def not_a_number(evidence: Evidence) -> Finding:
    cause, state = "not a number", "diverged"
    rule = "a logged figure is NaN or infinite, or the trainer refused a step for that reason"
    refused = (evidence.report.folder / "refused.json").is_file()
    cure = "Lower the learning rate, train in bf16 or float32 in the place of fp16, and look at the pairs that are named there."
    if refused:
        return Finding(cause, state, True, rule, "the trainer refused a step: see refused.json", cure)
    if evidence.metrics is None:
        return unknown(cause, state, rule, "there is no metrics.jsonl")
    wrong = evidence.metrics.not_finite
    found = f"{wrong[0][1]} at step {wrong[0][0]}" if wrong else f"all {len(evidence.metrics.steps)} logged steps are finite"
    return Finding(cause, state, bool(wrong), rule, found, cure)


def learning_rate_too_high(evidence: Evidence) -> Finding:
    cause, state = "learning rate too high", "diverged"
    rule = (
        f"one step changes a side's likelihood by {LIMITS.speed_nats:g} nats a token (or its error by its own size), or the "
        f"chosen side ends {LIMITS.collapse_nats:g} nat a token less likely (or with twice the reference's error)"
    )
    sides = _sides(evidence)
    if sides is None:
        return unknown(cause, state, rule, NO_MOVEMENT)
    chosen, rejected = sides
    speeds = [(side.speed or 0.0, name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    speed, which = max(speeds)
    fast = speed >= (LIMITS.speed_nats if chosen.tokens else LIMITS.speed_error)
    collapsed = -chosen.end >= (LIMITS.collapse_nats if chosen.tokens else LIMITS.collapse_error)
    rate = evidence.worst_third("learning_rate")
    used = f"; learning rate {rate:.2g}" if rate is not None else ""
    return Finding(
        "policy collapsed" if collapsed and not fast else cause,
        state,
        fast or collapsed,
        rule,
        f"at most {_speed(speed, chosen)} a step on the {which} side; the chosen side ends at {chosen.words(chosen.end)}{used}",
        "Divide the learning rate by 3 to 10 and start anew; add warm-up."
        if fast
        else "Fewer steps, or a lower learning rate; a winner anchor (objective.anchor) or added SFT (objective.sft) holds the "
        "chosen side.",
    )


def _speed(speed: float, side: Movement) -> str:
    return f"{speed:.3f} nats a token" if side.tokens else f"{100 * speed:.0f} % of the error"


def _sides(evidence: Evidence) -> tuple[Movement, Movement] | None:
    chosen, rejected = evidence.chosen, evidence.rejected
    if chosen is None or rejected is None or len(chosen.series) < LIMITS.least_steps:
        return None
    return chosen, rejected


def beta_too_large(evidence: Evidence) -> Finding:
    cause, state = "beta too large", "beta too large"
    rule = (
        f"in a third of training {LIMITS.reversed_share:.0%} of the pairs or more are reversed beyond doubt (gradient weight "
        f"above {1 - SATURATED:g}) while no step is too large: beta makes the noise of the likelihood into margins. Or "
        f"{LIMITS.satisfied_share:.0%} are satisfied (below {SATURATED:g}) after a change of their odds by less than "
        f"{LIMITS.satisfied_odds:g} nat, or of their errors' difference by less than {LIMITS.satisfied_error:.0%}: beta holds "
        "the policy at its reference"
    )
    sides, satisfied = _sides(evidence), evidence.end("margins/satisfied")
    wrong = evidence.worst_third("margins/reversed")
    if sides is None or satisfied is None or wrong is None:
        return unknown(cause, state, rule, "margins/satisfied and margins/reversed, or likelihoods, were not logged")
    steps = learning_rate_too_high(evidence)
    if steps.holds and steps.cause == "learning rate too high":
        found = f"{wrong:.0%} reversed, but steps are too large, which has the same mark: mend the learning rate first"
        return Finding(cause, state, False, rule, found, "")
    change = _change_that_satisfies(evidence, *sides)
    noisy = wrong >= LIMITS.reversed_share
    least = LIMITS.satisfied_odds if sides[0].tokens else LIMITS.satisfied_error
    held = satisfied >= LIMITS.satisfied_share and change is not None and change < least
    unit = "nats of odds" if sides[0].tokens else "of the error"
    needed = "" if change is None else f"; a pair is satisfied after {change:.3g} {unit}"
    beta = evidence.end("beta")
    return Finding(
        cause,
        state,
        noisy or held,
        rule,
        f"up to {wrong:.1%} reversed in a third of training, {satisfied:.0%} satisfied at the end{needed}"
        + (f"; beta {beta:g}" if beta is not None else ""),
        "Divide beta by 10, or let it follow the margins (objective.beta.auto); 'polyalign explain objective.beta' has the "
        "conventions, between which the same number differs by the size of the output.",
    )


def _change_that_satisfies(evidence: Evidence, chosen: Movement, rejected: Movement) -> float | None:
    """How much the odds of chosen against rejected (or the relative difference of errors) change for a satisfied pair, from the
    mean margin per change that this run shows; None while neither has moved."""
    margin, lengths = evidence.end("rewards/margins"), (1.0, 1.0)
    if chosen.tokens:
        lengths = evidence.end("tokens/chosen") or 1.0, evidence.end("tokens/rejected") or 1.0
    change = lengths[0] * chosen.end - lengths[1] * rejected.end
    if margin is None or margin <= 0 or change <= 0:
        return None
    return SATISFIED_MARGIN * change / margin


def no_signal(evidence: Evidence) -> Finding:
    """The reasons are asked from the surest to the least sure; identical pairs have a rule of their own."""
    state = "no signal"
    rule = (
        f"the mean reward margin ends within {LIMITS.still_margin:g} of zero and a pair's size of margin below "
        f"{LIMITS.still_size:g}, so that the preference part of the loss stays at ln 2 = 0.693"
    )
    margin, weight, size = (evidence.end(name) for name in ("rewards/margins", "gradient_weight", "margins/size"))
    if margin is None or weight is None:
        return unknown("no signal", state, rule, "margins were not logged")
    still = abs(margin) <= LIMITS.still_margin and (size is None or size <= LIMITS.still_size)
    numbers = f"margin {margin:.4f} at the end, gradient weight {weight:.3f}"
    if not still:
        return Finding("no signal", state, False, rule, numbers, "")
    cause, found, cure = _reason(evidence)
    return Finding(cause, state, True, rule, f"{numbers}; {found}", cure)


def _reason(evidence: Evidence) -> tuple[str, str, str]:
    gradient, rate = evidence.worst_third("gradient_norm"), evidence.worst_third("learning_rate")
    pairs = evidence.pairs
    if pairs is not None and pairs.identical >= LIMITS.identical_share * pairs.pairs:
        return "identical pairs", f"{pairs.identical} of {pairs.pairs} pairs are identical", "See identical pairs."
    if gradient is not None and gradient <= LIMITS.zero_gradient:
        found = f"the gradient's norm is {gradient:.1g}: nothing that is trained reaches the score"
        return "frozen parameters", found, "Check model.train, lora.targets and what is frozen; no trained weight is in use."
    sides = _sides(evidence)
    if sides is None:
        return "no signal", f"of the reason there is not enough to say: {NO_MOVEMENT}", "Log every step (train.log_every: 1)."
    chosen, rejected = sides
    moved = max(abs(chosen.end), abs(rejected.end))
    places = f"the chosen side moved by {chosen.words(chosen.end)}, the rejected by {rejected.words(rejected.end)}"
    if moved >= LIMITS.moved:
        beta, accuracy = evidence.end("beta"), evidence.end("rewards/accuracies")
        ordered = "" if accuracy is None else f" and orders {accuracy:.0%} of the pairs"
        stated = "" if beta is None else f" (beta {beta:g})"
        cure = "Multiply beta until a typical margin is near 1 (objective.beta.auto does that), and check its convention."
        return "beta too small", f"{places}{ordered}, but beta makes no margin of it{stated}", cure
    used = "" if rate is None else f" at learning rates up to {rate:.2g} in {len(chosen.series)} logged steps"
    found = f"{places}{used}, with a gradient of norm {gradient:.2g}" if gradient is not None else f"{places}{used}"
    return "learning rate too small", found, "Multiply the learning rate by 10, or take more steps."


def displacement(evidence: Evidence) -> Finding:
    cause, state = "likelihood displacement", "displacement"
    rule = (
        f"both sides end less likely than under the reference, the chosen one by {LIMITS.displaced:g} nats a token or "
        f"{LIMITS.displaced:.0%} of the error or more, beyond {LIMITS.standard_errors:g} standard errors: the margin grows "
        "only because the rejected side falls faster"
    )
    sides = _sides(evidence)
    if sides is None:
        return unknown(cause, state, rule, NO_MOVEMENT)
    chosen, rejected = sides
    tail = chosen.series[-max(WINDOW, len(chosen.series) // 5) :]
    error = float(tail.std(ddof=1)) / math.sqrt(len(tail))
    beyond = -chosen.end > LIMITS.standard_errors * error
    return Finding(
        cause,
        state,
        -chosen.end >= LIMITS.displaced and rejected.end < 0 and beyond,
        rule,
        f"chosen {chosen.words(chosen.end)} (standard error {error:.2g}), rejected {rejected.words(rejected.end)}",
        "Add a winner anchor (objective.anchor: 0.3 to 1) or SFT on the chosen side (objective.sft, rpo), raise beta, or take "
        "fewer steps; pairs whose sides look alike to the model pull hardest: rank them by CHES and keep the lowest.",
    )


def unlearnable(evidence: Evidence) -> Finding:
    cause, state = "noisy labels", "noisy or flipped labels"
    rule = (
        f"after two epochs the training accuracy is still at most {LIMITS.unlearnt_accuracy:g} although the policy moved by "
        f"{LIMITS.displaced:g}, or accuracy on held-out pairs has an interval that reaches down to one half while training "
        f"accuracy is {LIMITS.learnt_accuracy:g} or more: the labels contradict one another"
    )
    accuracy, sides = evidence.end("rewards/accuracies"), _sides(evidence)
    held_out = (evidence.report.evaluation or {}).get("implicit_reward")
    if accuracy is None or sides is None:
        return unknown(cause, state, rule, "accuracy or likelihoods were not logged")
    epochs = float(evidence.metrics.series("epoch")[1][-1]) if evidence.metrics and evidence.metrics.has("epoch") else 0.0
    found = f"training accuracy {accuracy:.2f} after {epochs:.1f} epochs"
    cure = "Have a sample of the pairs judged again; drop ties and close calls (pairing.margin), or use cdpo or robust."
    moved = max(abs(side.end) for side in sides)
    contradictory = epochs >= 2 and accuracy <= LIMITS.unlearnt_accuracy and moved >= LIMITS.displaced
    if contradictory and not any(rule(evidence).holds for rule in (learning_rate_too_high, no_signal)):
        return Finding(cause, state, True, rule, f"{found}; moved by {moved:.2f}", cure)
    if not isinstance(held_out, dict):
        found += (
            "; accuracy on held-out pairs was not measured, so of noise that was learnt by heart there is not enough to say"
        )
        return Finding(cause, state, None if accuracy >= LIMITS.learnt_accuracy else False, rule, found, "")
    low, high = held_out["interval"]
    found += f"; on held-out pairs {held_out['accuracy']:.2f} (interval {low:.2f} to {high:.2f})"
    return Finding(cause, state, accuracy >= LIMITS.learnt_accuracy and low <= 0.5, rule, found, cure)


TRAINING_RULES = (not_a_number, learning_rate_too_high, beta_too_large, no_signal, unlearnable, displacement)
