"""What the slots of an objective see: one comparison under one pair of seats.

Letters: G groups, K candidates in a group, U units of a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.scores import Scores

VALUE = frozenset({"value"})
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class View:
    """A batch as a term sees it: ``policy`` and ``reference`` are the scores of the seats that the term names, ``scores`` are
    all seats (a token guide, a mismatched completion), ``beta`` is the effective factor on the log-ratio
    (``Beta.effective``)."""

    policy: Scores
    reference: Scores | None
    batch: Batch
    scores: Mapping[str, Scores]
    beta: float | Tensor

    def __post_init__(self) -> None:
        groups, candidates = self.policy.values.shape[:2]
        if tuple(self.batch.target.shape) != (groups, candidates):
            raise ValueError(
                f"scores of {groups} groups with {candidates} candidates, but targets of shape {tuple(self.batch.target.shape)}"
            )
        if self.reference is not None and self.reference.values.shape != self.policy.values.shape:
            raise ValueError(
                f"policy scores have shape {tuple(self.policy.values.shape)} (groups, candidates, units) and reference scores "
                f"{tuple(self.reference.values.shape)}: both must be taken on the same units"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic: that of the policy's values, float32 at the least."""
        return torch.promote_types(self.policy.values.dtype, torch.float32)

    @property
    def policy_values(self) -> Tensor:
        """(G, K, U), with gradient."""
        return self.policy.values.to(self.dtype)

    @property
    def reference_values(self) -> Tensor:
        """(G, K, U); zeros where there is no reference."""
        if self.reference is None:
            return torch.zeros_like(self.policy_values)
        return self.reference.values.to(self.policy_values)

    @property
    def target(self) -> Tensor:
        """(G, K), the distribution of preference over the candidates."""
        return self.batch.target.to(self.policy_values)

    @property
    def chosen(self) -> Tensor:
        """(G,), index of the preferred candidate; the first one in a tie."""
        return self.target.argmax(1)

    @property
    def is_chosen(self) -> Tensor:
        """(G, K) bool, true at the preferred candidate."""
        places = torch.arange(self.target.shape[1], device=self.target.device)
        return places == self.chosen.unsqueeze(1)

    def of_chosen(self, values: Tensor) -> Tensor:
        """The preferred candidate's entry of ``values`` (G, K): (G,)."""
        return values.gather(1, self.chosen.unsqueeze(1)).squeeze(1)

    @property
    def desirability(self) -> Tensor:
        """(G, K), 1 for a desirable candidate and 0 for an undesirable one, or the probability of it: the labels of unpaired
        data where the batch has them, otherwise the target, which makes of a pair one of each.

        Raises:
            UserError: single candidates without labels.
        """
        if self.batch.desirable is not None:
            return self.batch.desirable.to(self.policy_values)
        if self.target.shape[1] == 1:
            raise UserError(
                "single candidates need a label each, desirable or not, and these have none. Give every group 'desirable', or "
                "make pairs, whose preferred candidate counts as desirable and whose other one as undesirable"
            )
        return self.target

    @property
    def beta_of_group(self) -> float | Tensor:
        """beta for arithmetic on (G, K): a number, or (G, 1)."""
        return self.beta.to(self.policy_values).unsqueeze(1) if isinstance(self.beta, Tensor) else self.beta

    def of_candidates(self, places: tuple[int, ...]) -> View:
        """The view of some candidates of each group: a comparison of a few among several."""

        def part(scores: Scores) -> Scores:
            return scores.of_candidates(places)

        return replace(
            self,
            policy=part(self.policy),
            reference=None if self.reference is None else part(self.reference),
            batch=self.batch.of_candidates(places),
            scores={seat: part(scores) for seat, scores in self.scores.items()},
        )

    def with_hardest_losers(self) -> View:
        """The same view with the likelihood of the likeliest other content in the place of each unit of the losers."""
        kept = self.is_chosen.unsqueeze(-1)

        def hardest(scores: Scores) -> Scores:
            assert scores.dense is not None and scores.dense.runner_up is not None, "Objective checks for runner_up"
            return replace(scores, values=torch.where(kept, scores.values, scores.dense.runner_up))

        return replace(self, policy=hardest(self.policy), reference=None if self.reference is None else hardest(self.reference))

    def with_policy_values(self, values: Tensor) -> View:
        """The same view with other policy values (G, K, U)."""
        return replace(self, policy=replace(self.policy, values=values))

    def require_pair(self, what: str) -> None:
        """Raises UserError unless every group has exactly two candidates."""
        candidates = self.target.shape[1]
        if candidates != 2:
            raise UserError(
                f"{what} compares two candidates, but the groups of this batch have {candidates}. "
                "Make pairs (pairs.mode: best_worst or all_pairs), or take a listwise objective."
            )
