"""Seats besides the reference: a guide for single tokens (TGDPO), completions of other prompts (KTO's baseline), and scores of
the policy that once gave the answers (an anchor of ADPO).

    {"reference": seat, "guide": guide_adapter(network, folder)}         objective tgdpo
    {"reference": seat, **mismatched_seats(seat)}                        objective kto, baseline mismatched
    {"reference": Recorded(behaviour_of(rows), Unit("token"))}           objective adpo
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.adapter_files import load_adapter
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.references import Cached, NamedAdapter, NoReference, Seat, StartingWeights, Stateless
from polyalign.core.scores import Scores, Unit

GUIDE = "guide"
COMPLETION = "completion_"
"""How the names of a batch's tensors begin that belong to the answers and not to what was asked."""

Values = Sequence[float] | float


# --- a guide ------------------------------------------------------------------------------------------------------------------


def guide_adapter(network: nn.Module, folder: Path, *, name: str = GUIDE) -> NamedAdapter:
    """The guide of TGDPO where it is a LoRA that DPO trained from the policy's own base: it is loaded beside the policy's, so
    it costs its own size, and it has the same tokens and the same reference by construction.

    Raises:
        UserError: see :func:`polyalign.core.adapter_files.load_adapter`.
    """
    load_adapter(network, folder, name)
    return NamedAdapter(network, name, seat="guide", key="its folder is the recipe's guide")


class OtherNetwork(Stateless):
    """A whole network of its own, frozen, that takes the same batches: a guide that is no LoRA. It reads the policy's tokens,
    so it must have the same tokenizer; whoever opens it checks that."""

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        return adapter.score(model.with_network(self.network), batch, draws).detach()


# --- completions of other prompts ---------------------------------------------------------------------------------------------


class Mismatched(Stateless):
    """The policy (``seat`` None) or another seat on the batch's answers, each put to the next group's prompt. With the
    reference scored so too, their mean log-ratio estimates the KL from the reference (KTO, arXiv 2402.01306, and TRL).

    Groups of one prompt that stand next to each other give answers that are not mismatched; TRL takes no notice either.
    """

    def __init__(self, seat: Seat | None = None):
        self.seat = seat

    @torch.no_grad()
    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores | None:
        other = mismatched(batch)
        if self.seat is None:
            return adapter.score(model, other, draws).detach()
        return self.seat.scores(adapter, model, other, draws, index=index)


def mismatched_seats(reference: Seat) -> dict[str, Seat]:
    """The two seats of KTO's baseline ``mismatched``. ``reference`` itself stays in its own seat, where it is moved, follows
    the policy and is saved.

    Raises:
        UserError: there is no reference, or only one whose scores were kept for pairs as they are.
    """
    live = reference.seat if isinstance(reference, Cached) else reference
    if isinstance(live, NoReference | StartingWeights | Recorded):
        raise UserError(
            "objective.baseline: mismatched scores other combinations of prompt and answer in every step, under the policy and "
            "under the reference, and this reference cannot. Set train.reference.seat to adapter_off, frozen or ema, or "
            "objective.baseline to batch"
        )
    return {"mismatched": Mismatched(), "mismatched_reference": Mismatched(live)}


def mismatched(batch: Batch) -> Batch:
    """``batch`` with each group's answers put to the next group's prompt, under ids of their own.

    Raises:
        UserError: a single group; a batch that does not tell answers from prompts.
    """
    names = [name for name in batch.tensors if name.startswith(COMPLETION)]
    if not names:
        raise UserError(
            "objective.baseline: mismatched puts answers to other prompts, and this modality has no answers apart from what "
            "was asked. Set objective.baseline to batch"
        )
    if len(batch) < 2:
        raise UserError(
            "objective.baseline: mismatched puts answers to other prompts of the batch, and this batch has one prompt. Set "
            "train.micro_batch_size and train.batch_size to 2 or more"
        )
    moved = {name: tensor.roll(1, 0) if name in names else tensor for name, tensor in batch.tensors.items()}
    before = [batch.group_ids[-1], *batch.group_ids[:-1]]
    return replace(batch, group_ids=tuple(f"{b} to {a}" for a, b in zip(batch.group_ids, before, strict=True)), tensors=moved)


# --- recorded scores ----------------------------------------------------------------------------------------------------------


class Recorded(Stateless):
    """Scores that came with the data: log-probabilities of the answers under the policy that gave them.

    Args:
        values: by pair, for each candidate either a value for each of its units (tokens), or their sum.
        unit: what a value is.

    A sum stands in the first unit, which is right for objectives that reduce by the sum or the mean over a candidate's units,
    and for no others.
    """

    def __init__(self, values: Mapping[str, Sequence[Values]], unit: Unit):
        self.values, self.unit = values, unit

    def scores(self, adapter: Adapter, model: Model, batch: Batch, draws: Any, *, index: int) -> Scores:
        """Raises UserError for a pair without recorded scores, or with other numbers of candidates or tokens than it has."""
        missing = [group_id for group_id in batch.group_ids if group_id not in self.values]
        if missing:
            raise UserError(f"the pair {missing[0]!r} ({len(missing)} of its batch) has no recorded behaviour scores")
        lists = [[_listed(value) for value in self.values[group_id]] for group_id in batch.group_ids]
        lengths = batch.tensors.get("completion_mask")
        units = max(max((len(values) for group in lists for values in group), default=1), 1)
        candidates = batch.target.shape[1]
        found = torch.zeros(len(batch), candidates, units)
        mask = torch.zeros(len(batch), candidates, units, dtype=torch.bool)
        for place, group in enumerate(lists):
            _refuse_other_shape(batch, place, self.values[batch.group_ids[place]], lengths)
            for candidate, values in enumerate(group):
                found[place, candidate, : len(values)] = torch.tensor(values)
                mask[place, candidate, : len(values)] = True
        return Scores(found.to(batch.target.device), mask.to(batch.target.device), self.unit)


def behaviour_of(rows: Iterable[Row], *, key: str = "behaviour") -> dict[str, Sequence[Values]]:
    """What :class:`Recorded` takes, from rows that carry it.

    Raises:
        UserError: a row without it.
    """
    found = {}
    for row in rows:
        if row.get(key) is None:
            raise UserError(
                f"the pair {row['pair_id']!r} has no {key!r}: for each candidate the log-probabilities of its tokens under the "
                "policy that gave it, or their sum"
            )
        found[str(row["pair_id"])] = row[key]
    return found


def _listed(value: Values) -> list[float]:
    return [float(value)] if isinstance(value, int | float) else [float(part) for part in value]


def _refuse_other_shape(batch: Batch, place: int, recorded: Sequence[Values], lengths: Tensor | None) -> None:
    name, candidates = batch.group_ids[place], batch.target.shape[1]
    if len(recorded) != candidates:
        raise UserError(f"the pair {name!r} has recorded scores of {len(recorded)} candidates, and it has {candidates}")
    if lengths is None:
        return
    wanted = lengths[place].sum(-1).tolist()
    for candidate, value in enumerate(recorded):
        if not isinstance(value, int | float) and len(value) != wanted[candidate]:
            raise UserError(
                f"candidate {candidate} of the pair {name!r} has recorded scores of {len(value)} tokens, and it has "
                f"{wanted[candidate]}: they were taken with another tokenizer, or without the token that ends an answer"
            )
