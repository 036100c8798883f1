"""OFS-DPO (arXiv 2406.05534): two adapters on one network, a fast and a slow one, that are trained side by side.

    fast:  L(F | ref) + alpha L(F | S)        slow:  L(S | ref) - alpha L(F | S)

with L(a | b) the DPO loss of a with b as its reference. Each side sees the other without gradient; were both losses simply
summed, the two terms with alpha would cancel. The slow side has a smaller learning rate. Every ``interval`` steps the adapter
whose DPO loss was lower on average over these steps takes the fast side.

There is no code of the authors; the equations are those of a public re-implementation. How the roles change is ours: the two
adapters exchange their *weights*, so that the adapter called fast is always the fast one. Each side's optimiser keeps the
moments of its own loss.

The slow side's loss has no lower bound: where its margin outgrows the fast one's, alpha beta pushes it on for ever. The
objective's ``clamp`` bounds it; without that a run whose sides come apart by more than ``limit`` is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.algorithm import Layout, Rows, of_length, with_likelihood_figures
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.objectives import Beta, Objective, Outcome
from polyalign.core.objectives.table import build
from polyalign.core.objectives.table_groups import OFSDPO
from polyalign.core.randomness import seed_of
from polyalign.core.recipe import OptimizerConfig
from polyalign.core.references import (
    Cached,
    Seat,
    adapter_chosen,
    adapter_layers,
    adapter_names,
    adapter_parameters,
    choose_adapter,
)
from polyalign.core.scores import Scores

Side = Literal["fast", "slow"]
SIDES: tuple[Side, Side] = ("fast", "slow")
OTHER: Mapping[Side, Side] = {"fast": "slow", "slow": "fast"}

ADAPTERS: Mapping[Side, str] = {"fast": "default", "slow": "slow"}
"""The adapter that a modality puts on is the fast one, so that export and sampling, which use it, need not know of this."""

APART = 100.0
"""Reward margins of the two sides that differ by more, on average over a batch, are a divergence: from about 20 on a sigmoid is
0 or 1 in float32, so the comparison teaches the fast side nothing and only drives the slow one on."""


class AdapterView(nn.Module):
    """One adapter on a network, as a network of its own: its parameters are the base's and this adapter's, under the names they
    have in the whole network. The optimiser of one adapter is made from such a view."""

    def __init__(self, network: nn.Module, adapter: str):
        super().__init__()
        self.network, self.adapter = network, adapter

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        names = {name for layer in adapter_layers(self.network) for name in adapter_names(layer)} - {self.adapter}
        others = {id(weight) for name in names for weight in adapter_parameters(self.network, name)}
        for name, parameter in self.network.named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in others:
                yield name, parameter

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with adapter_chosen(self.network, self.adapter):
            return self.network(*arguments, **options)


class FastSlow:
    """The :class:`~polyalign.core.algorithm.Algorithm` of OFS-DPO; its networks are called ``fast`` and ``slow``.

    Args:
        model: its network has both adapters, see :func:`add_twin`.
        spec: the recipe's objective. Its ``side`` says nothing here, where both are trained.
        seats: by name, usually "reference" alone.
        interval: steps between two decisions which adapter is the fast one. The authors' value is not public.
        limit: see ``APART``.
        draw_bank: as for DirectPreference.

    Raises:
        UserError: weights outside of the adapters would be trained, a beta that adjusts itself, or weights that are cut up over
            processes.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: Model,
        spec: OFSDPO,
        seats: Mapping[str, Seat],
        *,
        interval: int = 50,
        limit: float = APART,
        adapters: Mapping[Side, str] = ADAPTERS,
        draw_bank: int | None = None,
        seed: int = 0,
    ):
        _refuse_other_weights(model.network, list(adapters.values()))
        _refuse_what_does_not_fit(spec, seats, draw_bank)
        self.adapter, self.model, self.beta, self.seats = adapter, model, Beta.of(spec.beta), dict(seats)
        self.objectives = {side: build(spec.model_copy(update={"side": side})) for side in SIDES}
        self.compared = {side: Objective("dpo", terms=self.objectives[side].terms[:1]) for side in SIDES}
        self.interval, self.limit, self.adapters = interval, limit, dict(adapters)
        self.draw_bank, self.seed = draw_bank, seed
        self.networks: dict[str, nn.Module] = {side: AdapterView(model.network, self.adapters[side]) for side in SIDES}
        self.group_separable = all(objective.group_separable for objective in self.objectives.values())
        self.sums: dict[Side, float] = dict.fromkeys(SIDES, 0.0)
        self.counted = self.exchanges = 0
        choose_adapter(model.network, self.adapters["fast"])

    def draw_index(self, step: int) -> int:
        return step if self.draw_bank is None else seed_of(self.seed, "draw bank", step) % self.draw_bank

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        for seat in self.seats.values():
            seat.to(layout.device)

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        return self.adapter.prepare(self.model, rows, step=self.draw_index(step))

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        index = self.draw_index(step)
        draws = self.adapter.draws(self.model, batch, step=index)
        own: dict[Side, Scores] = {}
        for side in SIDES:
            with adapter_chosen(self.model.network, self.adapters[side]):
                own[side] = self.adapter.score(self.model, batch, draws)
        others: dict[str, Scores] = {}
        for name, seat in self.seats.items():
            found = seat.scores(self.adapter, self.model, batch, draws, index=index)
            if found is not None:
                others[name] = of_length(found, own["fast"].values.shape[-1])
        return {side: self._outcome(side, own, others, batch) for side in SIDES}

    def _outcome(self, side: Side, own: Mapping[Side, Scores], others: Mapping[str, Scores], batch: Batch) -> Outcome:
        """A side's loss. ``dpo_loss`` (G,) is the part that the sides are compared by, ``apart`` (G,) the difference of the
        fast side's reward margin and the slow one's."""
        scores = {"policy": own[side], "partner": own[OTHER[side]].detach(), **others}
        beta = self.beta.effective(own[side].unit)
        outcome = with_likelihood_figures(self.objectives[side](scores, batch, beta=beta), scores)
        chase = self.objectives[side].terms[1]
        statistics = outcome.statistics | {
            "dpo_loss": self.compared[side](scores, batch, beta=beta).loss.detach(),
            "apart": chase(chase.view(scores, batch, beta)).statistics["margin"],
        }
        if outcome.loss.requires_grad:
            # Under gradient checkpointing the backward pass runs the network again, and must find the adapter of this side.
            outcome.loss.register_hook(lambda _: choose_adapter(self.model.network, self.adapters[side]))
        return Outcome(outcome.loss, statistics)

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        choose_adapter(self.model.network, self.adapters["fast"])
        self._refuse_apart(step, statistics["fast"]["apart"].double().mean().item())
        for side in SIDES:
            self.sums[side] += statistics[side]["dpo_loss"].double().mean().item()
        self.counted += 1
        if self.counted == self.interval:
            if self.sums["slow"] < self.sums["fast"]:
                exchange(self.model.network, *self.adapters.values())
                self.exchanges += 1
            self.sums, self.counted = dict.fromkeys(SIDES, 0.0), 0
        for seat in self.seats.values():
            seat.after_step(self.model.network)

    def _refuse_apart(self, step: int, apart: float) -> None:
        if abs(apart) > self.limit:
            raise UserError(
                f"OFS-DPO has diverged at step {step}: the reward margins of the fast and of the slow adapter differ by "
                f"{apart:.4g} on average, more than {self.limit:g}. The slow side's loss has no lower bound by itself. Set "
                "objective.clamp (10, say), or lower objective.alpha or the learning rate, and start anew; the last checkpoint "
                "from before is kept"
            )

    def figures(self) -> dict[str, float]:
        return {"beta": self.beta.value, "exchanges": self.exchanges}

    def state_dict(self) -> dict[str, Any]:
        kept = {"sums": dict(self.sums), "counted": self.counted, "exchanges": self.exchanges}
        return kept | {"seats": {name: seat.state_dict() for name, seat in self.seats.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {side: float(state["sums"][side]) for side in SIDES}
        self.counted, self.exchanges = int(state["counted"]), int(state["exchanges"])
        for name, seat in self.seats.items():
            seat.load_state_dict(state["seats"][name])


def add_twin(network: Any, *, adapter: str = ADAPTERS["fast"], twin: str = ADAPTERS["slow"]) -> None:
    """Put a second adapter ``twin`` with the configuration and the weights of ``adapter`` beside it, both to be trained.

    Raises:
        UserError: there is no such adapter, or there is one called ``twin`` already.
    """
    from peft import PeftModel

    configs = getattr(network, "peft_config", {})
    if adapter not in configs or twin in configs:
        found = f"its adapters are {sorted(configs)}" if configs else "it has none"
        raise UserError(
            f"OFS-DPO trains two LoRAs, {adapter!r} and a copy of it, {twin!r}; the network must have the first and not the "
            f"second, and {found}. Set model.train to lora"
        )
    config = copy.deepcopy(configs[adapter])
    with torch.random.fork_rng(devices=[]):  # peft fills the new matrices at random
        if isinstance(network, PeftModel):
            network.add_adapter(twin, config)
        else:
            network.add_adapter(config, adapter_name=twin)
    network.set_adapter(adapter)
    for weight, copied in _alike(network, adapter, twin):
        copied.data = weight.data.clone()
        weight.requires_grad_(True)
        copied.requires_grad_(True)


@torch.no_grad()
def exchange(network: nn.Module, one: str, other: str) -> None:
    """Let two adapters of one configuration exchange their weights."""
    for first, second in _alike(network, one, other):
        kept = first.detach().clone()
        first.copy_(second)
        second.copy_(kept)


def _alike(network: nn.Module, one: str, other: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return list(zip(adapter_parameters(network, one), adapter_parameters(network, other), strict=True))


def slow_optimizer(config: OptimizerConfig, ratio: float) -> dict[str, OptimizerConfig]:
    """What the trainer takes as ``optimizers``: the slow side's learning rate is ``ratio`` times the fast side's."""
    return {"slow": config.model_copy(update={"learning_rate": ratio * config.learning_rate})}


def _refuse_other_weights(network: nn.Module, adapters: Sequence[str]) -> None:
    found = {name for layer in adapter_layers(network) for name in adapter_names(layer)}
    if missing := sorted(set(adapters) - found):
        raise UserError(
            f"OFS-DPO trains the adapters {list(adapters)}, and the network lacks {missing}; add_twin puts them there"
        )
    own = {id(weight) for name in adapters for weight in adapter_parameters(network, name)}
    others = [name for name, weight in network.named_parameters() if weight.requires_grad and id(weight) not in own]
    if others:
        raise UserError(
            f"OFS-DPO trains two adapters and nothing else, and {len(others)} other weights would be trained too "
            f"({', '.join(others[:3])}). Set model.train to lora, and freeze them"
        )


def _refuse_what_does_not_fit(spec: OFSDPO, seats: Mapping[str, Seat], draw_bank: int | None) -> None:
    if spec.beta.auto is not None:
        raise UserError(
            "objective.beta.auto follows the margins of one policy, and OFS-DPO has two. Leave it out, and give beta a value"
        )
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise UserError(
            "OFS-DPO trains two adapters of one network, each with an optimiser, which FSDP and DeepSpeed cannot. Use ddp.yaml"
        )
    for seat in seats.values():
        if isinstance(seat, Cached) and (seat.filled_before_training or draw_bank is None):
            raise ValueError("a cached reference of OFS-DPO is that of the base under the adapters, with a bank of draws")
