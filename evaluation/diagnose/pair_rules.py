"""Rules about the pairs: what no setting of the training mends."""

from __future__ import annotations

import math

import numpy as np

from polyalign.evaluation.diagnose.evidence import Evidence
from polyalign.evaluation.diagnose.findings import LIMITS, Finding, State, unknown
from polyalign.evaluation.diagnose.selected import Selection
from polyalign.evaluation.report.verdict import describe

NO_PAIRS = "no pairs were found in the run folder"


def identical_pairs(evidence: Evidence) -> Finding:
    cause, state = "identical pairs", "no signal"
    rule = (
        f"in {LIMITS.identical_share:.0%} of the pairs or more the two sides have the same content: their margin is zero "
        "whatever the policy does, and they teach nothing"
    )
    pairs = evidence.pairs
    if pairs is None:
        return unknown(cause, state, rule, NO_PAIRS)
    share = pairs.identical / pairs.pairs
    return Finding(
        cause,
        state,
        share >= LIMITS.identical_share,
        rule,
        f"{pairs.identical} of {pairs.pairs} pairs ({share:.0%}) are identical{_ties(evidence)}",
        "Look for the step that wrote one output twice (a column read for both sides, a sampler with one seed, temperature 0). "
        "Then make the pairs anew.",
    )


def _ties(evidence: Evidence) -> str:
    ties = evidence.end("margins/ties")
    return "" if ties is None else f"; at the end of training {ties:.0%} of the margins are exactly zero"


def identical_pictures(evidence: Evidence) -> Finding:
    cause, state = "identical pictures", "losing pictures without effect"
    rule = (
        f"of the pairs with losing pictures, {LIMITS.identical_share:.0%} or more have the right ones again, byte by byte: "
        "the answer is as likely under both whatever the policy does, and a loss that compares them stays where it began"
    )
    pairs = evidence.pairs
    if pairs is None or not pairs.losing_pictures:
        return unknown(cause, state, rule, "no pair has losing pictures")
    share = pairs.same_pictures / pairs.losing_pictures
    return Finding(
        cause,
        state,
        share >= LIMITS.identical_share,
        rule,
        f"in {pairs.same_pictures} of {pairs.losing_pictures} pairs with losing pictures ({share:.0%}) they are the right ones",
        "Look at what made them: an operation that leaves such pictures as they are (a crop that takes all, noise of no "
        "strength, a flip of what is symmetric). Take a stronger or another one, then make the pairs anew.",
    )


def flipped_labels(evidence: Evidence) -> Finding:
    cause, state = "flipped labels", "noisy or flipped labels"
    rule = (
        f"the pairs' own judge gave the rejected side more than the chosen one in {LIMITS.reversed_scores:.0%} of the decided "
        f"pairs or more (past {LIMITS.flipped_scores:.0%} the labels are flipped, below it they are noisy)"
    )
    pairs = evidence.pairs
    if pairs is None:
        return unknown(cause, state, rule, NO_PAIRS)
    scores = pairs.scores
    if scores.differing < LIMITS.least_pairs:
        return unknown(
            cause,
            state,
            rule,
            f"{scores.differing} of {pairs.pairs} pairs have scores that differ, fewer than {LIMITS.least_pairs}",
        )
    share = scores.rejected / scores.differing
    return Finding(
        "noisy labels" if LIMITS.reversed_scores <= share < LIMITS.flipped_scores else cause,
        state,
        share >= LIMITS.reversed_scores,
        rule,
        f"{scores.rejected} of {scores.differing} pairs ({share:.0%}) go against their own scores",
        "Check the sign of the judge's weight and which column is the chosen one; exchange the sides. If only some are wrong, "
        "have them judged again and drop those that stay reversed, or use cdpo or robust with label_smoothing near that share.",
    )


