"""Training in rounds, in every modality: sample k outputs a prompt from the policy as it is, judge them, make pairs, train some
steps on these, and again. One loop serves online DPO, online IPO and IPO-MD (soft targets; samples of a mixture of policy and
reference), iterated offline DPO, CRPO, and listwise ADPO.

    FOLDER/rounds/001/pairs/        the first round's pair store
    FOLDER/rounds/001/round.json    its figures, written when its pairs are complete
    FOLDER/checkpoints/, metrics.jsonl   one training over all rounds

What a round samples follows from the seed, the round's number and the weights of its first step, and every shard is there whole
or not at all. So a run that was killed at any moment goes on with the round it was in, to the same pairs and weights. The
reference is what the algorithm's seat says; :func:`refreshed` makes it the policy at the beginning of each round.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from polyalign.core import checkpoint as checkpoints
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.learner import refuse_other_names, trained
from polyalign.core.randomness import permutation, seed_of
from polyalign.core.recipe import OptimizerConfig, ReferenceConfig, TrackingConfig, TrainSettings
from polyalign.core.references import Cached
from polyalign.core.trainer import Part, Trainer
from polyalign.datasets.pairing import Mode, Ties
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.generation import GenerationSettings, Sampler, generate_pairs, read_samples

if TYPE_CHECKING:
    from polyalign.core.adapter import Judge, Model
    from polyalign.core.algorithm import Algorithm

Condition = Mapping[str, Any]


@dataclass(frozen=True)
class OnlineSettings:
    """How rounds are made.

    rounds: how many; ``train.steps`` are all steps, in equal parts.
    prompts_per_round: taken from the prompts in a keyed order, which begins anew when all have been asked.
    mode: how judged samples become pairs, see :func:`polyalign.datasets.pairing.pair_up`. ``first_second`` with two samples is
        online DPO's and IPO-MD's; ``best_rest`` with ``lists`` gives groups of all samples.
    targets: ``hard``: the better one is preferred; ``soft``: it is preferred with probability sigmoid(difference of the scores
        / ``scale``), or, for lists, by the softmax of scores / ``scale``.
    ties: ``drop`` them, or ``half``: a pair whose target is one half each.
    optimizer: ``keep`` its moments from round to round, or ``reset`` them.
    lists: train on groups of all samples of a prompt and not on pairs. Prompts with two samples alike are left out, since
        groups have one size.

    Raises:
        UserError: lists in another mode, or a scale that is not above 0.
    """

    rounds: int = 4
    prompts_per_round: int = 64
    samples_per_prompt: int = 2
    mode: Mode = "best_worst"
    targets: Literal["hard", "soft"] = "hard"
    scale: float = 1.0
    ties: Literal["drop", "half"] = "drop"
    margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    optimizer: Literal["keep", "reset"] = "keep"
    lists: bool = False
    prompts_per_shard: int = 32

    def __post_init__(self) -> None:
        if not self.scale > 0.0:
            raise UserError(f"online.scale divides scores and must be above 0, found {self.scale}")
        if self.lists and (self.mode != "best_rest" or self.margin or self.max_pairs_per_prompt is not None):
            raise UserError(
                "online.lists trains on all samples of a prompt, so it takes online.mode: best_rest and neither margin nor "
                "max_pairs_per_prompt"
            )

    def generation(self, sampler: Mapping[str, Any]) -> GenerationSettings:
        ties: Ties = "keep" if self.ties == "half" or self.lists else "drop"
        return GenerationSettings(
            samples_per_prompt=self.samples_per_prompt,
            prompts_per_shard=self.prompts_per_shard,
            mode=self.mode,
            margin=self.margin,
            max_pairs_per_prompt=self.max_pairs_per_prompt,
            ties=ties,
            sampler=sampler,
        )


@dataclass(frozen=True)
class Round:
    """What ``round.json`` says: the number, the policy's steps when it sampled, samples judged in this round and in all up to
    it, prompts, groups to train on, ties and duplicates that were dropped, and the samples' mean score."""

    round: int
    after_steps: int
    samples: int
    samples_so_far: int
    prompts: int
    groups: int
    ties_dropped: int
    duplicates_dropped: int
    mean_score: float


