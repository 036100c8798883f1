"""Rules about over-optimisation: what the judge says of the outputs, and what token models show before a judge is asked."""

from __future__ import annotations

from polyalign.core.early_stop import ENTROPY, MASS, SIDES, TopKWatch
from polyalign.core.recipe import StopConfig
from polyalign.evaluation.diagnose.evidence import Evidence
from polyalign.evaluation.diagnose.findings import Finding, unknown

CURE = (
    "Take an earlier checkpoint or fewer steps (train.stop ends a run of a token model by itself), a higher beta, or a judge "
    "that is harder to please."
)


def worse_outputs(evidence: Evidence) -> Finding:
    """The report's own rules on held-out outputs, so that the two never say different things."""
    verdict = evidence.outcome
    fired = [rule for rule in verdict.rules if rule.fired and rule.state in ("over-optimised", "diverged")]
    cause, state = "learnt, yet worse", "over-optimised"
    rule = "a rule of the report fired: held-out outputs are worse, other judges disagree, or statistics ran away"
    if not evidence.report.evaluation:
        return unknown(cause, state, rule, "there is no evaluation.json")
    if not fired:
        decided = verdict.rule
        return Finding(cause, state, False, rule, decided.found, "")
    first = fired[0]
    state = "diverged" if first.state == "diverged" else "over-optimised"
    return Finding(first.name, state, True, first.says, first.found, CURE)


def entropy_turned(evidence: Evidence) -> Finding:
    """Shi et al., arXiv 2410.11677, by the rule that ``train.stop`` uses, with its defaults."""
    cause, state = "top-k entropy turned down", "over-optimised"
    config = StopConfig()
    rule = (
        f"the smoothed entropy of the ten most probable tokens falls for {config.patience} checks in a row after having risen, "
        f"or their mass lies {config.mass_drop:.0%} below its maximum while the entropy rises"
    )
    metrics = evidence.metrics
    if metrics is None or not metrics.has(*(f"{name}_{side}" for name in (ENTROPY, MASS) for side in SIDES)):
        return unknown(cause, state, rule, f"{ENTROPY} and {MASS} were not logged (token models whose likelihood keeps them)")
    watch = TopKWatch(config)
    for place, step in enumerate(metrics.steps):
        why = watch.of_figures(int(step), {name: float(values[place]) for name, values in metrics.columns.items()})
        if why is not None:
            return Finding(cause, state, True, rule, why, CURE)
    return Finding(cause, state, False, rule, f"did not happen in {len(metrics.steps)} logged steps", "")


OUTCOME_RULES = (worse_outputs, entropy_turned)
