"""Audio-alpaca's strategies (arXiv 2404.09956): what is sampled for a prompt, which samples become pairs, and the filter. Pure:
no models, no files.

=========  =====================================================================  ==================================
strategy   samples                                                                pairs
=========  =====================================================================  ==================================
1.1        the prompt, once with each of several numbers of steps                 the best against each of the others
1.2        the prompt, several times                                              the best against each of the others
2          captions that are partly wrong, once each                              the prompt's own against each
3          captions with another order or other events, once each                 the prompt's own against each
=========  =====================================================================  ==================================

The publication's audio of a prompt for 2 and 3 is one sample; here it is the first (or the best) of those of strategy 1.2, so
that it is not sampled twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.recipe import PairingConfig
from polyalign.datasets.audio.perturb import Perturbed
from polyalign.modalities.audio.config import AudioJudgeConfig, FilterConfig, StrategiesConfig

STRATEGIES = ("1.1", "1.2", "2", "3")
OWN = "1.2"
"""The strategy whose samples are the prompt's own, with the sampler's steps."""

Condition = Mapping[str, Any]
Perturbations = Mapping[str, Sequence[Perturbed]]
"""By strategy, "2" and "3"."""


@dataclass(frozen=True)
class Asked:
    """One sample: of which strategy, the number within it, the condition it is drawn for, and the kind of perturbation."""

    strategy: str
    number: int
    condition: Condition
    kind: str = ""


@dataclass(frozen=True)
class Judged:
    """One sample as it was judged: its hash ("" if there is nothing to hear), each judge's score, and the weighted sum."""

    output_hash: str
    scores: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class Made:
    """A pair: positions among the samples of a prompt."""

    strategy: str
    chosen: int
    rejected: int


@dataclass
class Outcome:
    """The pairs of one prompt, and by strategy what did not become one."""

    pairs: list[Made] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in STRATEGIES})


def refuse_judges(judges: Sequence[AudioJudgeConfig]) -> None:
    """Raises UserError for judges that cannot rank together: two of one name, or all of weight 0."""
    from polyalign.evaluation.judges import build

    names = [build(judge).name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"pairs.judges: two judges are called '{name}'; give each a name with its option 'label'")
    if all(judge.weight == 0 for judge in judges):
        raise UserError("pairs.judges: every judge has weight 0, so nothing ranks the samples. Give one a weight")


def asked_of(condition: Condition, perturbed: Perturbations, settings: StrategiesConfig) -> list[Asked]:
    """Every sample of a prompt, in a fixed order."""
    own = max(settings.samples, 1 if any(perturbed.values()) else 0)
    asked = [Asked("1.1", number, {**condition, "steps": steps}) for number, steps in enumerate(settings.steps)]
    asked += [Asked(OWN, number, condition) for number in range(own)]
    for strategy in ("2", "3"):
        asked += [
            Asked(strategy, number, {**condition, "prompt": one.prompt}, one.kind)
            for number, one in enumerate(perturbed.get(strategy, ()))
        ]
    return asked


def pairs_of(
    asked: Sequence[Asked],
    judged: Sequence[Judged],
    settings: StrategiesConfig,
    pairing: PairingConfig,
    filters: Mapping[str, FilterConfig],
) -> Outcome:
    """The pairs of one prompt. A difference of exactly zero is a tie, dropped and counted; so are identical and silent samples,
    pairs whose perturbed prompt sounds better (``reversed``), differences not above the margin, and what a judge's filter
    rejects. Of the rest of a strategy those with the largest difference are kept, as many as there may be."""
    outcome = Outcome()
    for strategy in STRATEGIES:
        found = []
        for winner, loser in _compared(strategy, asked, judged, settings):
            why = _refused(judged[winner], judged[loser], pairing.margin, filters)
            outcome.counts[strategy]["compared"] += 1
            if why is None:
                found.append(Made(strategy, winner, loser))
            else:
                outcome.counts[strategy][why] += 1
        found.sort(key=lambda pair: judged[pair.rejected].total - judged[pair.chosen].total)  # stable: equals by position
        kept = found if pairing.max_pairs_per_prompt is None else found[: pairing.max_pairs_per_prompt]
        outcome.counts[strategy].update(pairs=len(kept), over_limit=len(found) - len(kept))
        outcome.pairs += kept
    return outcome


