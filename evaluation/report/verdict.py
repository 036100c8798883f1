"""The verdict's rules. Thresholds and order are fixed here, before any run, and printed in every report.

The rules are asked in order; the first that fires gives the verdict. The judge outranks the curves: a run whose held-out
outputs are measurably better is not called diverged because its error grew, and a run with perfect training curves whose
outputs are measurably worse is not called improved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polyalign.evaluation.image_statistics import IMAGE_STATISTICS
from polyalign.evaluation.report.collect import Metrics, ReportData
from polyalign.evaluation.statistics import sign_test

State = Literal["improved", "no change", "over-optimised", "diverged", "not evaluated"]


@dataclass(frozen=True)
class Thresholds:
    """What counts as much. Each has its reason; none is tuned on a run."""

    significance: float = 0.05
    """Of the exact sign test, asked besides the intervals: 4 wins to 0 has a Wilson interval above 0.5 and p = 0.125. The
    bootstrap is asked too, since it alone knows that several seeds of one prompt are not independent."""

    least_prompts: int = 6
    """Prompts (or streets) that a verdict needs: from six on, wins on all of them have p < 0.05. Seeds of one prompt are not
    independent, and a bootstrap over fewer prompts is narrower than it should be."""

    loss_growth: float = 1.5
    """Loss at the end over loss at the start. DPO starts at ln 2 = 0.693 with nothing learnt; half as much again (1.04) is the
    loss of a policy that prefers the rejected side by a margin of 0.6 on every pair."""

    least_steps: int = 20
    """Logged steps from which the loss is asked at all: a tenth of fewer is a single step, which is mostly noise."""

    error_growth: float = 2.0
    """Policy error over reference error on the chosen outputs, same noise: at twice the error the policy no longer models
    the outputs that it is asked to prefer."""

    learnt_accuracy: float = 0.6
    """Training accuracy at the end above which the preference counts as learnt; a coin has 0.5."""

    statistic_spreads: float = 1.0
    """Mean change of a statistic in units of its spread over the base's outputs: one spread moves the typical output to where
    only a sixth of the base's outputs were."""

    statistic_least: float = 0.05
    """The least mean change that counts at all, on a scale of 0 to 1, for statistics that the base hardly varies in."""

    broken_share: float = 0.05
    """Growth of the share of outputs that the judge calls broken: one output in twenty is what a user notices."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Rule:
    """A rule as asked of this run. ``fired`` is None where what it needs is absent; ``found`` gives the numbers."""

    name: str
    state: State
    says: str
    found: str
    fired: bool | None


@dataclass(frozen=True)
class Verdict:
    """``rules`` are all of them in order; ``rule`` is the first that fired."""

    state: State
    rule: Rule
    sentence: str
    rules: Sequence[Rule]


SENTENCES: Mapping[State, str] = {
    "improved": "On held-out prompts the judge prefers the aligned model, by more than chance, and no alarm went off.",
    "no change": "On held-out prompts the judge sees no difference beyond chance between the aligned model and its base.",
    "over-optimised": "The training objective was followed further than the outputs are worth: look at the outputs first.",
    "diverged": "Training left the track: the aligned model should not be used.",
    "not evaluated": "No held-out comparison was found, so nothing is claimed about the outputs.",
}


SENTENCES_OF_CLOUDS: Mapping[State, str] = {
    "improved": "On held-out scans the trained model comes nearer to the ground truth in as many steps, by more than chance.",
    "no change": "On held-out scans there is no difference beyond chance between the trained model and its base.",
    "over-optimised": "The distance that decides fell and another rose: look at the clouds first.",
    "diverged": "Training left the track: the trained model should not be used.",
    "not evaluated": "No held-out comparison was found, so nothing is claimed about the completions.",
}

OF_LIKELIHOODS = ("training ran away",)
"""Rules about losses whose level means something, which that of a distillation does not: it refuses to go on by itself when its
samples move away from the ground truth."""

OF_PICTURES = ("statistics ran away", "only statistics")
"""Rules about picture statistics."""


def decide(data: ReportData, thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """Ask all rules and take the first that fires; the last always does."""
    rules = ask(data, thresholds)
    rule = next(rule for rule in rules if rule.fired)
    return Verdict(state=rule.state, rule=rule, sentence=_sentence(rule.state, data.evaluation), rules=rules)


def _sentence(state: State, evaluation: Mapping[str, Any] | None) -> str:
    """The state's sentence with what was won, lost and tied, so that a rate of few decided pairs is seen as one."""
    statistics = deciding_statistics(evaluation)
    if state == "not evaluated" and statistics:
        return (
            f"The deciding judge is only a picture statistic ({', '.join(statistics)}). A statistic is no judge of quality, so "
            "nothing is claimed about the outputs."
        )
    rate = evaluation.get("win_rate") if evaluation else None
    if evaluation is not None and "completions" in evaluation:
        return f"{SENTENCES_OF_CLOUDS[state]}{_ratio(evaluation['completions'])}"
    return f"{SENTENCES[state]} Against the base: {counts(rate)}." if rate and not statistics else SENTENCES[state]


