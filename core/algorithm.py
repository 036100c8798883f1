"""What one training step computes. The trainer knows nothing of it but the losses.

Letters: G groups, K candidates in a group, U units of a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.candidates import Batch
from polyalign.core.diagnostics import indicator_figures, margin_figures, token_figures
from polyalign.core.errors import UserError
from polyalign.core.learner import is_sharded
from polyalign.core.objectives import AutoBeta, Beta, Objective, Outcome
from polyalign.core.objectives.serves import values_only
from polyalign.core.randomness import seed_of
from polyalign.core.references import Cached, Seat
from polyalign.core.scores import Scores, Unit


class Rows(Protocol):
    """The data: ``len`` and rows by position. A pair store is one."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Sequence[Row]: ...


@dataclass(frozen=True)
class Layout:
    """This process among the others. ``wait`` returns when all of them have called it; ``autocast`` gives the precision of a
    step's forward passes, for those outside of a step."""

    device: torch.device
    rank: int
    processes: int
    wait: Callable[[], None]
    autocast: Callable[[], AbstractContextManager[Any]]


class Algorithm(Protocol):
    """Named networks and the losses of a step.

    ``networks`` is a dict that the trainer may put prepared networks into (sharded, or inside a DeepSpeed engine), under the
    same names; ``step`` must use those. ``step`` returns an outcome for each network that is updated in this step, and no
    others: alternating updates are a matter of what is returned. An outcome's gradient goes to its own network only.
    ``group_separable`` says whether each group's loss depends on that group alone, so that a batch may be cut.
    """

    networks: dict[str, nn.Module]
    group_separable: bool

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        """Called once before the first step or after a resume: move what the trainer does not know, fill caches."""
        ...

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch: ...

    def step(self, batch: Batch, *, step: int) -> Mapping[str, Outcome]: ...

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """``statistics`` are those of the whole batch, gathered from all processes in the order of the data, on the CPU."""
        ...

    def figures(self) -> Mapping[str, float]:
        """Numbers of the algorithm itself for metrics.jsonl, as they were in the step just taken."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DirectPreference:
    """DPO and its relatives: one network, any seats, one objective.

    Args:
        seats: by the names that the objective asks for, usually one, "reference".
        draw_bank: take each step's draws (and crops, dropout of captions and the like) from so many for each pair instead of
            new ones each step. Needed by cached seats, which can only know draws that come again.
        seed: keys the choice of a place in the bank.

    Raises:
        UserError: a cached reference, and an objective that needs more of it than values; a beta that follows log-ratios, and
            an objective that compares without a reference.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: Model,
        objective: Objective,
        beta: Beta | AutoBeta,
        seats: Mapping[str, Seat],
        *,
        draw_bank: int | None = None,
        seed: int = 0,
    ):
        missing = [seat for seat in objective.seats if seat not in ("policy", "reference", *seats)]
        if missing:
            raise ValueError(f"objective {objective.name!r} needs the seats {missing}; given are {sorted(seats)}")
        if draw_bank is None and any(isinstance(seat, Cached) for seat in seats.values()):
            raise ValueError("a cached reference needs a bank of draws: give draw_bank")
        for name, seat in seats.items():
            if isinstance(seat, Cached) and name == "reference" and objective.reference_needs:
                raise UserError(values_only(objective, "cached"))
        if isinstance(beta, AutoBeta) and objective.terms and objective.terms[0].reference is None:
            raise UserError(
                f"objective.beta.auto follows the log-ratios to a reference, and {objective.name} compares without one. "
                "Leave it out, and give beta a fixed value"
            )
        self.adapter, self.model, self.objective = adapter, model, objective
        self.beta, self.seats, self.draw_bank, self.seed = beta, dict(seats), draw_bank, seed
        self.networks: dict[str, nn.Module] = {"policy": model.network}
        self.group_separable = objective.group_separable
        self.unit: Unit | None = None
        self.used_beta = self.stated_beta

    @property
    def stated_beta(self) -> Beta:
        return self.beta.beta if isinstance(self.beta, AutoBeta) else self.beta

    @property
    def policy(self) -> Model:
        return self.model.with_network(self.networks["policy"])

    def draw_index(self, step: int) -> int:
        """Which draws a step uses: its own, or a place in the bank chosen by key."""
        return step if self.draw_bank is None else seed_of(self.seed, "draw bank", step) % self.draw_bank

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        return self.adapter.prepare(self.policy, rows, step=self.draw_index(step))

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        model, index = self.policy, self.draw_index(step)
        draws = self.adapter.draws(model, batch, step=index)
        policy = self.adapter.score(model, batch, draws)
        scores = {"policy": policy}
        for name, seat in self.seats.items():
            found = seat.scores(self.adapter, model, batch, draws, index=index)
            if found is not None:
                scores[name] = of_length(found, policy.values.shape[-1])
        if "dense_kl" in self.objective.needs and "reference" in scores:
            scores["policy"] = with_divergence(policy, scores["reference"])
        self.unit, self.used_beta = policy.unit, self.stated_beta
        outcome = self.objective(scores, batch, beta=self.used_beta.effective(policy.unit))
        return {"policy": with_likelihood_figures(outcome, scores)}

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        for seat in self.seats.values():
            if isinstance(seat, Cached) and is_sharded(self.networks["policy"]):
                raise UserError(
                    "train.reference.seat: cached does not work where the weights are cut up over processes (FSDP, DeepSpeed's "
                    "stage 3): one that finds its scores would leave out a forward pass that the others wait for. Use "
                    "adapter_off or frozen, or ddp.yaml or zero2.yaml."
                )
            seat.to(layout.device)
            if isinstance(seat, Cached) and seat.filled_before_training:
                self._fill(seat, data, layout, size=min(micro_batch_size, len(data)))
                layout.wait()
                seat.cache.reload()

    @torch.no_grad()
    def _fill(self, seat: Cached, data: Rows, layout: Layout, *, size: int) -> None:
        """Score every pair under every draw of the bank, in batches of the training's shape. Each process takes its share; a
        pass that was interrupted goes on after its last shard."""
        assert self.draw_bank is not None
        for part, start in enumerate(range(0, len(data), size)):
            if part % layout.processes != layout.rank:
                continue
            # The last batch is filled up from the front, since the shape of a batch may change a sum's last bits.
            rows = data.rows([place % len(data) for place in range(start, start + size)])
            for index in range(self.draw_bank):
                batch = self.adapter.prepare(self.policy, rows, step=index).to(layout.device)
                if not all((group_id, index) in seat.cache for group_id in batch.group_ids):
                    draws = self.adapter.draws(self.policy, batch, step=index)
                    with layout.autocast():
                        seat.scores(self.adapter, self.policy, batch, draws, index=index)
        seat.cache.flush()

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        for seat in self.seats.values():
            seat.after_step(self.networks["policy"])
        logratio = statistics["policy"].get("logratio")
        if isinstance(self.beta, AutoBeta) and logratio is not None and self.unit is not None:
            if logratio.shape[1] < 2:
                raise UserError(
                    "objective.beta.auto follows the margins of pairs, and these are single candidates, which have none. "
                    "Leave it out, and give beta a fixed value"
                )
            self.beta.update(logratio[:, 0] - logratio[:, 1:].mean(1), self.unit)

    def figures(self) -> dict[str, float]:
        return {"beta": self.used_beta.value}

    def state_dict(self) -> dict[str, Any]:
        beta = self.beta.state_dict() if isinstance(self.beta, AutoBeta) else {}
        return {"beta": beta, "seats": {name: seat.state_dict() for name, seat in self.seats.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if isinstance(self.beta, AutoBeta):
            self.beta.load_state_dict(state["beta"])
        for name, seat in self.seats.items():
            seat.load_state_dict(state["seats"][name])


def with_likelihood_figures(outcome: Outcome, scores: Mapping[str, Scores]) -> Outcome:
    """Name the values as what they are: errors (higher is worse) of denoising likelihoods, log-probabilities of token ones; add
    what ``polyalign diagnose`` asks for; and keep the timesteps, so that margins can be listed by them."""
    policy, statistics = scores["policy"], dict(outcome.statistics)
    kind, sign = ("logps", 1.0) if policy.unit.kind == "token" else ("error", -1.0)
    for seat in ("policy", "reference"):
        if policy.unit.kind != "surrogate" and seat in scores and f"{seat}_value" in statistics:
            statistics[f"{kind}/{seat}"] = sign * statistics[f"{seat}_value"]
    if "margin" in statistics:
        statistics |= margin_figures(statistics["margin"])
    if policy.unit.kind == "token":
        statistics |= token_figures({seat: scores[seat] for seat in ("policy", "reference") if seat in scores})
        statistics |= indicator_figures(policy)
    if "timestep" in policy.notes:
        statistics["timestep"] = policy.notes["timestep"].detach()
    return Outcome(outcome.loss, statistics)


def with_divergence(policy: Scores, reference: Scores) -> Scores:
    """``policy`` with KL(reference || policy) at each unit, where both have kept their distributions."""
    own, other = (None if scores.dense is None else scores.dense.distributions for scores in (policy, reference))
    if policy.dense is None or own is None or other is None:
        return policy
    return replace(policy, dense=replace(policy.dense, kl=own.divergence_from(other)))


def of_length(scores: Scores, units: int) -> Scores:
    """``scores`` with ``units`` units at least: a cached one knows nothing of this batch's padding. One that is longer is of
    other units, and stays, to be refused where the two are compared."""
    missing = units - scores.values.shape[-1]
    if missing <= 0:
        return scores
    pad = torch.nn.functional.pad
    return replace(scores, values=pad(scores.values, (0, missing)), mask=pad(scores.mask, (0, missing)))
