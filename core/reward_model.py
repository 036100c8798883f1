"""Explicit reward models of any modality: a linear head on features, trained on pairs.

    L = -log sigma(r_w - r_l - margin) + centre (r_w + r_l)^2

with r the head's reward (Bradley and Terry 1952; Ouyang et al., arXiv 2203.02155, Eq. 1; the centring term of Eisenstein et
al., arXiv 2312.09244). The row ``bradley_terry`` of the table of objectives has the parameters.

Letters: G pairs, K = 2 candidates in a pair, N rows, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Row
from polyalign.core.algorithm import Layout, Rows, with_likelihood_figures
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.objectives import Objective, Outcome
from polyalign.core.scores import Scores, Unit

PAIR = ("chosen", "rejected")
Collate = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Tensor]]
"""(conditions, outputs), N each -> tensors (N, ...)."""
Reward = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(network, tensors (N, ...)) -> rewards (N,)."""


class RewardHead(nn.Linear):
    """(N, D) -> (N,): w'h. It starts at zero, so that a fresh reward model prefers nothing and its loss is ln 2. There is no
    bias, which differences of rewards would not see."""

    def __init__(self, width: int):
        super().__init__(width, 1, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).squeeze(-1)


class FeatureReward(nn.Module):
    """A reward head on a feature function: a CLIP's or CLAP's embeddings, a backbone's last state.

    Args:
        features: tensors (N, ...) -> (N, D). A module is trained where its parameters ask for gradients; a function, and a
            module without any, is a fixed feature.
        width: D.
    """

    def __init__(self, features: Callable[[Mapping[str, Tensor]], Tensor], width: int):
        super().__init__()
        self.features, self.head = features, RewardHead(width)

    def forward(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(N,) rewards."""
        return self.head(self.features(tensors))


def of_module(network: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The reward of a network that is called with the tensors, such as :class:`FeatureReward`."""
    return network(tensors)


class RewardTraining:
    """An algorithm of :mod:`polyalign.core.algorithm`: one network that gives rewards, one objective.

    Rows are pairs as in any store: ``pair_id``, ``condition``, ``chosen``, ``rejected``, and where they are there ``target``
    (the distribution of preference over the two) and ``weight``.

    Args:
        network: under the name ``reward``; what of it is trained asks for gradients.
        collate: makes tensors of conditions and outputs.
        rewards: calls the network.
        objective: usually ``bradley_terry``.
        beta: the factor on a reward.
    """

    def __init__(
        self, network: nn.Module, collate: Collate, objective: Objective, *, rewards: Reward = of_module, beta: float = 1.0
    ):
        self.collate, self.rewards, self.objective, self.beta = collate, rewards, objective, beta
        self.networks: dict[str, nn.Module] = {"reward": network}
        self.group_separable = objective.group_separable

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None:
        """Nothing is to be prepared: there is no reference."""

    def prepare(self, rows: Sequence[Row], *, step: int) -> Batch:
        """Tensors (G, 2, ...), chosen first."""
        flat = self.collate([row["condition"] for row in rows for _ in PAIR], [row[name] for row in rows for name in PAIR])
        tensors = {name: tensor.unflatten(0, (len(rows), len(PAIR))) for name, tensor in flat.items()}
        return Batch.of_groups([_group(row) for row in rows], tensors)

    def score(self, batch: Batch) -> Scores:
        """Rewards as scores (G, 2, 1): one unit a candidate, which is no likelihood."""
        flat = {name: tensor.flatten(0, 1) for name, tensor in batch.tensors.items()}
        values = self.rewards(self.networks["reward"], flat).float().unflatten(0, (len(batch), len(PAIR))).unsqueeze(-1)
        return Scores(values, torch.ones_like(values, dtype=torch.bool), Unit("surrogate"))

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        scores = {"policy": self.score(batch)}
        return {"reward": with_likelihood_figures(self.objective(scores, batch, beta=self.beta), scores)}

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing follows the weights."""

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state besides the network's."""


def _group(row: Row) -> Group:
    given: dict[str, Any] = {} if row.get("target") is None else {"target": tuple(row["target"])}
    if row.get("weight") is not None:
        given["weight"] = float(row["weight"])
    return Group(str(row["pair_id"]), tuple(Candidate(row["condition"], row[name]) for name in PAIR), **given)
