"""Slot F, losses over more than the scores of one group: sorted batches, and losses in the output space of a denoising
model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.objectives.losses import Flags, Scored, check_smoothing, logistic_with_flips
from polyalign.core.objectives.view import View

LEAST_ERROR = 1e-5
"""The least mean error that DiffusionNFT divides by."""
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


@dataclass(frozen=True)
class NFT(Flags):
    """Negative-aware fine-tuning (DiffusionNFT, arXiv 2509.16117; NVlabs/DiffusionNFT@24af555 scripts/train_nft_sd3.py): the
    policy, mixed with its reference, is regressed on what is desirable, and mixed with the opposite sign on what is not.

        scale / m (r |x(o+) - x0|^2 / w+ + (1 - r) |x(o-) - x0|^2 / w-) + proximity |o - o_ref|^2
        o+ = o_ref + m (o - o_ref),   o- = o_ref - m (o - o_ref)

    with m ``mixing`` (the paper's beta), r the probability that the candidate is desirable, o the network's output, x(o) the
    clean sample that follows from it, |.|^2 a mean over elements, and w the mean absolute error, detached, at least 1e-5. The
    mean is over the candidates of a group and their noise levels.

    x(o) - x0 is a multiple of o's residual, and residuals mix as outputs do, so nothing but residuals is needed.
    """

    mixing: float = 1.0
    scale: float = 5.0
    proximity: float = 0.0
    name: str = "NFT"
    shift_invariant: bool = False
    convex_in_difference: bool = False
    needs: frozenset[str] = frozenset({"output_gradient"})
    reference_needs: frozenset[str] = frozenset({"output_gradient"})

    def __call__(self, scored: Scored) -> Tensor:
        view = scored.view
        assert view.policy.residual is not None and view.reference is not None and view.reference.residual is not None
        before = view.reference.residual.to(view.policy.residual)  # (G, K, U, D)
        moved = view.policy.residual - before
        clean = self._clean_scale(view).to(before)
        wanted = view.desirability.unsqueeze(-1)
        up, down = (self._error(clean * (before + sign * self.mixing * moved)) for sign in (1.0, -1.0))
        loss = self.scale / self.mixing * (wanted * up + (1.0 - wanted) * down)
        return (loss + self.proximity * moved.square().mean(-1)).mean((1, 2))

    @staticmethod
    def _clean_scale(view: View) -> Tensor:
        """(G, 1, U, 1); 1 for scores that say nothing of it, whose outputs are then taken for the samples themselves.

        Raises:
            UserError: a level without signal, where an error of the noise says nothing about the clean sample.
        """
        found = view.policy.notes.get("clean_scale")
        if found is None:
            return view.policy_values.new_ones(())
        if not bool(found.isfinite().all()):
            raise UserError(
                "the NFT loss is about clean samples, and at a noise level without signal a network that predicts the noise "
                "gives none. Leave the highest level out (likelihood.timesteps.high)"
            )
        return found.unsqueeze(1).unsqueeze(-1)

    @staticmethod
    def _error(residual: Tensor) -> Tensor:
        return residual.square().mean(-1) / residual.detach().abs().mean(-1).clamp(min=LEAST_ERROR)
