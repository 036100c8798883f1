"""The winner safeguard of Diffusion-SDPO (arXiv 2511.03317; AIDC-AI/Diffusion-SDPO@84fb241c, train.py).

A step on a pair lowers the winner's error along -g_w and raises the loser's along +g_l, with g the gradients of the two errors.
Taken in the output space of the network, the loser's part undoes the winner's where <g_w, g_l> > 0. The loser's gradient is
therefore scaled by the largest lambda <= 1 for which (-g_w + lambda g_l) . g_w <= -mu |g_w|^2:

    lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) if <g_w, g_l> > 0 else 1.

Values stay as they are, only the gradient changes. Difference from the official code: it adds 1e-9 to <g_w, g_l>, whose size
depends on the number of elements, where we need no such constant; lambda agrees to that.

Letters: G groups, K = 2 candidates, U units, D output elements of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.view import View

SafeguardScope = Literal["batch", "group"]


@dataclass(frozen=True)
class WinnerSafeguard:
    """Scales the gradient of the rejected candidate. ``mu`` is the share of the winner's own descent that must remain.
    ``scope``: one lambda for the (micro-)batch, as in the official code, or one for each group, which does not depend on the
    batch."""

    mu: float
    scope: SafeguardScope = "batch"
    needs: frozenset[str] = frozenset({"output_gradient"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu <= 1.0:
            raise UserError(f"the winner safeguard's mu is a share between 0 and 1, found {self.mu}")

    @property
    def group_separable(self) -> bool:
        return self.scope == "group"

    def scale(self, view: View) -> Tensor:
        """lambda (G,), detached.

        Raises:
            UserError: groups of another size than two.
        """
        view.require_pair("the winner safeguard")
        gradient = self._output_gradient(view)  # (G, 2, U, D)
        winner = gradient[torch.arange(len(gradient)), view.chosen]
        loser = gradient[torch.arange(len(gradient)), 1 - view.chosen]
        own, shared = winner.square().sum((1, 2)), (winner * loser).sum((1, 2))
        if self.scope == "batch":
            own, shared = own.sum().expand_as(own), shared.sum().expand_as(shared)
        conflict = shared > 0
        bound = (1.0 - self.mu) * own / torch.where(conflict, shared, torch.ones_like(shared))
        return torch.where(conflict, bound.clamp(0.0, 1.0), torch.ones_like(bound))

    def guard(self, view: View) -> tuple[View, Tensor]:
        """(the view with the rejected candidate's gradient scaled, lambda (G,))."""
        scale = self.scale(view)
        values = view.policy_values
        factor = torch.where(view.is_chosen, torch.ones_like(view.target), scale.unsqueeze(1)).unsqueeze(-1)
        fixed = values.detach()
        return view.with_policy_values(fixed + factor * (values - fixed)), scale

    @staticmethod
    def _output_gradient(view: View) -> Tensor:
        """Gradient of each unit's error by the network's output, up to a factor common to all: weight times residual.

        The weight of the timestep is recovered from value = -weight mean(residual^2); where the error is 0 so is the gradient.
        """
        assert view.policy.residual is not None, "Objective checks for output_gradient before it calls"
        residual = view.policy.residual.detach().to(view.dtype)
        error = residual.square().mean(-1)
        present = view.policy.mask & (error > 0)
        weight = torch.where(present, -view.policy_values.detach(), torch.zeros_like(error))
        weight = weight / torch.where(present, error, torch.ones_like(error))
        return weight.unsqueeze(-1) * residual
