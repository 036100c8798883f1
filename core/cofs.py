"""COFS-DPO (arXiv 2406.05534): the fast adapters of several domains, combined into one.

After each domain the fast adapter is kept. The adapter to use, or to go on from, is a linear combination of them,

    Delta W = sum_k c_k s_k B_k A_k

of the *products*, with s_k an adapter's own scale: its ranks add up (peft calls this ``cat``), or are cut down again to a given
rank, with what that loses. The coefficients are those with the smallest mean DPO loss on a small memory of pairs of all
domains, each domain counting the same. How the authors choose them is not public; here it is a direct search, over the simplex
or over each coefficient by itself.

Letters: K adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Adapter, Model, Row
from polyalign.core.algorithm import of_length
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens_network import without_noise
from polyalign.core.low_rank import combine_low_rank, reduce_rank
from polyalign.core.objectives import Beta, Objective
from polyalign.core.references import Seat, adapter_chosen, adapter_layers, adapter_names, choose_adapter
from polyalign.core.scores import Scores

Space = Literal["simplex", "coordinates"]
COMBINED = "combined"
FIRST_STEP, LAST_STEP = 0.5, 0.02
"""Of the search: how far a coefficient is moved at first, and at last."""
LARGEST = 2.0
"""Of ``coordinates``, the largest coefficient: the loss of pairs that an adapter fits falls without end as it grows."""


# --- the combination ----------------------------------------------------------------------------------------------------------


def combine_adapters(
    network: Any, names: Sequence[str], coefficients: Sequence[float], *, into: str = COMBINED, rank: int | None = None
) -> float:
    """Make the adapter ``into`` the combination of ``names``, or make it that anew; it is frozen and not chosen.

    Args:
        rank: cut down to this rank, layer by layer; None keeps the sum of the ranks, which is exact.

    Returns:
        What the cut loses: the norm of the difference, as a share of the norm of the combined update of all layers.

    Raises:
        UserError: an adapter that is missing, or that is not a plain LoRA.
    """
    configs = [_plain_lora(network, name) for name in names]
    total = sum(max([config.r, *config.rank_pattern.values()]) for config in configs)
    wanted = total if rank is None else min(rank, total)
    layers = [layer for layer in adapter_layers(network) if adapter_names(layer) & set(names)]
    lacking = any(into not in adapter_names(layer) for layer in layers)
    if into in network.peft_config and (lacking or network.peft_config[into].r != wanted):
        _remove(network, into)
    if into not in network.peft_config:
        _add(network, names, into, wanted)
    lost = size = 0.0
    for layer in adapter_layers(network):
        if into not in adapter_names(layer):
            continue
        present = [(name, c) for name, c in zip(names, coefficients, strict=True) if name in layer.scaling]
        if not present:
            _factors(layer, into)[1].zero_()  # of an earlier combination of others
            continue
        factors = [_factors(layer, name) for name, _ in present]
        scales = [c * layer.scaling[name] for name, c in present]
        down, up = combine_low_rank([down for down, _ in factors], [up for _, up in factors], scales)
        if rank is not None:
            down, up, part_lost, part_size = _reduced(down, up, rank)
            lost, size = lost + part_lost, size + part_size
        _fill(layer, into, down, up)
    return math.sqrt(lost / size) if size else 0.0


def _plain_lora(network: Any, name: str) -> Any:
    config = getattr(network, "peft_config", {}).get(name)
    if config is None:
        raise UserError(
            f"there is no adapter {name!r} to combine; the network has {sorted(getattr(network, 'peft_config', {}))}"
        )
    odd = [key for key in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices") if getattr(config, key, None)]
    if getattr(config, "bias", "none") != "none":
        odd.append("bias")
    if odd or not hasattr(config, "r"):
        raise UserError(
            f"the adapter {name!r} is not a plain LoRA ({', '.join(odd) or config.peft_type}): only products of two matrices "
            "can be combined exactly"
        )
    return config


def _add(network: Any, names: Sequence[str], into: str, rank: int) -> None:
    """An adapter of scale 1 on every layer that one of ``names`` is on."""
    from peft import LoraConfig, PeftModel

    first = network.peft_config[names[0]]
    targets = [network.peft_config[name].target_modules for name in names]
    same = all(target == targets[0] for target in targets)
    modules = targets[0] if same else sorted({part for target in targets for part in _listed(target)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, task_type=first.task_type)
    config.base_model_name_or_path = first.base_model_name_or_path
    config.inference_mode = True
    chosen = adapter_layers(network)[0].active_adapters[0]
    trained = {key: weight.requires_grad for key, weight in network.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        if isinstance(network, PeftModel):
            network.add_adapter(into, config)
        else:
            network.add_adapter(config, adapter_name=into)
    choose_adapter(network, chosen)
    for key, weight in network.named_parameters():
        weight.requires_grad_(trained.get(key, False))


def _remove(network: Any, name: str) -> None:
    if hasattr(network, "delete_adapters"):  # diffusers' name for it
        network.delete_adapters(name)
    else:
        network.delete_adapter(name)


def _listed(target: Any) -> list[str]:
    if isinstance(target, str):
        raise UserError(f"adapters with different targets are combined by the names of their layers, and one has {target!r}")
    return list(target)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """(A, B) of an adapter on a layer, which for an embedding are parameters and not layers themselves."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()


