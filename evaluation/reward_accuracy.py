"""Do rewards agree with preferences, on pairs like those they were trained on and on others?

The comparison is that of Lin et al. (arXiv 2409.03650): explicit reward models (EXRM, a head on a backbone) against the
implicit reward of a policy trained by DPO (DPORM), in distribution and out of it: under another distribution of prompts (prompt
shift), and of answers (response shift: another generator). They found the two comparable in distribution and the implicit one
worse out of it, by 3 % in the mean of five settings and 7 % at most.

Whatever scores outputs or pairs takes part, of any modality: judges, and an adapter with a policy and its reference.

Letters: N pairs of a split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from polyalign.core.adapter import Adapter, Judge, Model, Row
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.core.references import Seat
from polyalign.evaluation.implicit_reward import DRAWS, implicit_margins
from polyalign.evaluation.statistics import Interval, percentile_interval, resampled_means

Ties = Literal["half", "wrong", "left_out"]
"""What a pair counts whose two rewards are equal: half right, not right, or not at all."""
PAIR = ("chosen", "rejected")


class PairScorer(Protocol):
    """What gives reward margins of pairs. ``name`` and ``version`` say what it is."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def margins(self, pairs: Sequence[Row]) -> list[float]:
        """The reward of the chosen output less that of the rejected one, a number for each pair."""
        ...


