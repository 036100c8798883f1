"""Plain words for curves, and cautions: what a careful colleague would say while looking over one's shoulder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyalign.evaluation.report.collect import Metrics, ReportData
from polyalign.evaluation.report.verdict import deciding_statistics, is_better, is_worse

Movement = Literal["rose", "fell", "stayed"]

STANDARD_ERRORS = 2.0
"""A mean change within so many standard errors of zero is called 'stayed'."""

FEW_PROMPTS = 100
"""Below this a win rate's interval is wider than about 0.2, so that only large effects show."""

LEAST_VALUES = 5
"""A mean of fewer values has no standard error worth the name."""

MANY_TIES = 0.5
HIGH_ACCURACY = 0.97


Measure = Literal["error", "log-probability"]
"""What says how likely an output is: the error of a denoising model (higher is worse), or the log-probability of a text's
tokens (higher is better)."""


@dataclass(frozen=True)
class Change:
    """How far the policy is from the reference over the last fifth of training: (policy - reference) / reference in per cent
    for errors, policy - reference in nats for log-probabilities, which are sums over an answer's tokens.

    The standard error is infinite where there are too few values to have one.
    """

    mean: float
    standard_error: float

    @property
    def movement(self) -> Movement:
        if abs(self.mean) <= STANDARD_ERRORS * self.standard_error or self.mean == 0:
            return "stayed"
        return "rose" if self.mean > 0 else "fell"


@dataclass(frozen=True)
class Displacement:
    """How the two sides moved, and what that means."""

    chosen: Change
    rejected: Change
    title: str
    text: str
    measure: Measure = "error"


_READINGS: dict[tuple[Movement, Movement], tuple[str, str]] = {
    ("fell", "rose"): (
        "the hoped-for picture",
        "the chosen outputs became likelier and the rejected ones less likely.",
    ),
    ("rose", "rose"): (
        "both errors rose: displacement",
        "the margin grows because the rejected side got worse faster, while the model also drifts from the chosen outputs. "
        "Common for plain DPO and harmless while small; a winner anchor, a higher beta or fewer steps hold it back.",
    ),
    ("fell", "fell"): (
        "both errors fell",
        "the model moved towards both sides, as fine-tuning on all the outputs would; only the difference between "
        "the two is preference.",
    ),
    ("rose", "fell"): (
        "backwards",
        "the rejected outputs became likelier and the chosen ones less likely: check that the two sides are not swapped.",
    ),
    ("stayed", "rose"): (
        "pushed away from the rejected",
        "the chosen outputs stayed as likely as they were, the rejected ones became less likely.",
    ),
    ("fell", "stayed"): (
        "pulled towards the chosen",
        "the chosen outputs became likelier, the rejected ones stayed as they were.",
    ),
    ("rose", "stayed"): (
        "drift from the chosen",
        "the chosen outputs became less likely and the rejected ones did not move: the preference is not what drives this.",
    ),
    ("stayed", "fell"): (
        "towards the rejected",
        "the rejected outputs became likelier, the chosen ones did not: check the labels and the sign of the judge's weight.",
    ),
    ("stayed", "stayed"): (
        "neither moved",
        "policy and reference are still alike; try more steps, a higher learning rate or a lower beta.",
    ),
}


_WRONG_WAY: dict[Movement, tuple[str, str]] = {
    "rose": (
        "both errors rose, the chosen one more",
        "the model lost both sides and the margin went the wrong way: the learning rate is too high, beta too low, or the "
        "labels are swapped.",
    ),
    "fell": (
        "both errors fell, the rejected one more",
        "the model moved towards both sides and further towards the rejected: check the labels and the sign of the "
        "judge's weight.",
    ),
}
"""Both moved alike, and the margin with them below zero."""


_OF_TOKENS = {
    "both errors rose: displacement": "both log-probabilities fell: displacement",
    "both errors fell": "both log-probabilities rose",
    "both errors rose, the chosen one more": "both log-probabilities fell, the chosen one more",
    "both errors fell, the rejected one more": "both log-probabilities rose, the rejected one more",
}
"""The titles above that name the measure, in the words of log-probabilities."""

