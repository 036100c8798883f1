"""Slot F, losses over more than the scores of one group: sorted batches, and losses in the output space of a denoising
model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.losses import Flags, Scored, check_smoothing, logistic_with_flips

DSPOForm = Literal["score_matching", "sdxl_code"]
SDXL_SWITCH = 0.1
"""The size of the policy's distance from its reference at which the code's SDXL branch changes its loss."""


def certain_difference(scored: Scored, name: str) -> Tensor:
    """u_0 - u_1 (G,) for a loss that has no form for a soft target, since it takes a winner out of each pair.

    Raises:
        UserError: groups of another size than two, or a preference between 0 and 1.
    """
    difference, p = scored.pair(name)
    if bool(((p != 0.0) & (p != 1.0)).any()):
        raise UserError(
            f"the {name} loss takes a winner out of each pair, and this batch has preferences between 0 and 1 (ties, soft "
            "labels). Leave such pairs out, or take an objective with a logistic loss, such as dpo"
        )
    return difference


@dataclass(frozen=True)
class AOT(Flags):
    """Alignment by optimal transport (arXiv 2406.05882): -log sigmoid of beta times the gap between *sorted* values of the
    batch.

    ``paired``: sorted margins of the policy against sorted margins of the reference. Otherwise: sorted log-ratios of the
    winners against sorted log-ratios of the losers. A group is given the loss of the place its own policy margin (or winner)
    takes. The loss couples the batch and looks across prompts, so no constant of a prompt may be left in its values.
    """

    paired: bool = True
    label_smoothing: float = 0.0
    name: str = "AOT"
    shift_invariant: bool = False
    convex_in_difference: bool = False
    group_separable: bool = False

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def __call__(self, scored: Scored) -> Tensor:
        certain_difference(scored, self.name)
        if isinstance(scored.view.beta, Tensor):
            raise UserError("the AOT loss sorts values across pairs, so beta has to be one number for all of them")
        if self.paired:
            policy, reference = (self._sides(scored, side) for side in (scored.reduced.policy, scored.reduced.reference))
            left, right = policy[0] - policy[1], reference[0] - reference[1]
        else:
            left, right = self._sides(scored, scored.reduced.log_ratio)
        places = left.argsort()
        gap = scored.view.beta * (left[places] - right.sort().values)
        losses = logistic_with_flips(gap, torch.full_like(gap, self.label_smoothing))
        return torch.zeros_like(losses).scatter(0, places, losses)

    @staticmethod
    def _sides(scored: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        """(winners, losers)."""
        chosen = scored.view.chosen.unsqueeze(1)
        return values.gather(1, chosen).squeeze(1), values.gather(1, 1 - chosen).squeeze(1)


@dataclass(frozen=True)
class DSPO(Flags):
    """Score matching on the winner (DSPO, ICLR 2025; AIDC-AI/Diffusion-SDPO@84fb241 train.py), with o the network's output,
    delta = o - o_reference for the winner, and u the difference of scores:

        score_matching (the SD1.5 branch, the paper):  mean ((o - target) - correction (1 - sigma(u)) delta)^2
        sdxl_code: mean ((1 - sigma(u)) delta)^2 where the mean of delta^2 over the batch is at least 0.1, else (1 - sigma(u))^2
    """

    correction: float
    form: DSPOForm = "score_matching"
    name: str = "DSPO"
    convex_in_difference: bool = False
    needs: frozenset[str] = frozenset({"output_gradient"})
    reference_needs: frozenset[str] = frozenset({"output_gradient"})

    @property
    def group_separable(self) -> bool:
        return self.form == "score_matching"

    def __call__(self, scored: Scored) -> Tensor:
        difference = certain_difference(scored, self.name)
        view = scored.view
        assert view.policy.residual is not None and view.reference is not None and view.reference.residual is not None
        groups = torch.arange(len(view.chosen), device=view.chosen.device)
        own = view.policy.residual[groups, view.chosen]  # (G, U, D)
        moved = own - view.reference.residual[groups, view.chosen].to(own)
        certain = torch.where(view.chosen == 0, difference, -difference)
        left = torch.sigmoid(-certain).reshape(-1, 1, 1)
        if self.form == "score_matching":
            return (own - self.correction * left * moved).square().mean((1, 2))
        if bool(moved.detach().square().mean() >= SDXL_SWITCH):
            return (left * moved).square().mean((1, 2))
        return left.reshape(-1).square()