def failures_only(evidence: Evidence) -> Finding:
    cause, state = "pairs from failures only", "pairs drawn only from failures"
    rule = (
        f"what made the pairs says that {LIMITS.failure_reached:.0%} of them at most are of questions that the base gets "
        f"right, and that it gets {LIMITS.failure_elsewhere:.0%} or more of all questions right; or, by the scores of all "
        f"samples, the base wrote the rejected sides and another author the chosen ones ({LIMITS.other_author:.0%} each), its "
        f"own samples come up to the chosen side on at most {LIMITS.failure_reached:.0%} of the pairs' prompts, and do so on "
        f"{LIMITS.failure_elsewhere:.0%} or more of all prompts: what failures have in common is then learnt in the place of "
        "the skill, and what the base could do is lost"
    )
    drawn = evidence.selection
    if drawn is not None:
        holds = drawn.of_right <= LIMITS.failure_reached and drawn.right >= LIMITS.failure_elsewhere
        found = (
            f"{drawn.of_right:.0%} of the {drawn.pairs} pairs are of questions that the base got right, and it got "
            f"{drawn.right:.0%} of all {drawn.questions} right"
        )
        cure = (
            "Keep pairs of questions that the base gets right, with a natural wrong answer such as another picture's "
            "(pairs.multi_image.balance: true), and judge by held-out skill: the reward margin cannot show this."
        )
        return Finding(cause, state, holds, rule, f"{found}{_words_of(drawn)}{_soared(evidence)}" if holds else found, cure)
    return _failures_by_samples(evidence, cause, state, rule)


def _failures_by_samples(evidence: Evidence, cause: str, state: State, rule: str) -> Finding:
    pairs = evidence.pairs
    if pairs is None:
        return unknown(cause, state, rule, NO_PAIRS)
    if pairs.sampled_chosen > (1 - LIMITS.other_author) * pairs.pairs:
        found = f"the base itself wrote the chosen side of {pairs.sampled_chosen} of {pairs.pairs} pairs"
        return Finding(cause, state, False, rule, found, "")
    if pairs.sampled_rejected < LIMITS.other_author * pairs.pairs:
        found = f"the base wrote the rejected side of {pairs.sampled_rejected} of {pairs.pairs} pairs only"
        return Finding(cause, state, False, rule, found, "")
    if not pairs.compared or not pairs.best_of_prompts:
        return unknown(cause, state, rule, "the scores of all samples (pairs/samples-*.parquet), by prompt, are not there")
    reached = pairs.reached / pairs.compared
    good = float(np.median(pairs.chosen_scores))
    elsewhere = float(np.mean([best >= good for best in pairs.best_of_prompts]))
    return Finding(
        cause,
        state,
        reached <= LIMITS.failure_reached and elsewhere >= LIMITS.failure_elsewhere,
        rule,
        f"the base came up to the chosen side on {reached:.0%} of {pairs.compared} pairs' prompts, and on {elsewhere:.0%} of "
        f"all {len(pairs.best_of_prompts)} prompts{_soared(evidence)}",
        "Add pairs of prompts that the base gets right (its right answer against another wrong one), best as many as of its "
        "failures, and judge by held-out skill: the reward margin cannot show this.",
    )


def selection_bias(evidence: Evidence) -> Finding:
    cause, state = "selected answers", "selection bias"
    rule = (
        "the words that tell chosen from rejected answers are distributed otherwise than those of all questions that were "
        f"asked, at a distance (total variation) of {LIMITS.far_words:g} or more and {LIMITS.far_beyond_chance:g} times that "
        "of as many pairs drawn evenly: to say the frequent word becomes likelier whatever is asked"
    )
    drawn = evidence.selection
    if drawn is None or drawn.distance is None:
        return unknown(cause, state, rule, "what made the pairs did not count the answers of all questions (selection)")
    far = drawn.distance >= max(LIMITS.far_words, LIMITS.far_beyond_chance * drawn.by_chance)
    words = _words_of(drawn).removeprefix("; ")
    return Finding(
        cause,
        state,
        far,
        rule,
        f"{words}{_soared(evidence)}" if far else words,
        "Draw pairs evenly over what is right: keep those of questions that the base gets right "
        "(pairs.multi_image.balance: true), or drop pairs of the words that are too frequent. Watch held-out skill by kind of "
        "question: the reward margin cannot show this.",
    )


def _words_of(drawn: Selection) -> str:
    """The distance of the telling words, and those whose share is most another."""
    if drawn.distance is None:
        return ""
    most = [f"'{word}' in {pairs:.0%} in the place of {every:.0%}" for word, pairs, every in drawn.most[:2]]
    named = f": {', '.join(most)}" if drawn.distance >= LIMITS.far_words and most else ""
    return (
        f"; the words that make answers right are {drawn.distance:.2f} away from those of all questions "
        f"({drawn.by_chance:.2f} by chance){named}"
    )