_AS_ERROR: dict[Movement, Movement] = {"rose": "fell", "fell": "rose", "stayed": "stayed"}
"""What a log-probability's movement would be as an error's."""


def measure_of(metrics: Metrics) -> Measure | None:
    """What was logged of both models; None if nothing."""
    if metrics.has("logps/policy_chosen", "logps/reference_chosen"):
        return "log-probability"
    return "error" if metrics.has("error/policy_chosen", "error/reference_chosen") else None


def moved(metrics: Metrics, side: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and how far ``chosen`` or ``rejected`` is from the reference, as :class:`Change` says it; None if not logged."""
    if measure_of(metrics) == "error":
        return relative_error(metrics, side)
    policy, reference = metrics.columns.get(f"logps/policy_{side}"), metrics.columns.get(f"logps/reference_{side}")
    if policy is None or reference is None:
        return None
    kept = np.isfinite(policy) & np.isfinite(reference)
    return (metrics.steps[kept], policy[kept] - reference[kept]) if kept.any() else None


def relative_error(metrics: Metrics, side: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and (policy - reference) / reference in per cent for ``chosen`` or ``rejected``; None if not logged."""
    policy_name, reference_name = f"error/policy_{side}", f"error/reference_{side}"
    if not metrics.has(policy_name, reference_name):
        return None
    policy, reference = metrics.columns[policy_name], metrics.columns[reference_name]
    kept = np.isfinite(policy) & np.isfinite(reference) & (reference > 0)
    if not kept.any():
        return None
    return metrics.steps[kept], 100 * (policy[kept] - reference[kept]) / reference[kept]


def displacement(metrics: Metrics | None) -> Displacement | None:
    """Read the two sides; None where they were not logged."""
    chosen, rejected = (_change(metrics, "chosen"), _change(metrics, "rejected")) if metrics else (None, None)
    if metrics is None or chosen is None or rejected is None:
        return None
    measure = measure_of(metrics) or "error"
    if not (math.isfinite(chosen.standard_error) and math.isfinite(rejected.standard_error)):
        return Displacement(chosen, rejected, "too few steps to tell", f"fewer than {LEAST_VALUES} steps were logged.", measure)
    sides: tuple[Movement, Movement] = (chosen.movement, rejected.movement)
    worse = chosen.mean >= rejected.mean
    if measure == "log-probability":
        sides = _AS_ERROR[chosen.movement], _AS_ERROR[rejected.movement]
        worse = chosen.mean <= rejected.mean
    title, text = _READINGS[sides]
    if sides[0] == sides[1] != "stayed" and worse:
        title, text = _WRONG_WAY[sides[0]]
    if measure == "log-probability":
        title = _OF_TOKENS.get(title, title)
    return Displacement(chosen, rejected, title, text, measure)


def _change(metrics: Metrics, side: str) -> Change | None:
    series = moved(metrics, side)
    if series is None:
        return None
    values = series[1][-max(LEAST_VALUES, len(series[1]) // 5) :]
    enough = len(values) >= LEAST_VALUES
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if enough else math.inf
    return Change(float(values.mean()), spread)


def loss_reading(metrics: Metrics, name: str = "loss") -> str:
    """What the loss, or the part of it with that name, did between its first and last tenth."""
    first, last = metrics.first_tenth(name), metrics.last_tenth(name)
    if first is None or last is None:
        return "No finite loss was logged."
    change = f"{first:.3f} in the first tenth, {last:.3f} in the last"
    if last > 1.02 * first:
        return f"It rose: {change}."
    return f"It fell: {change}." if last < 0.98 * first else f"It hardly moved: {change}."


def regulariser_reading(objective: object, metrics: Metrics) -> str:
    """What the loss's level says where the recipe adds an anchor or SFT to the preference; empty where it adds neither."""
    if not isinstance(objective, Mapping):
        return ""
    known = (("anchor", "the winner anchor"), ("sft", "added SFT"))
    weights = [(what, key, objective.get(key)) for key, what in known]
    added = [f"{what} ({key} {weight:g})" for what, key, weight in weights if isinstance(weight, int | float) and weight > 0]
    if not added:
        return ""
    drawn = metrics.has("loss/preference")
    error = "negative log-probability" if measure_of(metrics) == "log-probability" else "error"
    telling = "The preference part is drawn by itself." if drawn else "Read accuracy and margin instead."
    return (
        f"It includes {' and '.join(added)}: a multiple of the chosen outputs' {error}, which is there before anything is "
        f"learnt and can be far larger than the preference's part. Its level says nothing about the preference. {telling}"
    )


def accuracy_reading(metrics: Metrics) -> str:
    """What the training accuracy ended at."""
    last = metrics.last_tenth("rewards/accuracies")
    if last is None:
        return "No accuracy was logged."
    return f"At the end the policy orders {100 * last:.0f} % of the training pairs as the judge does; a coin orders 50 %."


def weight_reading(metrics: Metrics) -> str:
    """What the gradient weight ended at."""
    last = metrics.last_tenth("gradient_weight")
    if last is None:
        return "No gradient weight was logged."
    tail = "the pairs teach nearly nothing any more" if last < 0.1 else "the pairs still teach"
    return f"It starts at 0.5 and ends at {last:.2f}: {tail}."


def cautions(data: ReportData) -> list[str]:
    """What to keep in mind when reading the verdict, most telling first."""
    found = [*_evaluation_cautions(data.evaluation or {}), *_training_cautions(data.metrics)]
    return found + _pair_cautions(data.pairs or {}, data.outputs)


def _evaluation_cautions(evaluation: Mapping[str, Any]) -> list[str]:
    found = []
    arms = {} if deciding_statistics(evaluation) else evaluation.get("arms") or {}
    for name, arm in arms.items():
        against = arm.get("aligned_over_this")
        if against and not is_better(against):
            place = "measurably ahead" if is_worse(against) else "not measurably behind"
            found.append(
                f"The arm '{name}', trained for comparison, is {place}: against it the aligned model won "
                f"{against['wins']} and lost {against['losses']}."
            )
    prompts, rate = evaluation.get("prompts"), evaluation.get("win_rate")
    if isinstance(prompts, int) and prompts < FEW_PROMPTS:
        found.append(f"Only {prompts} prompts were compared: small effects do not show in so few.")
    if rate and (total := rate["wins"] + rate["losses"] + rate["ties"]) and rate["ties"] > MANY_TIES * total:
        found.append(
            f"{rate['ties']} of {total} comparisons are ties: the win rate speaks of the other {total - rate['ties']}."
        )
    return found


def _training_cautions(metrics: Metrics | None) -> list[str]:
    if metrics is None:
        return []
    found = []
    reading = displacement(metrics)
    if reading and reading.measure == "error" and reading.chosen.movement == "rose":
        found.append(f"Against the reference the chosen outputs' error rose by {reading.chosen.mean:.1f} %: {reading.title}.")
    if reading and reading.measure == "log-probability" and reading.chosen.movement == "fell":
        nats = f"{-reading.chosen.mean:.1f} nats"
        found.append(f"Against the reference the chosen answers' log-probability fell by {nats}: {reading.title}.")
    accuracy = metrics.last_tenth("rewards/accuracies")
    if accuracy is not None and accuracy > HIGH_ACCURACY:
        found.append(f"Training accuracy ends at {accuracy:.2f}: the pairs are learnt by heart, more steps bring little good.")
    return found


def _pair_cautions(pairs: Mapping[str, Any], outputs: str) -> list[str]:
    count, duplicates = pairs.get("pairs"), pairs.get("duplicates_dropped")
    if isinstance(count, int) and isinstance(duplicates, int) and duplicates > 0.2 * (count + duplicates):
        return [f"{duplicates} duplicate {outputs}s were dropped beside {count} pairs: the base repeats itself."]
    return []