def _reduced(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """As :func:`reduce_rank`; the kernels of a convolution are matrices too."""
    small_down, small_up, lost, size = reduce_rank(down.flatten(1), up.flatten(1), rank)
    return small_down.reshape(-1, *down.shape[1:]), small_up.reshape(up.shape[0], -1, *up.shape[2:]), lost, size


def _fill(layer: Any, name: str, down: Tensor, up: Tensor) -> None:
    """Write the factors; an adapter of a higher rank than theirs has zeros in the rest."""
    own_down, own_up = _factors(layer, name)
    own_down.zero_()
    own_up.zero_()
    own_down[: len(down)] = down
    own_up[:, : up.shape[1]] = up


# --- the memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    domain: str
    batch: Batch
    draws: Any
    reference: Scores | None


class Replay:
    """Pairs of past domains that coefficients are chosen on, under draws that stay the same; the reference is scored once.

    Args:
        domains: a few pairs of each domain, by its name.

    Raises:
        UserError: a domain without pairs.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: Model,
        objective: Objective,
        beta: Beta,
        reference: Seat,
        domains: Mapping[str, Sequence[Row]],
        *,
        batch_size: int = 8,
    ):
        if not domains or not all(domains.values()):
            empty = [name for name, rows in domains.items() if not rows]
            raise UserError(
                f"the memory that COFS chooses on has no pairs{f' of {empty}' if empty else ''}; give some of each domain"
            )
        self.adapter, self.model, self.objective, self.beta = adapter, model, objective, beta
        device = next(model.network.parameters()).device
        self.kept: list[_Kept] = []
        for domain, rows in domains.items():
            for start in range(0, len(rows), batch_size):
                batch = adapter.prepare(model, rows[start : start + batch_size], step=0).to(device)
                draws = adapter.draws(model, batch, step=0)
                with without_noise(model.network):  # as the adapters are scored; a frozen reference follows this mode
                    scores = reference.scores(adapter, model, batch, draws, index=0)
                self.kept.append(_Kept(domain, batch, draws, scores))

    @torch.no_grad()
    def losses(self, name: str) -> dict[str, float]:
        """The mean loss over each domain's pairs with the adapter ``name``."""
        found: dict[str, list[Tensor]] = {}
        with without_noise(self.model.network), adapter_chosen(self.model.network, name):
            for kept in self.kept:
                policy = self.adapter.score(self.model, kept.batch, kept.draws)
                scores = {"policy": policy}
                if kept.reference is not None:
                    scores["reference"] = of_length(kept.reference, policy.values.shape[-1])
                outcome = self.objective(scores, kept.batch, beta=self.beta.effective(policy.unit))
                found.setdefault(kept.domain, []).append(outcome.loss.double().cpu())
        return {domain: torch.cat(parts).mean().item() for domain, parts in found.items()}


# --- the coefficients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """``loss`` is the mean over domains, ``losses`` each domain's, ``tried`` counts combinations that were scored."""

    coefficients: tuple[float, ...]
    loss: float
    losses: Mapping[str, float]
    tried: int


def choose_coefficients(
    network: nn.Module, names: Sequence[str], replay: Replay, *, space: Space = "simplex", into: str = COMBINED
) -> Chosen:
    """Search the coefficients of ``names`` and leave the best combination in the adapter ``into``. By construction no single
    adapter, and not their mean, has a smaller loss on the memory."""
    seen: dict[tuple[float, ...], dict[str, float]] = {}

    def loss(coefficients: tuple[float, ...]) -> float:
        if coefficients not in seen:
            combine_adapters(network, names, coefficients, into=into)
            seen[coefficients] = replay.losses(into)
        return sum(seen[coefficients].values()) / len(seen[coefficients])

    best = search(loss, len(names), space=space)
    combine_adapters(network, names, best, into=into)
    return Chosen(best, loss(best), seen[best], len(seen))


def search(loss: Callable[[tuple[float, ...]], float], count: int, *, space: Space = "simplex") -> tuple[float, ...]:
    """Coefficients with a small ``loss``: from the best single one or the mean, the best of all moves of one size is taken as
    long as one helps, then moves of half the size. ``simplex`` moves a share from one coefficient to another, so that they stay
    at least 0 and sum to 1; ``coordinates`` moves one alone, none below 0 or above 2."""
    corners = [tuple(float(place == k) for place in range(count)) for k in range(count)]
    best = min([*corners, (1.0 / count,) * count], key=loss)
    size = FIRST_STEP
    while size >= LAST_STEP:
        moved = min(_moves(best, size, space), key=loss, default=best)
        if loss(moved) < loss(best):
            best = moved
        else:
            size /= 2
    return best


def _moves(coefficients: tuple[float, ...], size: float, space: Space) -> list[tuple[float, ...]]:
    places = range(len(coefficients))
    if space == "coordinates":
        changes = [{place: sign * size} for place in places for sign in (1.0, -1.0)]
    else:
        shares = [(a, b, min(size, coefficients[a])) for a in places for b in places if a != b and coefficients[a] > 0]
        changes = [{a: -share, b: share} for a, b, share in shares]
    # Rounded, so that a point reached in two ways is one point.
    moved = [
        tuple(round(min(max(0.0, c + change.get(k, 0.0)), LARGEST), 9) for k, c in enumerate(coefficients))
        for change in changes
    ]
    return [point for point in moved if point != coefficients]