def _ratio(block: Mapping[str, Any] | None) -> str:
    """The Chamfer distance after over that before, in the fewest steps."""
    if not block or not block["changes"]:
        return ""
    change, few = block["changes"][0], block["steps"][0]
    found = change["steps"][str(few)]["cd"]
    if found["ratio"] is None:
        return ""
    low, high = (100 * value for value in found["ratio_interval"])
    return (
        f" In {few} step{'s' if few != 1 else ''} the Chamfer distance of the {block['labels'][change['after']]} is "
        f"{100 * found['ratio']:.0f} % of the {block['labels'][change['before']]}'s ({low:.0f} to {high:.0f} %)."
    )


def only_statistics(name: str, block: Mapping[str, Any]) -> list[str]:
    """The picture statistics that a judge is made of, if it is made of nothing else; otherwise an empty list.

    ``block`` is the judge's identity or win rate; without ``parts`` (evaluations of older versions) the parts are read from
    the name, in which a panel writes "-1 high_frequency + clipping".
    """
    parts = block.get("parts")
    if parts is None:
        parts = [re.sub(r"^[-+.\de]+ ", "", term) for term in name.split(" + ")]
    return list(parts) if all(part in IMAGE_STATISTICS for part in parts) else []


def deciding_statistics(evaluation: Mapping[str, Any] | None) -> list[str]:
    """:func:`only_statistics` of the judge that decides; empty without an evaluation."""
    judge = evaluation.get("judge") if evaluation else None
    return only_statistics(str(judge.get("name", "")), judge) if isinstance(judge, Mapping) else []


def ask(data: ReportData, limits: Thresholds = THRESHOLDS) -> list[Rule]:
    """Every rule in order, with the numbers of this run; those that only pictures have are left out for texts."""
    statistics = deciding_statistics(data.evaluation)
    rate = data.evaluation.get("win_rate") if data.evaluation and not statistics else None
    found = describe(rate) if rate else "no judge but picture statistics" if statistics else "no evaluation"
    better = is_better(rate, limits) if rate else None
    worse = is_worse(rate, limits) if rate else None
    rules = [
        _not_finite(data.metrics),
        _runaway(data.metrics, better, limits),
        _worse_unlearnt(data.metrics, rate, worse, limits),
        _worse_learnt(data.metrics, rate, worse, limits),
        _second_judge(data, better, limits),
        _statistics(data, worse, limits),
        _broken(data, worse, limits),
        Rule(
            "only statistics",
            "not evaluated",
            "the deciding judge is made of picture statistics alone: they measure a picture and are no judge of its quality",
            f"decided by {', '.join(statistics)}" if statistics else "a judge" if rate else "no evaluation",
            bool(statistics) if data.evaluation else None,
        ),
        Rule(
            "better than the base",
            "improved",
            "the 95 % intervals of the win rate (Wilson over decided pairs, bootstrap over prompts) lie above 0.5, the "
            f"sign test gives p < {limits.significance:g}, and there were {limits.least_prompts} prompts at least",
            found,
            better,
        ),
        Rule(
            "no difference beyond chance",
            "no change",
            "an evaluation exists, the model is not better by the rule above, and no other rule fired",
            found,
            None if rate is None else not better,
        ),
        Rule(
            "nothing to judge by",
            "not evaluated",
            "the run has no evaluation that a judge decided",
            found if rate is None else "a judge",
            rate is None,
        ),
    ]
    left_out = () if data.outputs in ("picture", "sound") else OF_PICTURES
    left_out += OF_LIKELIHOODS if data.outputs == "cloud" else ()
    return [rule for rule in rules if rule.name not in left_out]


