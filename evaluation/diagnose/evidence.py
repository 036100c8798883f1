"""What a run folder has to say, before any rule is asked, and in units that do not depend on the modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyalign.evaluation.diagnose.findings import LIMITS
from polyalign.evaluation.diagnose.pair_facts import PairFacts, read_pair_facts
from polyalign.evaluation.diagnose.selected import Selection, read_selection
from polyalign.evaluation.report.collect import Metrics, ReportData, collect
from polyalign.evaluation.report.verdict import Verdict, decide

Side = Literal["chosen", "rejected"]

WINDOW = 5
"""Logged steps that are averaged before one stretch of training is held against the next: single steps are mostly noise."""


@dataclass(frozen=True)
class Movement:
    """How far one side's likelihood has moved from the reference's: ``series`` (S,) by logged step, positive where the side
    became likelier. Tokens: nats of log-probability a token. Denoising models: the error's fall relative to the reference's
    error. A small value is in both the relative change of what is measured, so they have thresholds in common."""

    steps: np.ndarray
    series: np.ndarray
    tokens: bool

    @property
    def end(self) -> float:
        """Mean over the last fifth of training, at least ``WINDOW`` logged steps."""
        return float(self.series[-max(WINDOW, len(self.series) // 5) :].mean())

    @property
    def speed(self) -> float | None:
        """The largest change a step between one window and the next; None where less than two windows were logged."""
        count = len(self.series) // WINDOW
        if count < 2:
            return None
        means = self.series[: count * WINDOW].reshape(count, WINDOW).mean(1)
        places = self.steps[: count * WINDOW].reshape(count, WINDOW).mean(1)
        return float(np.abs(np.diff(means) / np.diff(places)).max())

    def words(self, value: float) -> str:
        return f"{value:+.3f} nats a token" if self.tokens else f"{-100 * value:+.1f} % of the error"


@dataclass(frozen=True)
class Evidence:
    """``report`` is what the report's page is made of, ``outcome`` its verdict on held-out outputs."""

    report: ReportData
    outcome: Verdict
    pairs: PairFacts | None
    chosen: Movement | None
    rejected: Movement | None
    missing: list[str]
    selection: Selection | None = None

    @property
    def metrics(self) -> Metrics | None:
        return self.report.metrics

    @property
    def improved(self) -> bool:
        return self.outcome.state == "improved"

    def end(self, name: str) -> float | None:
        """Mean of a figure over the last tenth of training."""
        return self.metrics.last_tenth(name) if self.metrics else None

    def worst_third(self, name: str) -> float | None:
        """The largest of the means over the three thirds of training."""
        if self.metrics is None or not self.metrics.has(name):
            return None
        values = self.metrics.series(name)[1]
        return max(float(part.mean()) for part in np.array_split(values, 3) if len(part)) if len(values) else None


def read_evidence(folder: Path) -> Evidence:
    """Read the run folder.

    Raises:
        UserError: there is no such folder, or nothing of a run lies in it.
    """
    report = collect(folder)
    missing = [line for line in report.missing if not line.startswith("pairs/")]
    metrics = report.metrics
    return Evidence(
        report=report,
        outcome=decide(report),
        pairs=read_pair_facts(folder / "pairs", judge_weights(report.config), missing, sampled=are_sampled(report.config)),
        chosen=movement(metrics, "chosen"),
        rejected=movement(metrics, "rejected"),
        missing=missing,
        selection=read_selection(report.pairs, LIMITS.least_pairs, missing),
    )


def are_sampled(config: Mapping[str, Any]) -> bool:
    """Whether ``generate`` samples and judges for the pairs, by the recipe's ``pairs.source``, and keeps those samples: pairs
    that are read, or made otherwise, have none. A recipe that does not say is taken at the default."""
    pairs = config.get("pairs")
    return not isinstance(pairs, Mapping) or pairs.get("source", "generate") == "generate"


def judge_weights(config: Mapping[str, Any]) -> dict[str, float]:
    """The weights of the judges that made the pairs."""
    pairs = config.get("pairs")
    judges = pairs.get("judges") if isinstance(pairs, Mapping) else None
    found = [judge for judge in judges if isinstance(judge, Mapping)] if isinstance(judges, list) else []
    weights = {str(judge.get("name")): judge.get("weight", 1.0) for judge in found}
    return {name: float(weight) for name, weight in weights.items() if isinstance(weight, int | float)}


def movement(metrics: Metrics | None, side: Side) -> Movement | None:
    """One side's movement; None where neither tokens nor errors of both seats were logged."""
    if metrics is None:
        return None
    names = [(f"logps_per_token/policy_{side}", f"logps_per_token/reference_{side}", True)]
    names += [(f"error/policy_{side}", f"error/reference_{side}", False)]
    for policy_name, reference_name, tokens in names:
        if metrics.has(policy_name, reference_name):
            policy, reference = metrics.columns[policy_name], metrics.columns[reference_name]
            kept = np.isfinite(policy) & np.isfinite(reference) & (tokens | (reference > 0))
            if not kept.any():
                return None
            change = policy[kept] - reference[kept]
            return Movement(metrics.steps[kept], change if tokens else -change / reference[kept], tokens)
    return None