class JudgeMargins:
    """A judge as a :class:`PairScorer`. All outputs of a call are scored together, so that judges may take part whose scores
    only compare outputs of one prompt."""

    def __init__(self, judge: Judge):
        self.judge, self.name = judge, judge.name

    @property
    def version(self) -> str:
        return self.judge.version

    def margins(self, pairs: Sequence[Row]) -> list[float]:
        """Raises UserError for a score that is not a finite number, with judge, pair and side."""
        conditions = [pair["condition"] for pair in pairs for _ in PAIR]
        outputs = [pair[side] for pair in pairs for side in PAIR]
        scores = [float(score) for score in self.judge.score(conditions, outputs)]
        if len(scores) != len(outputs):
            raise UserError(f"the judge '{self.name}' gave {len(scores)} scores for {len(outputs)} outputs")
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                pair = pairs[place // 2]
                raise UserError(
                    f"the judge '{self.name}' (version {self.version}) gave {score} for the {PAIR[place % 2]} output of pair "
                    f"{pair.get('pair_id')!r}, prompt {prompt_of(pair)!r}; rewards must be finite numbers"
                )
        return [scores[place] - scores[place + 1] for place in range(0, len(scores), 2)]


@dataclass(frozen=True)
class ImplicitMargins:
    """The implicit reward of a policy in memory as a :class:`PairScorer`: its log-likelihood ratio to the reference, mean over
    ``draws`` (one is enough where the likelihood draws nothing, as that of tokens). Without beta, which changes no sign."""

    adapter: Adapter
    model: Model
    reference: Seat | None
    name: str = "implicit reward"
    draws: int = DRAWS
    batch_size: int = 8

    @property
    def version(self) -> str:
        return f"1 {self.model.identity}, {self.draws} draws"

    def margins(self, pairs: Sequence[Row]) -> list[float]:
        found, decided = implicit_margins(
            self.adapter, self.model, self.reference, pairs, draws=self.draws, batch_size=self.batch_size
        )
        if not bool(decided.all()):
            undecided = pairs[decided.tolist().index(False)].get("pair_id")
            raise UserError(f"pair {undecided!r} is a tie by its target, so no reward can be right about it. Leave it out")
        margins = found.mean(1).tolist()
        for pair, margin in zip(pairs, margins, strict=True):
            if not math.isfinite(margin):
                raise UserError(
                    f"the scorer '{self.name}' gave a margin of {margin} for pair {pair.get('pair_id')!r}, prompt "
                    f"{prompt_of(pair)!r}; rewards must be finite numbers"
                )
        return margins


@dataclass(frozen=True)
class PairAccuracy:
    """Share of pairs whose chosen output has the higher reward. ``points`` are the pairs' shares of it (1, 0, or what a tie
    counts), None for those left out."""

    accuracy: float
    interval: Interval
    pairs: int
    prompts: int
    ties: int
    mean_margin: float
    points: tuple[float | None, ...]

    def as_json(self) -> dict[str, Any]:
        """Without the points."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "pairs": self.pairs,
            "prompts": self.prompts,
            "ties": self.ties,
            "mean_margin": self.mean_margin,
        }


def pair_accuracy(
    scorer: Judge | PairScorer, pairs: Sequence[Row], *, ties: Ties = "half", seed: int = 0, resamples: int = 2000
) -> PairAccuracy:
    """How often a reward agrees with the preference.

    Args:
        scorer: a judge, or what gives margins of pairs.
        pairs: ``pair_id``, ``condition``, ``chosen``, ``rejected``.
        ties: what a pair of equal rewards counts.
        seed: keys the bootstrap, which resamples whole prompts (95 %, percentiles).

    Raises:
        UserError: no pairs, a reward that is not finite (with judge and pair), nothing but ties where they are left out, or an
            option that is none of the allowed.
    """
    if ties not in get_args(Ties):
        raise UserError(f"ties is {ties!r}; allowed: {', '.join(get_args(Ties))}")
    if not pairs:
        raise UserError("an accuracy needs pairs, and there are none")
    margins = np.array(as_pair_scorer(scorer).margins(pairs))
    tied = margins == 0
    counted = [None if tie and ties == "left_out" else point for tie, point in zip(tied, _points(margins, ties), strict=True)]
    values = [point for point in counted if point is not None]
    if not values:
        raise UserError(f"'{scorer.name}' gives both outputs the same reward in all {len(pairs)} pairs, and ties are left out")
    prompts = [prompt_of(pair) for pair, point in zip(pairs, counted, strict=True) if point is not None]
    means = resampled_means(values, seed=seed_of(seed, "pair accuracy"), clusters=prompts, resamples=resamples)
    return PairAccuracy(
        accuracy=float(np.mean(values)),
        interval=percentile_interval(means),
        pairs=len(values),
        prompts=len(set(prompts)),
        ties=int(tied.sum()),
        mean_margin=float(margins.mean()),
        points=tuple(counted),
    )


def compare_rewards(
    scorers: Mapping[str, Judge | PairScorer],
    splits: Mapping[str, Sequence[Row]],
    *,
    in_distribution: str = "in distribution",
    ties: Literal["half", "wrong"] = "half",
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Rewards against each other, split by split: each one's accuracy, and the first's lead over each of the others.

    Args:
        scorers: by the name that the table gives them, such as "explicit" and "implicit"; the first is compared with the rest.
        splits: pairs by name: the one called ``in_distribution``, and one or more others, such as "prompt shift" and "response
            shift". None of the pairs may have been trained on.
        ties: what a pair of equal rewards counts. None is left out, so that all are asked about the same pairs.
        seed: keys the bootstrap: whole prompts of a split are drawn together, and the same for all scorers.

    Returns:
        ``scorers`` (name, version), ``in_distribution``, ``splits``: for each its ``accuracy`` by scorer
        (:meth:`PairAccuracy.as_json`) and ``lead``, the first's accuracy less each other one's with its interval, from the same
        resampled prompts; ``out_of_distribution``: for each scorer the ``mean`` accuracy over the other splits, the ``drop``
        to it from the one in distribution (with intervals; splits are resampled apart from each other), and its ``worst``
        split; and the mean ``lead`` there.

    Raises:
        UserError: no scorer, a split that is missing or empty, none out of distribution; what :func:`pair_accuracy` refuses.
    """
    _check(scorers, splits, in_distribution)
    if ties not in ("half", "wrong"):
        raise UserError(f"ties is {ties!r}; allowed here: half, wrong")
    first, *others = scorers
    found = _Resampled({}, {}, {}, seed, resamples)
    for split, pairs in splits.items():
        for name, scorer in scorers.items():
            found.add(split, name, pair_accuracy(scorer, pairs, ties=ties, seed=seed, resamples=resamples), pairs)
    shifted = [split for split in splits if split != in_distribution]
    return {
        "scorers": {name: {"name": scorer.name, "version": scorer.version} for name, scorer in scorers.items()},
        "in_distribution": in_distribution,
        "ties": ties,
        "splits": {
            split: {
                "accuracy": {name: found.accuracy[split, name].as_json() for name in scorers},
                "lead": {other: found.lead([split], first, other) for other in others},
            }
            for split in splits
        },
        "out_of_distribution": {
            "accuracy": {name: found.shifted(in_distribution, shifted, name) for name in scorers},
            "lead": {other: found.lead(shifted, first, other) for other in others},
        },
    }


@dataclass(frozen=True)
class _Resampled:
    """Accuracies and their bootstrap means by split and scorer. Scorers of one split share the drawn prompts."""

    accuracy: dict[tuple[str, str], PairAccuracy]
    means: dict[tuple[str, str], np.ndarray]
    points: dict[tuple[str, str], np.ndarray]
    seed: int
    resamples: int

    def add(self, split: str, name: str, accuracy: PairAccuracy, pairs: Sequence[Row]) -> None:
        points = [point for point in accuracy.points if point is not None]
        prompts = [prompt_of(pair) for pair in pairs]
        key = seed_of(self.seed, "reward comparison", split)
        self.accuracy[split, name] = accuracy
        self.means[split, name] = resampled_means(points, seed=key, clusters=prompts, resamples=self.resamples)

    def mean(self, splits: Sequence[str], name: str) -> tuple[float, np.ndarray]:
        """The mean over splits, each counting the same, and its resampled values."""
        exact = float(np.mean([self.accuracy[split, name].accuracy for split in splits]))
        return exact, np.mean([self.means[split, name] for split in splits], axis=0)

    def lead(self, splits: Sequence[str], first: str, other: str) -> dict[str, Any]:
        (a, resampled_a), (b, resampled_b) = self.mean(splits, first), self.mean(splits, other)
        return {"difference": a - b, "interval": list(percentile_interval(resampled_a - resampled_b))}

    def shifted(self, inside: str, splits: Sequence[str], name: str) -> dict[str, Any]:
        (at_home, resampled_home), (away, resampled_away) = self.mean([inside], name), self.mean(splits, name)
        worst = min(splits, key=lambda split: self.accuracy[split, name].accuracy)
        return {
            "mean": away,
            "interval": list(percentile_interval(resampled_away)),
            "drop": at_home - away,
            "drop_interval": list(percentile_interval(resampled_home - resampled_away)),
            "worst": {"split": worst, "accuracy": self.accuracy[worst, name].accuracy},
        }


def as_text(report: Mapping[str, Any]) -> str:
    """The table of :func:`compare_rewards` for a terminal: accuracies with 95 % intervals, and the first scorer's leads."""
    names = list(report["scorers"])
    head = ["", "pairs", *names, *(f"{names[0]} - {other}" for other in names[1:])]
    rows = [head]
    for split, block in report["splits"].items():
        pairs = str(next(iter(block["accuracy"].values()))["pairs"])
        cells = [_cell(block["accuracy"][name]["accuracy"], block["accuracy"][name]["interval"]) for name in names]
        rows.append([split, pairs, *cells, *_leads(block, names)])
    outside = report["out_of_distribution"]
    means = [_cell(outside["accuracy"][name]["mean"], outside["accuracy"][name]["interval"]) for name in names]
    rows.append(["mean out of distribution", "", *means, *_leads(outside, names)])
    drops = [_cell(outside["accuracy"][name]["drop"], outside["accuracy"][name]["drop_interval"], sign=True) for name in names]
    rows.append(["drop to it", "", *drops, *("" for _ in names[1:])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_pair_scorer(scorer: Judge | PairScorer) -> PairScorer:
    """A judge, or what gives margins already, as the latter."""
    return JudgeMargins(scorer) if hasattr(scorer, "score") else scorer  # pyright: ignore[reportArgumentType, reportReturnType]


def prompt_of(pair: Row) -> str:
    """What clusters pairs: the prompt, with the turns before it in a conversation."""
    condition = pair["condition"]
    if not isinstance(condition, Mapping):
        return str(condition)
    messages = condition.get("messages")
    return str(condition.get("prompt", condition)) if messages is None else str(messages)


def _points(margins: np.ndarray, ties: Ties) -> list[float]:
    return np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5 if ties == "half" else 0.0)).tolist()


def _check(scorers: Mapping[str, Any], splits: Mapping[str, Sequence[Row]], in_distribution: str) -> None:
    if not scorers:
        raise UserError("a comparison of rewards needs one or more scorers, such as an explicit and an implicit reward")
    named = ", ".join(f"'{name}'" for name in splits) or "none"
    if in_distribution not in splits:
        raise UserError(
            f"the split '{in_distribution}' is missing; given are: {named}. Name it with in_distribution, or add it"
        )
    if len(splits) < 2:
        raise UserError(
            f"there is no split out of distribution beside '{in_distribution}': add pairs on other prompts ('prompt shift') or "
            "of another generator ('response shift')"
        )
    empty = [name for name, pairs in splits.items() if not pairs]
    if empty:
        raise UserError(f"the split '{empty[0]}' has no pairs; leave it out, or fill it")


def _cell(value: float, interval: Sequence[float], *, sign: bool = False) -> str:
    number = "{:+.3f}" if sign else "{:.3f}"
    return f"{number.format(value)} [{number.format(interval[0])}, {number.format(interval[1])}]"


def _leads(block: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [_cell(block["lead"][other]["difference"], block["lead"][other]["interval"], sign=True) for other in names[1:]]