def is_better(rate: Mapping[str, Any], limits: Thresholds = THRESHOLDS) -> bool:
    """Both intervals above one half, the sign test agrees, and there were enough prompts."""
    both = rate["wilson"][0] > 0.5 and rate["bootstrap"][0] > 0.5
    return both and _enough(rate, limits) and rate["sign_test_p"] < limits.significance


def is_worse(rate: Mapping[str, Any], limits: Thresholds = THRESHOLDS) -> bool:
    """Both intervals below one half, the sign test agrees, and there were enough prompts."""
    both = rate["wilson"][1] < 0.5 and rate["bootstrap"][1] < 0.5
    return both and _enough(rate, limits) and rate["sign_test_p"] < limits.significance


def _enough(rate: Mapping[str, Any], limits: Thresholds) -> bool:
    return rate.get("prompts", limits.least_prompts) >= limits.least_prompts  # evaluations of older versions do not say


def counts(rate: Mapping[str, Any]) -> str:
    """What was won, lost and tied."""
    return f"{rate['wins']} won, {rate['losses']} lost, {rate['ties']} tied"


def describe(rate: Mapping[str, Any]) -> str:
    """A win rate in words and numbers."""
    low, high = rate["wilson"]
    return f"{counts(rate)}; win rate {rate['rate']:.3f}, interval {low:.3f} to {high:.3f}, p = {p_value(rate['sign_test_p'])}"


def p_value(p: float) -> str:
    """Three decimals where they say something, else a power of ten; zero is a double's underflow and is not printed."""
    if p >= 0.0995:
        return f"{p:.2f}"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p > 1e-300 else "below 1e-300"


def error_ratio(metrics: Metrics | None) -> float | None:
    """Policy error over reference error on the chosen outputs, over the last tenth of training."""
    if metrics is None:
        return None
    policy, reference = metrics.last_tenth("error/policy_chosen"), metrics.last_tenth("error/reference_chosen")
    return policy / reference if policy is not None and reference else None


def _not_finite(metrics: Metrics | None) -> Rule:
    count = len(metrics.not_finite) if metrics else 0
    found = f"all {len(metrics.steps)} logged steps are finite" if metrics else "no metrics"
    if metrics and count:
        step, name = metrics.not_finite[0]
        found = f"{count} figure(s) are not finite, the first is {name} at step {step}"
    return Rule("not a number", "diverged", "a logged figure is NaN or infinite", found, bool(count) if metrics else None)


def _runaway(metrics: Metrics | None, better: bool | None, limits: Thresholds) -> Rule:
    says = (
        f"the loss (its preference part, if logged) ends at {limits.loss_growth:g} times its start or more, or the chosen "
        f"outputs' error at {limits.error_growth:g} times the reference's, and the judge does not find the outputs better"
    )
    loss = metrics.telling_loss if metrics else "loss"
    first, last = (metrics.first_tenth(loss), metrics.last_tenth(loss)) if metrics else (None, None)
    ratio = error_ratio(metrics)
    if metrics is None or first is None or last is None:
        return Rule("training ran away", "diverged", says, "no metrics", None)
    if len(metrics.steps) < limits.least_steps:
        return Rule("training ran away", "diverged", says, f"only {len(metrics.steps)} steps were logged", None)
    found = f"{loss} {first:.3f} at the start, {last:.3f} at the end"
    found += f"; chosen error {ratio:.2f} times the reference's" if ratio is not None else "; no errors logged"
    grew = (first > 0 and last >= limits.loss_growth * first) or (ratio is not None and ratio >= limits.error_growth)
    if grew and better:
        found += "; the judge finds the outputs better"
    return Rule("training ran away", "diverged", says, found, grew and not better)


def _worse_unlearnt(metrics: Metrics | None, rate: Any, worse: bool | None, limits: Thresholds) -> Rule:
    says = (
        "the judge finds the aligned outputs worse beyond chance, and the preference was not learnt in training "
        f"(accuracy below {limits.learnt_accuracy:g}, or not logged)"
    )
    accuracy = metrics.last_tenth("rewards/accuracies") if metrics else None
    fired = worse and (accuracy is None or accuracy < limits.learnt_accuracy) if worse is not None else None
    return Rule("worse, and nothing learnt", "diverged", says, _accuracy_and_rate(accuracy, rate), fired)


