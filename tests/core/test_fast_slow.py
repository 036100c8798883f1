"""OFS-DPO: two adapters on one network, their losses, their roles, and what a killed training keeps."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyalign.core import checkpoint as checkpoints
from polyalign.core.errors import UserError
from polyalign.core.fast_slow import ADAPTERS, AdapterView, FastSlow, add_twin, exchange, slow_optimizer
from polyalign.core.learner import trained
from polyalign.core.objectives.table import SPEC
from polyalign.core.recipe import ReferenceConfig
from polyalign.core.references import AdapterOff, adapter_chosen, adapter_parameters, build_seat
from polyalign.core.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import TinyAdapter, TinyPairs, settings  # noqa: E402  # pyright: ignore[reportMissingImports]

RATIO = 0.2


def two_sides(*, interval: int = 2, limit: float = 100.0, **objective: Any) -> FastSlow:
    kind = TinyAdapter()
    model = kind.trainable(kind.load())
    add_twin(model.network)
    spec = SPEC.validate_python({"name": "ofs_dpo", "beta": {"value": 20.0}, **objective})
    return FastSlow(kind, model, spec, {"reference": AdapterOff(model.network)}, interval=interval, limit=limit)


def run(method: FastSlow, folder: Path, **changes: Any) -> Any:
    chosen = settings(**changes)
    return Trainer(method, TinyPairs(), chosen, folder, optimizers=slow_optimizer(chosen.optimizer, RATIO)).run()


def weights(method: FastSlow, side: str) -> list[Tensor]:
    return [weight.detach().clone() for weight in adapter_parameters(method.model.network, ADAPTERS[side])]  # type: ignore[index]


def distance(ours: list[Tensor], others: list[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(ours, others, strict=True))


def perturb(method: FastSlow, side: str, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed({"fast": 1, "slow": 2}[side])
    with torch.no_grad():
        for weight in adapter_parameters(method.model.network, ADAPTERS[side]):  # type: ignore[index]
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


def test_a_twin_has_the_same_weights_and_each_view_trains_its_own_alone() -> None:
    method = two_sides()
    assert distance(weights(method, "fast"), weights(method, "slow")) == 0.0
    names = {side: set(trained(network)) for side, network in method.networks.items()}
    assert names["fast"] and not names["fast"] & names["slow"]
    assert all(".default." in name for name in names["fast"]) and all(".slow." in name for name in names["slow"])
    every = {name for name, weight in method.model.network.named_parameters() if weight.requires_grad}
    assert names["fast"] | names["slow"] == every


def test_a_view_runs_its_own_adapter_and_leaves_the_choice_as_it_was() -> None:
    method = two_sides()
    perturb(method, "slow")
    inputs = (torch.ones(1, 3, 6, 6), torch.tensor([3]), torch.ones(1, 4))
    fast = method.model.network(*inputs)
    slow = AdapterView(method.model.network, "slow")(*inputs)
    with adapter_chosen(method.model.network, "slow"):
        assert torch.equal(method.model.network(*inputs), slow)
    assert not torch.equal(fast, slow) and torch.equal(method.model.network(*inputs), fast)


def test_losses_and_gradients_are_those_of_the_equations() -> None:
    """Against the formula, written out, with the gradient of each side taken by itself."""
    method = two_sides(alpha=0.7)
    perturb(method, "fast")
    perturb(method, "slow")
    model, kind, beta = method.model, method.adapter, method.beta
    batch = method.prepare(TinyPairs().rows([0, 1, 2]), step=1)
    draws = kind.draws(model, batch, step=1)

    def margins(name: str) -> Tensor:
        with adapter_chosen(model.network, name):
            scores = kind.score(model, batch, draws)
        means = scores.values.mean(-1)
        return beta.effective(scores.unit) * (means[:, 0] - means[:, 1])

    reference = method.seats["reference"].scores(kind, model, batch, draws, index=1)
    assert reference is not None
    base = beta.effective(reference.unit) * (reference.values.mean(-1)[:, 0] - reference.values.mean(-1)[:, 1])
    fast, slow = margins("default"), margins("slow")

    def dpo(difference: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(difference)

    wanted = {
        "fast": dpo(fast - base) + 0.7 * dpo(fast - slow.detach()),
        "slow": dpo(slow - base) - 0.7 * dpo(fast.detach() - slow),
    }
    outcomes = method.step(batch, step=1)
    for side, outcome in outcomes.items():
        torch.testing.assert_close(outcome.loss, wanted[side])
        own = list(trained(method.networks[side]).values())
        found = torch.autograd.grad(outcome.loss.sum(), own, retain_graph=True)
        expected = torch.autograd.grad(wanted[side].sum(), own, retain_graph=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        partner = list(trained(method.networks["slow" if side == "fast" else "fast"]).values())
        assert all(
            part is None for part in torch.autograd.grad(outcome.loss.sum(), partner, retain_graph=True, allow_unused=True)
        )
    torch.testing.assert_close(outcomes["fast"].statistics["dpo_loss"], dpo(fast - base).detach())
    torch.testing.assert_close(outcomes["slow"].statistics["dpo_loss"], dpo(slow - base).detach())
    torch.testing.assert_close(outcomes["fast"].statistics["apart"], (fast - slow).detach())


def test_both_learn_and_the_slow_one_less(tmp_path: Path) -> None:
    method = two_sides(interval=100)
    start = weights(method, "fast")
    run(method, tmp_path)
    assert 0.0 < distance(weights(method, "slow"), start) < 0.5 * distance(weights(method, "fast"), start)
    kept = checkpoints.latest(tmp_path / "checkpoints")
    assert kept is not None and set(kept.weights("fast")) == set(trained(method.networks["fast"]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"fast/dpo_loss"' in lines[0] and '"slow/apart"' in lines[0] and '"exchanges": 0' in lines[-1]


def test_the_better_one_takes_the_fast_side(tmp_path: Path) -> None:
    method = two_sides(interval=2, alpha=0.0)
    for step, (fast, slow) in enumerate([(0.5, 0.9), (0.6, 0.1), (0.4, 0.3), (0.2, 0.4)], 1):
        perturb(method, "slow")
        before = {side: weights(method, side) for side in ADAPTERS}
        statistics = {
            "fast": {"dpo_loss": torch.tensor([fast]), "apart": torch.zeros(1)},
            "slow": {"dpo_loss": torch.tensor([slow]), "apart": torch.zeros(1)},
        }
        method.after_step(step, statistics)
        now_fast = "slow" if step == 2 else "fast"  # means 0.55 and 0.5, then 0.3 and 0.35
        assert distance(weights(method, "fast"), before[now_fast]) == 0.0  # type: ignore[index]
    assert method.figures()["exchanges"] == 1 and method.counted == 0


def test_an_exchange_exchanges() -> None:
    method = two_sides()
    perturb(method, "fast")
    fast, slow = weights(method, "fast"), weights(method, "slow")
    exchange(method.model.network, *ADAPTERS.values())
    assert distance(weights(method, "fast"), slow) == 0.0 and distance(weights(method, "slow"), fast) == 0.0


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, killed_after: int) -> None:
    """With an interval of three the averages of the roles are half filled at the kill; a slow side that learns faster than the
    fast one makes the roles change."""
    whole = two_sides(interval=3)
    rates = slow_optimizer(settings().optimizer, 4.0)
    Trainer(whole, TinyPairs(), settings(save_every=1), tmp_path / "whole", optimizers=rates).run()
    assert whole.exchanges > 0
    for folder in sorted((tmp_path / "whole" / "checkpoints").iterdir()):
        assert folder.name in ("step-000005", "step-000006")

    first = two_sides(interval=3)
    trainer = Trainer(first, TinyPairs(), settings(save_every=1), tmp_path / "killed", optimizers=rates)
    after_step = first.after_step

    def killed(step: int, statistics: Any) -> None:
        if step > killed_after:
            raise KeyboardInterrupt
        after_step(step, statistics)

    first.after_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    again = two_sides(interval=3)
    Trainer(again, TinyPairs(), settings(save_every=1), tmp_path / "killed", optimizers=rates).run()
    for side in ADAPTERS:
        assert distance(weights(again, side), weights(whole, side)) == 0.0
    assert again.state_dict() == whole.state_dict()


def test_sides_that_run_apart_are_refused_in_words(tmp_path: Path) -> None:
    method = two_sides(interval=100, limit=0.01)
    with pytest.raises(UserError, match="OFS-DPO has diverged at step .*objective.clamp"):
        run(method, tmp_path, steps=6)


def test_a_clamp_ends_the_chase() -> None:
    free, clamped = two_sides(alpha=0.5), two_sides(alpha=0.5, clamp=1e-4)
    gradients = {}
    for name, method in (("free", free), ("clamped", clamped)):
        perturb(method, "slow")
        outcome = method.step(method.prepare(TinyPairs().rows([0, 1]), step=1), step=1)["slow"]
        assert (outcome.statistics["apart"].abs() > 1e-4).all()
        own = list(trained(method.networks["slow"]).values())
        gradients[name] = torch.autograd.grad(outcome.loss.sum(), own)
    alone = two_sides(alpha=0.0)
    perturb(alone, "slow")
    loss = alone.step(alone.prepare(TinyPairs().rows([0, 1]), step=1), step=1)["slow"].loss
    without = torch.autograd.grad(loss.sum(), list(trained(alone.networks["slow"]).values()))
    for ours, theirs in zip(gradients["clamped"], without, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(not torch.allclose(ours, theirs) for ours, theirs in zip(gradients["free"], without, strict=True))


def test_gradient_checkpointing_recomputes_each_side_with_its_own_adapter() -> None:
    """The backward pass runs the network again, long after the forward pass chose the adapter."""
    found: dict[bool, list[Tensor]] = {}
    for recomputed in (False, True):
        method = two_sides(alpha=0.5)
        perturb(method, "fast")
        perturb(method, "slow")
        network: Any = method.model.network
        denoiser = network.base_model.model
        if recomputed:
            forward = denoiser.forward
            denoiser.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
        outcomes = method.step(method.prepare(TinyPairs().rows([0, 1]), step=1), step=1)
        found[recomputed] = [
            gradient
            for side, outcome in outcomes.items()
            for gradient in torch.autograd.grad(
                outcome.loss.sum(), list(trained(method.networks[side]).values()), retain_graph=True
            )
        ]
    for plain, again in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(plain, again)


def test_what_does_not_fit_is_refused() -> None:
    kind = TinyAdapter(lora=False)
    with pytest.raises(UserError, match="OFS-DPO trains two LoRAs.*it has none"):
        add_twin(kind.load().network)
    kind = TinyAdapter()
    model = kind.trainable(kind.load())
    spec = SPEC.validate_python({"name": "ofs_dpo"})
    with pytest.raises(UserError, match=r"lacks \['slow'\]"):
        FastSlow(kind, model, spec, {})
    add_twin(model.network)
    with pytest.raises(UserError, match="'slow'; the network must have the first and not the second"):
        add_twin(model.network)
    adjusting = SPEC.validate_python({"name": "ofs_dpo", "beta": {"auto": {}}})
    with pytest.raises(UserError, match="OFS-DPO has two"):
        FastSlow(kind, model, adjusting, {})
    model.network.base_model.model.time.weight.requires_grad_(True)
    with pytest.raises(UserError, match="1 other weights would be trained too .*time.weight"):
        FastSlow(kind, model, spec, {})


def test_a_moving_reference_follows_the_fast_side(tmp_path: Path) -> None:
    method = two_sides(interval=100)
    method.seats["reference"] = build_seat(ReferenceConfig(seat="ema", ema_decay=0.0, ema_every=2), method.model.network)
    run(method, tmp_path, steps=4)
    batch = method.prepare(TinyPairs().rows([0, 1]), step=9)
    draws = method.adapter.draws(method.model, batch, step=9)
    reference = method.seats["reference"].scores(method.adapter, method.model, batch, draws, index=9)
    assert reference is not None
    assert torch.equal(reference.values, method.adapter.score(method.model, batch, draws).values)
    assert math.isfinite(float(reference.values.sum()))