def _compared(
    strategy: str, asked: Sequence[Asked], judged: Sequence[Judged], settings: StrategiesConfig
) -> list[tuple[int, int]]:
    """(winner, loser) by position."""
    own = _heard(OWN, asked, judged)
    if strategy in ("2", "3"):
        losers = [place for place, one in enumerate(asked) if one.strategy == strategy]
        if not own or not losers:
            return []
        winner = _best(own, judged) if settings.winner == "best" else own[0]
        return [(winner, loser) for loser in losers]
    if strategy == OWN and not settings.samples:
        return []
    places = [place for place, one in enumerate(asked) if one.strategy == strategy]
    heard = _heard(strategy, asked, judged)
    if not heard:
        return []
    winner = _best(heard, judged)
    return [(winner, place) for place in places if place != winner]


def _heard(strategy: str, asked: Sequence[Asked], judged: Sequence[Judged]) -> list[int]:
    return [place for place, one in enumerate(asked) if one.strategy == strategy and judged[place].output_hash]


def _best(places: Sequence[int], judged: Sequence[Judged]) -> int:
    return max(places, key=lambda place: (judged[place].total, -place))


def _refused(winner: Judged, loser: Judged, margin: float, filters: Mapping[str, FilterConfig]) -> str | None:
    """Why two samples are no pair, as it is counted; None if they are one."""
    difference = winner.total - loser.total
    if not loser.output_hash:
        return "silent"
    if winner.output_hash == loser.output_hash:
        return "duplicates"
    if difference == 0:
        return "ties"
    if difference < 0:
        return "reversed"
    if difference <= margin:
        return "below_margin"
    passed = all(passes(one, winner.scores[name], loser.scores[name]) for name, one in filters.items())
    return None if passed else "filtered"


def passes(given: FilterConfig, chosen: float, rejected: float) -> bool:
    """Whether a pair with these scores passes one judge's filter: ``chosen >= alpha``, ``rejected >= beta``, ``delta[0] <=
    chosen - rejected <= delta[1]``."""
    least, most = given.delta
    difference = chosen - rejected
    return (
        (given.alpha is None or chosen >= given.alpha)
        and (given.beta is None or rejected >= given.beta)
        and (least is None or difference >= least)
        and (most is None or difference <= most)
    )


# --- the table ---------------------------------------------------------------------------------------------------------------


def table_of(
    counts: Mapping[str, Mapping[str, int]], scores: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, float]]]]
) -> list[dict[str, Any]]:
    """A row for each strategy and one for all: ``pairs``, what was dropped and why, and by judge the mean score of winners and
    losers and their difference (the publication's table). ``scores`` are (chosen, rejected) of each pair, by strategy."""
    of_all = [pair for name in STRATEGIES for pair in scores.get(name, ())]
    total = Counter[str]()
    for name in STRATEGIES:
        total.update(counts.get(name, {}))
    rows = [(name, counts.get(name, {}), scores.get(name, ())) for name in STRATEGIES] + [("all", total, of_all)]
    return [
        {"strategy": name, **_counted(counted), "scores": _means(pairs)}
        for name, counted, pairs in rows
        if counted.get("compared")
    ]


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    names = ("compared", "pairs", "ties", "reversed", "below_margin", "filtered", "duplicates", "silent", "over_limit")
    return {name: counts.get(name, 0) for name in names}


def _means(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    judges = pairs[0][0] if pairs else ()
    found = {}
    for judge in judges:
        chosen, rejected = fmean(pair[0][judge] for pair in pairs), fmean(pair[1][judge] for pair in pairs)
        found[judge] = {"chosen": chosen, "rejected": rejected, "difference": chosen - rejected}
    return found


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    lines = ["strategy  compared  pairs  dropped (why)"]
    for row in table:
        why = [
            f"{row[name]} {name}"
            for name in ("ties", "reversed", "below_margin", "filtered", "duplicates", "silent", "over_limit")
        ]
        said = ", ".join(part for part in why if not part.startswith("0 ")) or "none"
        lines.append(f"{row['strategy']:8}  {row['compared']:8}  {row['pairs']:5}  {said}")
        for judge, mean in row["scores"].items():
            numbers = f"chosen {mean['chosen']:.3f}, rejected {mean['rejected']:.3f}, difference {mean['difference']:.3f}"
            lines.append(f"          {judge}: {numbers}")
    return "\n".join(lines)