def _worse_learnt(metrics: Metrics | None, rate: Any, worse: bool | None, limits: Thresholds) -> Rule:
    says = (
        "the judge finds the aligned outputs worse beyond chance although the preference was learnt in training "
        f"(accuracy {limits.learnt_accuracy:g} or more)"
    )
    accuracy = metrics.last_tenth("rewards/accuracies") if metrics else None
    fired = worse and accuracy is not None and accuracy >= limits.learnt_accuracy if worse is not None else None
    return Rule("learnt, yet worse", "over-optimised", says, _accuracy_and_rate(accuracy, rate), fired)


def _accuracy_and_rate(accuracy: float | None, rate: Any) -> str:
    learnt = "accuracy not logged" if accuracy is None else f"training accuracy {accuracy:.2f} at the end"
    return f"{learnt}; {describe(rate)}" if rate else f"{learnt}; no comparison by a judge"


def _second_judge(data: ReportData, better: bool | None, limits: Thresholds) -> Rule:
    says = "the deciding judge finds the outputs better, and another judge finds them worse beyond chance"
    others = data.evaluation.get("other_judges") or {} if data.evaluation else {}
    others = {name: block for name, block in others.items() if not only_statistics(name, block)}
    if better is None or not others:
        return Rule("a second judge disagrees", "over-optimised", says, "no second judge", None)
    against = [name for name, block in others.items() if is_worse(block, limits)]
    shown = against or list(others)
    found = "; ".join(f"{name}: {describe(others[name])}" for name in shown)
    return Rule("a second judge disagrees", "over-optimised", says, found, better and bool(against))


def _statistics(data: ReportData, worse: bool | None, limits: Thresholds) -> Rule:
    says = (
        f"a picture statistic (saturation, fine detail, clipping) rose by more than {limits.statistic_spreads:g} spread of the "
        f"base's outputs and by at least {limits.statistic_least:g}, with its interval above zero"
    )
    blocks = data.evaluation.get("artefacts") or {} if data.evaluation else {}
    if not blocks:
        return Rule("statistics ran away", "over-optimised", says, "no statistics", None)
    alarms = [name for name, block in blocks.items() if statistic_alarm(block, limits)]
    found = "; ".join(
        f"{name} {blocks[name]['base']:.3f} to {blocks[name]['aligned']:.3f} (spread {blocks[name]['base_spread']:.3f})"
        for name in alarms or blocks
    )
    return Rule("statistics ran away", "over-optimised", says, found, bool(alarms) and not worse)


def statistic_alarm(block: Mapping[str, Any], limits: Thresholds = THRESHOLDS) -> bool:
    """Whether a block of ``artefacts`` rose further than it may."""
    least = max(limits.statistic_spreads * block["base_spread"], limits.statistic_least)
    return block["change"] > least and block["interval"][0] > 0


def _broken(data: ReportData, worse: bool | None, limits: Thresholds) -> Rule:
    says = (
        f"the share of outputs that the judge calls broken grew by {limits.broken_share:g} or more, beyond chance "
        f"(sign test, p < {limits.significance:g})"
    )
    counts = broken_counts(data.evaluation)
    if counts is None:
        return Rule("more broken outputs", "over-optimised", says, "the judge does not say what is broken", None)
    base, aligned, became, mended, total = counts
    p = sign_test(became, mended)
    found = f"broken: {base} of {total} before, {aligned} after; {became} became broken, {mended} were mended, p = {p_value(p)}"
    grew = (aligned - base) / total >= limits.broken_share and p < limits.significance
    return Rule("more broken outputs", "over-optimised", says, found, grew and not worse)


def broken_counts(evaluation: Mapping[str, Any] | None) -> tuple[int, int, int, int, int] | None:
    """Broken in the base, in the aligned, became broken, mended, and all; None if the judge has no such score."""
    judge = evaluation.get("judge") if evaluation else None
    limit = judge.get("broken_below") if isinstance(judge, Mapping) else None
    items = evaluation.get("items") or [] if evaluation else []
    if limit is None or not items:
        return None
    before = [item["base_score"] < limit for item in items]
    after = [item["aligned_score"] < limit for item in items]
    became = sum(b and not a for a, b in zip(before, after, strict=True))
    mended = sum(a and not b for a, b in zip(before, after, strict=True))
    return sum(before), sum(after), became, mended, len(items)
