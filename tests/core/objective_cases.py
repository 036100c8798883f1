"""Every row of the table on log-ratios: what its recipe must say, and the scores, seats and batch that it asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.objectives import TABLE, Objective, Outcome, build
from polyalign.core.objectives.table import SPEC
from polyalign.core.scores import DenseStatistics, Scores, Unit

TOKENS = Unit("token")
PICTURES = Unit("timestep", elements=4, steps=10)
FILLED = {"ipo": {"reduction": "sum"}, "sdpo": {"safeguard_scope": "group"}}
"""What has no default, or a default that couples the pairs."""
SIZES = {"visual triples": 3, "visual eights": 8, "named branches": 3}
REFERENCE = -7.0
PREFERENCE_ROWS = sorted(set(TABLE) - {"sft"})
OUTPUT_ROWS = ("sdpo", "dspo", "diffusion_nft")
"""Rows that look at the network's output, which plain log-ratios do not have."""
COUPLED = ("aot", "aot_unpaired", "kto", "diffusion_kto")
"""Rows whose defaults couple the pairs of a batch."""


def spec(name: str, **options: Any):
    return SPEC.validate_python({"name": name, **FILLED.get(name, {}), **options})


def scores(values: Any, *, unit: Unit = TOKENS, mask: Tensor | None = None, dense: DenseStatistics | None = None) -> Scores:
    """Values (G, K), (G, K, U), with a residual whose mean square they are (timesteps)."""
    values = torch.as_tensor(values)
    values = values if values.ndim == 3 else values.unsqueeze(-1)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    residual = (-values).clamp(min=0).sqrt().unsqueeze(-1).expand(*values.shape, 4) if unit.kind == "timestep" else None
    return Scores(values, mask, unit, residual=residual, dense=dense)


def batch(target: Any, margins: Tensor | None = None, weight: Tensor | None = None, desirable: Tensor | None = None) -> Batch:
    target = torch.as_tensor(target, dtype=torch.float64)
    names = tuple(str(number) for number in range(len(target)))
    return Batch(names, target, margins=margins, weight=weight, desirable=desirable)


def unit_of(objective: Objective) -> Unit:
    return TOKENS if "token" in objective.likelihoods and "output_gradient" not in objective.needs else PICTURES


def run(
    objective: Objective, policy: Tensor, *, beta: float = 1.0, target: Any = None, desirable: Tensor | None = None
) -> Outcome:
    """The outcome on log-likelihoods (G, K), for K as the row wants it; the reference is some fixed number everywhere, and so
    are dense statistics, guide and partner."""
    data = objective.data[0]
    size = SIZES.get(data, policy.shape[1])
    if size > policy.shape[1]:  # further candidates are as the rejected one
        policy = torch.cat([policy, policy[:, 1:].expand(-1, size - policy.shape[1])], 1)
    unit = unit_of(objective)
    fixed = torch.full_like(policy, REFERENCE).detach()
    dense = DenseStatistics(kl=(fixed + 7.3).unsqueeze(-1), confidence=(fixed + 6.5).unsqueeze(-1))
    seats = {"policy": replace(scores(policy, unit=unit), dense=dense), "reference": scores(fixed, unit=unit)}
    further = {"guide": fixed + 0.2, "partner": fixed - 0.1}
    seats |= {name: scores(values, unit=unit) for name, values in further.items() if name in objective.seats}
    margins = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(len(policy), 2) if data == "pairs with margins" else None
    target = [[1.0] + [0.0] * (size - 1)] * len(policy) if target is None else target
    return objective(seats, batch(target, margins, desirable=desirable), beta=beta)


def losses(objective: Objective, ratios: Any, *, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Outcome, Tensor]:
    """The outcome on log-ratios (G, K) and the gradient of its summed loss by them."""
    ratios = torch.as_tensor(ratios, dtype=dtype)
    policy = (ratios + REFERENCE).requires_grad_(True)
    outcome = run(objective, policy, **options)
    (gradient,) = torch.autograd.grad(outcome.loss.sum(), policy)
    return outcome, gradient


def outcome_of(name: str, ratios: Any, *, beta: float = 0.7, **options: Any) -> tuple[Outcome, Tensor]:
    return losses(build(spec(name, **options)), ratios, beta=beta)