@dataclass(frozen=True)
class MixtureSampler:
    """Samples of the geometric mixture of policy and reference at each token (IPO-MD, arXiv 2403.08635). ``share`` is the
    reference's; the publication uses 0.125 to 0.25. ``reference`` None is the policy with its LoRA off.

    Raises:
        UserError: a modality that does not sample token by token.
    """

    adapter: Any
    share: float
    reference: Model | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.adapter, "sample_mixture"):
            raise UserError("sampling from a mixture of policy and reference is for models that sample token by token")

    def sample(self, model: Any, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        return self.adapter.sample_mixture(model, conditions, seeds, share=self.share, reference=self.reference)


def refreshed(settings: OnlineSettings, train: TrainSettings) -> ReferenceConfig:
    """A reference seat that is the policy as it was at the beginning of the round: iterated DPO's, and CRPO's."""
    return train.reference.model_copy(update={"seat": "ema", "ema_decay": 0.0, "ema_every": steps_of_round(settings, train)})


def steps_of_round(settings: OnlineSettings, train: TrainSettings) -> int:
    """Raises UserError where rounds would not be equal."""
    steps, rest = divmod(train.steps, settings.rounds)
    if rest or not steps:
        raise UserError(
            f"train.steps are all steps of the training, in {settings.rounds} equal rounds (online.rounds), and {train.steps} "
            f"do not divide so. Take a multiple of {settings.rounds}"
        )
    return steps


@dataclass(frozen=True)
class OnlineTraining:
    """A training in rounds; ``run`` does those that are left.

    model: holds the network that ``algorithm`` trains.
    judge: decides every round; its score is that of the policy's samples, too.
    outputs: the kind of what is sampled, a name of :data:`polyalign.datasets.outputs.KINDS`.
    sampler: who samples; the adapter by default, :class:`MixtureSampler` for IPO-MD.
    sampler_settings: recorded with the pairs.
    select: which rows of a round's store to train on, where some do not fit the model.
    identity: as for the trainer. The pairs are no part of it: they follow from the rest.

    Raises:
        UserError: no prompts, steps that do not divide into rounds, several processes, or a reference that cannot follow.
    """

    adapter: Any
    model: Model
    algorithm: Algorithm
    judge: Judge
    conditions: Sequence[Condition]
    settings: OnlineSettings
    train: TrainSettings
    folder: Path
    seed: int
    outputs: str
    sampler: Sampler | None = None
    sampler_settings: Mapping[str, Any] = field(default_factory=dict)
    select: Callable[[PairStore], Sequence[int]] | None = None
    identity: Mapping[str, Any] | None = None
    optimizers: Mapping[str, OptimizerConfig] | None = None
    tracking: TrackingConfig | None = None

    def __post_init__(self) -> None:
        steps_of_round(self.settings, self.train)
        _refuse_several_processes()
        _refuse_starting_weights(self.algorithm)
        if not self.conditions:
            raise UserError("there are no prompts to sample from; give at least one")

    def run(self) -> list[Round]:
        """All rounds that are left; returns the figures of every round. A round whose judge prefers nothing ends the training:
        the policy has nothing more to learn from it.

        Raises:
            UserError: nothing to train on in the first round, or what :func:`generate_pairs` and the trainer refuse.
        """
        rounds: list[Round] = []
        for number in range(1, self.settings.rounds + 1):
            after, reached = (number - 1) * self._steps, _reached(self.folder)
            if reached <= after:
                _restore(self.algorithm, self.folder, after)
                self._make_pairs(number)
            data = self._data(number)
            rounds.append(_recorded(self._place(number), number, after, data, rounds[-1] if rounds else None))
            if not len(data):
                _tell_end(number, rounds)
                break
            # A round that is finished is loaded, since its weights may be the last, or train.stop may have ended the training.
            if reached <= after + self._steps and self._trainer(data, after).run().stopped:
                break
        return rounds

    @property
    def _steps(self) -> int:
        return steps_of_round(self.settings, self.train)

    def _place(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:03d}"

    def _make_pairs(self, number: int) -> None:
        """Sampling is done in evaluation mode, without gradient."""
        import torch

        training = self.model.network.training
        self.model.network.eval()
        with torch.no_grad():
            generate_pairs(
                self.sampler or self.adapter,
                _of_round(self.model, number),
                _conditions_of_round(self.conditions, self.settings, self.seed, number),
                self.judge,
                settings=self.settings.generation(self.sampler_settings),
                folder=self._place(number) / "pairs",
                seed=seed_of(self.seed, "round", number),
                outputs=self.outputs,
                may_be_none=True,
            )
        self.model.network.train(training)

    def _data(self, number: int) -> RoundData:
        store = PairStore(self._place(number) / "pairs", self.outputs)
        usable = self.select(store) if self.select is not None and len(store) else None
        return RoundData(store, number, self.settings, self.judge.name, usable)

    def _trainer(self, data: RoundData, after: int) -> Trainer:
        return Trainer(
            self.algorithm,
            data,
            self.train,
            self.folder,
            seed=self.seed,
            identity=self.identity,
            optimizers=self.optimizers,
            part=Part(after, after + self._steps, fresh_optimizer=self.settings.optimizer == "reset"),
            tracking=self.tracking,
        )


class RoundData:
    """What the trainer sees of a round's pair store: the pairs under ids that no other round has, with their targets, or all
    samples of a prompt together. ``indices`` are the rows that may be used; None is all."""

    def __init__(
        self, store: PairStore, number: int, settings: OnlineSettings, judge: str, indices: Sequence[int] | None = None
    ):
        self.store, self.number, self.settings, self.judge = store, number, settings, judge
        usable = list(range(len(store))) if indices is None else list(indices)
        self.groups = self._lists(usable) if settings.lists else [[index] for index in usable]

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        wanted = [self.groups[index] for index in indices]
        found = iter(self.store.rows([row for group in wanted for row in group], decode=False))
        return [self._group([next(found) for _ in group]) for group in wanted]

    def _lists(self, usable: Sequence[int]) -> list[list[int]]:
        """The pairs of each prompt, whose best sample they share, where there is one for every other sample."""
        together: dict[str, list[int]] = {}
        names = [
            name for path in self.store.shards() for name in pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist()
        ]
        for index in usable:
            together.setdefault(names[index].split("-")[0], []).append(index)
        return [group for group in together.values() if len(group) == self.settings.samples_per_prompt - 1]

    def _group(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = rows[0]
        scores = [first["chosen_scores"][self.judge], *(row["rejected_scores"][self.judge] for row in rows)]
        target = targets_of(scores, soft=self.settings.targets == "soft", scale=self.settings.scale)
        named = first | {"pair_id": f"{self.number:03d}-{first['pair_id']}", "target": target}
        if not self.settings.lists:
            return named
        named["candidates"] = [first["chosen"], *(row["rejected"] for row in rows)]
        return {name: value for name, value in named.items() if name not in ("chosen", "rejected")}


def targets_of(scores: Sequence[float], *, soft: bool, scale: float) -> tuple[float, ...]:
    """The target over candidates whose best is the first: the softmax of scores / scale (of a pair: sigmoid of the difference),
    or an equal share for each of those with the best score."""
    if soft:
        shares = [math.exp((score - max(scores)) / scale) for score in scores]
    else:
        shares = [float(score == max(scores)) for score in scores]
    return tuple(share / sum(shares) for share in shares)


def _conditions_of_round(conditions: Sequence[Condition], settings: OnlineSettings, seed: int, number: int) -> list[Condition]:
    """The next prompts of an endless order of all of them."""
    found = []
    for place in range((number - 1) * settings.prompts_per_round, number * settings.prompts_per_round):
        turn, within = divmod(place, len(conditions))
        found.append(conditions[permutation(seed, len(conditions), "online prompts", turn)[within]])
    return found


def _of_round(model: Model, number: int) -> Model:
    """The model under a name that says which policy it is; the base's hash stays where provenance looks for it."""
    name, at, version = model.identity.partition("@")
    return replace(model, identity=f"{name}, round {number}{at}{version}")


def _recorded(place: Path, number: int, after: int, data: RoundData, before: Round | None) -> Round:
    """The round's figures, from ``round.json`` or from its pairs."""
    file = place / "round.json"
    if file.is_file():
        return Round(**json.loads(file.read_text(encoding="utf-8")))
    try:
        summary = json.loads((place / "pairs" / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{place}: the training is past the beginning of this round, and its pairs are not complete; they cannot be made "
            "again, since the weights that gave them are gone. Put the folder back, or take a new run folder"
        ) from error
    samples = read_samples(data.store)
    found = Round(
        round=number,
        after_steps=after,
        samples=len(samples),
        samples_so_far=len(samples) + (before.samples_so_far if before else 0),
        prompts=summary["prompts"],
        groups=len(data),
        ties_dropped=summary["ties_dropped"],
        duplicates_dropped=summary["duplicates_dropped"],
        mean_score=sum(sample.score for sample in samples) / len(samples),
    )
    atomic_write(file, json.dumps(vars(found), indent=1) + "\n")
    return found


def _tell_end(number: int, rounds: Sequence[Round]) -> None:
    """Raises UserError if the very first round has nothing to train on."""
    last = rounds[-1]
    why = (
        f"of {last.samples} samples of {last.prompts} prompts none is preferred to another ({last.ties_dropped} ties, "
        f"{last.duplicates_dropped} duplicates)"
    )
    if number == 1:
        raise UserError(f"round 1 has nothing to train on: {why}. Take more samples per prompt, or another judge")
    print(f"train: ended before round {number}: {why}", file=sys.stderr, flush=True)


def _reached(folder: Path) -> int:
    found = checkpoints.latest(folder / "checkpoints")
    return 0 if found is None else found.step


def _restore(algorithm: Algorithm, folder: Path, step: int) -> None:
    """The weights of the last checkpoint into the networks, for sampling; the trainer loads the rest."""
    found = checkpoints.latest(folder / "checkpoints")
    if (0 if found is None else found.step) != step:
        raise UserError(f"{folder}: a round begins at step {step}, and the last whole checkpoint is of step {_reached(folder)}")
    if found is None:
        return
    for name, network in algorithm.networks.items():
        own, kept = trained(network), found.weights(name)
        refuse_other_names(own, kept)
        for key, weight in own.items():
            weight.data.copy_(kept[key])


def _refuse_starting_weights(algorithm: Algorithm) -> None:
    for seat in getattr(algorithm, "seats", {}).values():
        if isinstance(seat, Cached) and seat.filled_before_training:
            raise UserError(
                "train.reference.seat: cached scores all pairs before the first step, and rounds make theirs later. Set it "
                "to frozen, or to ema"
            )


def _refuse_several_processes() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"training in rounds works in one process, and WORLD_SIZE says {processes}: start it without a launcher"
        )