def _soared(evidence: Evidence) -> str:
    margin, accuracy = evidence.end("rewards/margins"), evidence.end("rewards/accuracies")
    curves = "" if margin is None or accuracy is None else f"; the margin ends at {margin:.2f} with accuracy {accuracy:.2f}"
    rate = (evidence.report.evaluation or {}).get("win_rate")
    return curves + (f", while the judge counts {describe(rate)}" if rate else ", and no evaluation tells what became of it")


def off_policy(evidence: Evidence) -> Finding:
    cause, state = "off-policy rejected answers", "off-policy rejected answers"
    rule = (
        f"the rejected sides are out of the base's reach: less likely under the reference than the chosen ones by "
        f"{LIMITS.off_policy_nats:g} nat a token or more, or with {LIMITS.off_policy_error:g} times their error, and the base "
        "did not write them. Lowering what the base would never do costs the model and changes nothing that it does"
    )
    gap = _reference_gap(evidence)
    if gap is None:
        return unknown(cause, state, rule, "the reference's values of both sides were not logged")
    far, found = gap
    pairs = evidence.pairs
    if pairs is not None:
        found += f"; the base wrote {pairs.sampled_rejected} of {pairs.pairs} rejected sides"
    own = pairs is not None and pairs.sampled_rejected >= pairs.pairs / 2
    return Finding(
        cause,
        state,
        far and not own,
        rule,
        found,
        "Take rejected sides from the base's own samples (polyalign generate), or drop those that the reference gives far less "
        "than the chosen ones; an objective that weighs pairs by the policy's confidence (wpo) helps less.",
    )


def _reference_gap(evidence: Evidence) -> tuple[bool, str] | None:
    """Whether the reference keeps the two sides that far apart, and the numbers: means over the whole training, during which
    the reference stands still."""
    metrics = evidence.metrics
    if metrics is None:
        return None
    for prefix, tokens in (("logps_per_token/reference", True), ("error/reference", False)):
        if metrics.has(f"{prefix}_chosen", f"{prefix}_rejected"):
            logged = [metrics.series(f"{prefix}_{side}")[1] for side in ("chosen", "rejected")]
            if not all(len(values) for values in logged):  # single answers have no rejected side
                continue
            chosen, rejected = (float(values.mean()) for values in logged)
            if tokens:
                found = f"the reference gives {chosen:.2f} nats a token to chosen and {rejected:.2f} to rejected sides"
                return chosen - rejected >= LIMITS.off_policy_nats, found
            ratio = rejected / chosen if chosen > 0 else math.inf
            found = f"the reference's error is {chosen:.3g} on chosen and {rejected:.3g} on rejected sides, {ratio:.2f} times"
            return ratio >= LIMITS.off_policy_error, found
    return None


def size_bias(evidence: Evidence) -> Finding:
    cause, state = "size bias", "length or size bias"
    rule = (
        f"size alone (characters of a text, bytes and pixels of a file) puts {LIMITS.size_share:.0%} of the pairs or more in "
        "the right order, so that a policy which learns nothing else looks as if it had learnt the preference"
    )
    pairs = evidence.pairs
    if pairs is None:
        return unknown(cause, state, rule, NO_PAIRS)
    asked = {name: tally for name, tally in pairs.sizes.items() if tally.differing >= LIMITS.least_pairs}
    if not asked:
        return unknown(cause, state, rule, f"fewer than {LIMITS.least_pairs} pairs have sides of different size")
    name, tally = max(asked.items(), key=lambda item: abs(item[1].share - 0.5))
    larger = tally.share >= 0.5
    share = tally.share if larger else 1 - tally.share
    lengths = _lengths(evidence)
    return Finding(
        "length bias" if name == "characters" else cause,
        state,
        share >= LIMITS.size_share and 2 * tally.differing >= pairs.pairs,
        rule,
        f"the chosen side is the {'larger' if larger else 'smaller'} one in {share:.0%} of the {tally.differing} pairs whose "
        f"{name} differ{lengths}",
        "Pair sides of like size (drop the others, or balance how often the larger one wins), or take an objective that counts "
        "length out (ld_dpo, sigmoid_norm, simpo for texts); check with a judge that does not see size.",
    )


def _lengths(evidence: Evidence) -> str:
    words = ((evidence.report.evaluation or {}).get("lengths") or {}).get("words")
    if words is None:
        return ""
    return f"; outputs of the base have {words['base']:.1f} words, of the aligned model {words['aligned']:.1f}"


PAIR_RULES = (identical_pairs, flipped_labels, identical_pictures, failures_only, selection_bias, off_policy, size_bias)
