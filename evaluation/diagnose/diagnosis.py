"""From findings to one verdict: which counts, in which order, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyalign import __version__
from polyalign.core.files import atomic_write
from polyalign.evaluation.diagnose.evidence import Evidence, read_evidence
from polyalign.evaluation.diagnose.findings import LIMITS, Finding, State
from polyalign.evaluation.diagnose.outcome_rules import OUTCOME_RULES, worse_outputs
from polyalign.evaluation.diagnose.pair_rules import PAIR_RULES, identical_pictures
from polyalign.evaluation.diagnose.training_rules import TRAINING_RULES, not_a_number

FILE = "diagnosis.json"

RULES = (*PAIR_RULES, *TRAINING_RULES, *OUTCOME_RULES)
"""In the order of the findings: what is wrong with the pairs explains what follows from it, and no setting of training mends
it; then the settings; then what became of it."""

OF_CLOUDS = (not_a_number, worse_outputs)
"""What can be asked of completions: they have ground truth in the place of pairs, and no likelihood."""

SENTENCES: dict[State, str] = {
    "improved": "On held-out prompts the judge prefers the aligned model beyond chance.",
    "no signal": "The training had nothing to learn from: loss and margins stayed where they began.",
    "losing pictures without effect": "Right and losing pictures are the same: what compares them had nothing to learn from.",
    "noisy or flipped labels": "The labels contradict the judge, or one another.",
    "pairs drawn only from failures": "The pairs teach what the base's failures have in common, in the place of the skill.",
    "selection bias": "The chosen answers say some things far more often than right answers do, and that is learnt too.",
    "off-policy rejected answers": "The rejected sides are nothing that the base would write.",
    "length or size bias": "Size tells the chosen side from the rejected one.",
    "diverged": "The training left the track.",
    "beta too large": "Beta is too large for the scale of this likelihood.",
    "over-optimised": "The objective was followed further than the outputs are worth.",
    "displacement": "Both sides became less likely, the chosen one too.",
    "no change": "No rule found a fault, and the judge sees no difference beyond chance.",
    "nothing found": "No rule found a fault; without a comparison on held-out prompts nothing is claimed about the outputs.",
}


@dataclass(frozen=True)
class Diagnosis:
    """``state`` is the verdict and ``cause`` the first finding's, None where no rule holds. A run that the judge finds better
    is improved, and what holds all the same is listed: it may cost something that the judge does not see, or the next run.
    ``asked`` are all rules."""

    folder: Path
    state: State
    cause: str | None
    sentence: str
    evidence: str
    findings: tuple[Finding, ...]
    asked: tuple[Finding, ...]
    missing: tuple[str, ...]

    @property
    def unanswered(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.asked if finding.holds is None)

    def as_json(self) -> dict[str, Any]:
        """The content of diagnosis.json."""
        return {
            "verdict": self.state,
            "cause": self.cause,
            "sentence": self.sentence,
            "evidence": self.evidence,
            "findings": [asdict(finding) for finding in self.findings],
            "rules": [asdict(finding) for finding in self.asked],
            "missing": list(self.missing),
            "thresholds": asdict(LIMITS),
            "polyalign": __version__,
        }


def diagnose(folder: Path) -> Diagnosis:
    """Read a run folder and judge it. Works on a run that is still going, and on one without evaluation.

    Raises:
        UserError: there is no such folder, or nothing of a run lies in it.
    """
    evidence = read_evidence(folder)
    clouds = evidence.report.outputs == "cloud"
    asked = tuple(rule(evidence) for rule in (OF_CLOUDS if clouds else RULES) if _concerns(evidence, rule))
    findings = _first_of_each_cause([finding for finding in asked if finding.holds])
    state = _state(evidence, findings)
    found = evidence.outcome.rule.found if state in ("improved", "no change") or not findings else findings[0].found
    cause = findings[0].cause if findings else None
    sentence = evidence.outcome.sentence if clouds and state == evidence.outcome.state else SENTENCES[state]
    missing = tuple(part for part in evidence.missing if not (clouds and part.startswith("pairs/")))
    return Diagnosis(folder, state, cause, sentence, found, findings, asked, missing)


def _concerns(evidence: Evidence, rule: Callable[[Evidence], Finding]) -> bool:
    """Whether there is anything to ask about: most runs have no losing pictures, and nothing is missing there."""
    return rule is not identical_pictures or bool(evidence.pairs and evidence.pairs.losing_pictures)


def _first_of_each_cause(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.cause, finding)
    return tuple(first.values())


def _state(evidence: Evidence, findings: Sequence[Finding]) -> State:
    if evidence.improved:
        return "improved"
    if findings:
        return findings[0].state
    return "no change" if evidence.outcome.state == "no change" else "nothing found"


def write_diagnosis(folder: Path) -> Diagnosis:
    """:func:`diagnose`, also written as ``diagnosis.json`` into the run folder.

    Raises:
        UserError: as there, or the file cannot be written.
    """
    found = diagnose(folder)
    atomic_write(folder / FILE, json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n")
    return found
