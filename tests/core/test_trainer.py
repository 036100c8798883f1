"""The trainer around the step: what it refuses, what it writes, several networks, schedule and optimisers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polyalign.core import checkpoint as checkpoints
from polyalign.core.algorithm import Layout, Rows
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.launch import accelerator_beside, refuse_lost_processes, start_accelerator
from polyalign.core.learner import refuse_float16
from polyalign.core.objectives import Outcome
from polyalign.core.optimisers import build_optimizer, schedule_factor
from polyalign.core.recipe import OptimizerConfig, ScheduleConfig, TrackingConfig
from polyalign.core.tracking import MetricsFile, figures_of
from polyalign.core.trainer import Part, Trainer, order

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import Denoiser, TinyAdapter, TinyPairs, algorithm, settings  # noqa: E402  # pyright: ignore[reportMissingImports]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def test_metrics_have_the_names_of_the_contract_and_the_summary_counts(tmp_path: Path) -> None:
    summary = Trainer(algorithm(tmp_path), TinyPairs(), settings(), tmp_path).run()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = (
        "epoch loss learning_rate gradient_norm seconds pairs_seen peak_memory_bytes beta gradient_weight margins_by_timestep"
    )
    rewards = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies"
    errors = "error/policy_chosen error/policy_rejected error/reference_chosen error/reference_rejected"
    assert set(f"{names} {rewards} {errors}".split()) <= set(lines[0])
    assert lines[-1]["pairs_seen"] == 48 and lines[-1]["epoch"] == 4.0 and lines[0]["beta"] == 20.0
    assert len(lines[0]["margins_by_timestep"]) == 8
    for line in lines:
        assert math.isclose(line["rewards/chosen"] - line["rewards/rejected"], line["rewards/margins"], abs_tol=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (summary.steps, summary.last_step, summary.pairs) == (6, 6, 48)
    assert summary.checkpoint == tmp_path / "checkpoints/step-000006" and summary.pairs_per_second > 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    Trainer(algorithm(tmp_path), TinyPairs(), settings(), tmp_path).run()
    again = Trainer(algorithm(tmp_path), TinyPairs(), settings(), tmp_path).run()
    assert again.steps == 0 and again.last_step == 6 and len(metrics(tmp_path)) == 6


def test_fewer_log_lines_when_asked(tmp_path: Path) -> None:
    Trainer(algorithm(tmp_path), TinyPairs(), settings(log_every=4), tmp_path).run()
    assert [line["step"] for line in metrics(tmp_path)] == [4, 6]


def test_a_nan_refuses_the_step_keeps_the_weights_and_names_the_pair(tmp_path: Path) -> None:
    broken = order(0, 12, 0)[9]  # met in the second step
    pairs, method = TinyPairs(broken=broken), algorithm(tmp_path)
    with pytest.raises(UserError, match=f"step 2 was refused: its loss is not finite, for pair-{broken:03d} ") as caught:
        Trainer(method, pairs, settings(save_every=1), tmp_path).run()
    assert "step-000001" in str(caught.value) and "learning_rate" in str(caught.value)
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused["step"] == 2 and refused["not_finite"] == [f"pair-{broken:03d}"] and len(refused["group_ids"]) == 8
    assert refused["losses"]["policy"].count("nan") == 1
    kept = checkpoints.latest(tmp_path / "checkpoints")
    assert kept is not None and kept.step == 1
    held = dict(method.networks["policy"].named_parameters())
    assert all(torch.equal(held[name], value) for name, value in kept.weights("policy").items())
    assert all(parameter.grad is None for parameter in held.values())
    assert [line["step"] for line in metrics(tmp_path)] == [1]


def test_an_infinite_gradient_is_refused_even_when_the_loss_is_finite(tmp_path: Path) -> None:
    method = algorithm(tmp_path)
    before = weights_of(method.networks["policy"])
    for parameter in method.networks["policy"].parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="step 1 was refused: its gradient is not finite.*there is no checkpoint yet"):
        Trainer(method, TinyPairs(), settings(), tmp_path).run()
    after = weights_of(method.networks["policy"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_settings_are_refused_by_name_unless_started_anew(tmp_path: Path) -> None:
    Trainer(algorithm(tmp_path), TinyPairs(), settings(steps=2), tmp_path, identity={"pairs": "a"}).run()
    changed = settings(steps=2, optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(UserError) as caught:
        Trainer(algorithm(tmp_path), TinyPairs(), changed, tmp_path, identity={"pairs": "b"}).run()
    assert "pairs: 'a' -> 'b'" in str(caught.value)
    assert "train.optimizer.learning_rate: 0.02 -> 0.001" in str(caught.value)
    Trainer(algorithm(tmp_path), TinyPairs(), changed, tmp_path, identity={"pairs": "b"}).run(anew=True)
    assert (tmp_path / "checkpoints.stale-1/step-000002").is_dir() and len(metrics(tmp_path)) == 2


def test_what_does_not_change_the_weights_may_change_and_constant_runs_can_grow(tmp_path: Path) -> None:
    constant = ScheduleConfig(warmup_steps=2)
    Trainer(algorithm(tmp_path), TinyPairs(), settings(steps=4, schedule=constant), tmp_path).run()
    longer = settings(steps=6, schedule=constant, micro_batch_size=2, keep_checkpoints=1, save_every=3)
    assert Trainer(algorithm(tmp_path), TinyPairs(), longer, tmp_path).run().steps == 2
    with pytest.raises(UserError, match="train.steps is 3, but .*step-000006 is already further"):
        Trainer(algorithm(tmp_path), TinyPairs(), settings(steps=3, schedule=constant), tmp_path).run()


def test_no_pairs_and_batches_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pairs to train on"):
        Trainer(algorithm(tmp_path), TinyPairs(0), settings(), tmp_path)
    coupled = algorithm(tmp_path)
    coupled.group_separable = False
    with pytest.raises(UserError, match="couples the pairs of a batch.*objective.safeguard_scope: group"):
        Trainer(coupled, TinyPairs(), settings(micro_batch_size=4), tmp_path)
    assert Trainer(coupled, TinyPairs(), settings(steps=1), tmp_path).run().steps == 1


def test_batches_cross_epochs_and_every_row_comes_as_often(tmp_path: Path) -> None:
    trainer = Trainer(algorithm(tmp_path), TinyPairs(12), settings(micro_batch_size=3), tmp_path)
    seen = [row["pair_id"] for step in range(1, 4) for rows, _, _ in trainer._micro_batches(step) for row in rows]
    assert sorted(seen) == sorted(2 * [f"pair-{index:03d}" for index in range(12)])
    assert sorted(seen[:12]) == [f"pair-{index:03d}" for index in range(12)] and seen[:12] != seen[12:]


def test_a_part_takes_its_own_data_from_their_beginning_and_ends_where_it_says(tmp_path: Path) -> None:
    first = Trainer(algorithm(tmp_path), TinyPairs(12), settings(micro_batch_size=4), tmp_path, part=Part(0, 3))
    summary = first.run()
    assert (summary.steps, summary.last_step) == (3, 3) and first.run().steps == 0
    later = Trainer(algorithm(tmp_path), TinyPairs(12), settings(micro_batch_size=4), tmp_path, part=Part(3, 6))

    def seen(trainer: Trainer, steps: range) -> list[str]:
        return [row["pair_id"] for step in steps for rows, _, _ in trainer._micro_batches(step) for row in rows]

    assert seen(later, range(4, 7)) == seen(first, range(1, 4))
    assert later.run().last_step == 6 and [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    whole = Trainer(algorithm(tmp_path / "whole"), TinyPairs(12), settings(), tmp_path / "whole")
    whole.run()
    rates = [line["learning_rate"] for line in metrics(tmp_path / "whole")]
    assert [line["learning_rate"] for line in metrics(tmp_path)] == rates
    with pytest.raises(ValueError, match="steps past 3, and the last checkpoint is of step 0"):
        Trainer(algorithm(tmp_path), TinyPairs(12), settings(), tmp_path / "empty", part=Part(3, 6)).run()


class TwoPlayers:
    """Two networks: ``student`` learns in odd steps through the frozen judgement of ``critic``, which learns in even ones."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.networks: dict[str, nn.Module] = {"student": nn.Linear(4, 4), "critic": nn.Linear(4, 1)}
        self.group_separable = True
        self.steps: list[int] = []

    def begin(self, data: Rows, layout: Layout, *, micro_batch_size: int) -> None: ...

    def prepare(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> Batch:
        target = torch.tensor([[1.0, 0.0]] * len(rows))
        return Batch(tuple(row["pair_id"] for row in rows), target, {"x": torch.stack([row["condition"] for row in rows])})

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        judged = self.networks["critic"](self.networks["student"](batch.tensors["x"])).squeeze(1)
        if step % 3 == 0:
            return {"student": Outcome(judged, {}), "critic": Outcome(judged.square(), {})}
        return {"student": Outcome(judged, {})} if step % 3 == 1 else {"critic": Outcome(judged.square(), {})}

    def after_step(self, step: int, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.steps.append(step)

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = list(state["steps"])


def test_alternating_networks_are_updated_only_in_their_steps_and_keep_their_own_optimisers(tmp_path: Path) -> None:
    game = TwoPlayers()
    rates = {"critic": OptimizerConfig(learning_rate=1e-3)}
    history = [{name: weights_of(network) for name, network in game.networks.items()}]
    for steps in (1, 2, 3):
        constant = settings(steps=steps, schedule=ScheduleConfig(), micro_batch_size=4)
        Trainer(game, TinyPairs(), constant, tmp_path, optimizers=rates).run()
        history.append({name: weights_of(network) for name, network in game.networks.items()})
    moved = [
        {name: not torch.equal(before[name]["weight"], after[name]["weight"]) for name in before}
        for before, after in zip(history, history[1:], strict=False)
    ]
    assert moved == [
        {"student": True, "critic": False},
        {"student": False, "critic": True},
        {"student": True, "critic": True},
    ]
    lines = metrics(tmp_path)
    assert lines[0]["student/learning_rate"] == 0.02 and "critic/learning_rate" not in lines[0]
    assert lines[1]["critic/learning_rate"] == 1e-3 and "student/loss" not in lines[1]
    assert math.isclose(lines[2]["loss"], lines[2]["student/loss"] + lines[2]["critic/loss"], rel_tol=1e-6)
    assert game.steps == [1, 2, 3]


def test_a_shared_graph_leaves_no_gradient_in_the_other_network(tmp_path: Path) -> None:
    """With both losses at once the critic must move as if it were alone: its step does not see the student's loss."""
    both, alone = TwoPlayers(), TwoPlayers()
    alone.step = lambda batch, step: {"critic": TwoPlayers.step(alone, batch, step=2)["critic"]}  # type: ignore[method-assign]
    both.step = lambda batch, step: TwoPlayers.step(both, batch, step=3)  # type: ignore[method-assign]
    for name, game in (("both", both), ("alone", alone)):
        Trainer(game, TinyPairs(), settings(steps=1), tmp_path / name).run()
    assert torch.equal(both.networks["critic"].weight, alone.networks["critic"].weight)  # type: ignore[arg-type]


def test_schedules() -> None:
    def factors(name: str, warmup: int) -> list[float]:
        config = ScheduleConfig(name=name, warmup_steps=warmup)  # type: ignore[arg-type]
        return [round(schedule_factor(step, steps=6, schedule=config), 6) for step in range(1, 7)]

    assert factors("constant", 0) == [1.0] * 6
    assert factors("constant", 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors("linear", 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors("cosine", 2) == [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]


def test_optimisers_of_the_recipe() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    adamw = build_optimizer([parameter], OptimizerConfig(betas=(0.8, 0.9), weight_decay=0.5, epsilon=1e-6))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9) and adamw.defaults["weight_decay"] == 0.5 and adamw.defaults["eps"] == 1e-6
    adafactor = build_optimizer([parameter], OptimizerConfig(name="adafactor", learning_rate=0.1, weight_decay=0.0))
    parameter.grad = torch.ones(3, 3)
    adafactor.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3, 3), 0.9), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer([], OptimizerConfig())


def test_adafactor_and_bf16_train_and_resume(tmp_path: Path) -> None:
    chosen = settings(steps=2, optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-2), mixed_precision="bf16")
    method = algorithm(tmp_path)
    Trainer(method, TinyPairs(), chosen, tmp_path).run()
    line = metrics(tmp_path)[0]
    assert line["rewards/margins"] == 0.0 and math.isclose(line["loss"], math.log(2), rel_tol=1e-7)
    again = algorithm(tmp_path)
    assert Trainer(again, TinyPairs(), chosen, tmp_path).run().steps == 0
    kept, loaded = (dict(each.networks["policy"].named_parameters()) for each in (method, again))
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)


def test_damaged_checkpoints_are_told_and_figures_of_lost_steps_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_again() -> tuple[list[int], str]:
        Trainer(algorithm(tmp_path), TinyPairs(), settings(), tmp_path).run()
        return [line["step"] for line in metrics(tmp_path)], capsys.readouterr().err

    first, _ = run_again()
    damaged = tmp_path / "checkpoints/step-000006/policy.safetensors"
    damaged.unlink()
    steps, said = run_again()
    assert f"{damaged.parent}: is damaged and passed over (policy.safetensors is missing)" in said
    assert steps == first == [1, 2, 3, 4, 5, 6] and not list(tmp_path.glob("metrics.jsonl.*"))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    steps, said = run_again()
    assert said.count("passed over (state.json is missing)") == 2 and steps == first
    assert (tmp_path / "metrics.jsonl.stale-1").read_bytes() == before


class PrecisionSeen(TinyAdapter):
    """Notes what is autocast."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.seen: dict[str, set[bool]] = {"prepare": set(), "score": set()}

    def prepare(self, model: Any, rows: Any, *, step: int) -> Batch:
        self.seen["prepare"].add(torch.is_autocast_enabled("cpu"))
        return super().prepare(model, rows, step=step)

    def score(self, model: Any, batch: Batch, draws: Any) -> Any:
        self.seen["score"].add(torch.is_autocast_enabled("cpu"))
        return super().score(model, batch, draws)


@pytest.mark.parametrize("steps", [0, 1], ids=["filling the cache", "and a step"])
def test_only_scores_are_autocast(tmp_path: Path, steps: int) -> None:
    method = algorithm(tmp_path, seat="cached", lora=False)
    adapter = method.adapter = PrecisionSeen(lora=False)
    Trainer(method, TinyPairs(), settings(steps=steps, mixed_precision="bf16"), tmp_path).run()
    assert adapter.seen == {"prepare": {False}, "score": {True}}


def test_a_cached_reference_is_refused_where_weights_are_sharded(tmp_path: Path) -> None:
    method = algorithm(tmp_path, seat="cached")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(method.networks["policy"], mesh=init_device_mesh("cpu", (1,)))
        layout = Layout(torch.device("cpu"), 0, 1, lambda: None, nullcontext)
        with pytest.raises(UserError, match="train.reference.seat: cached does not work where the weights are cut up"):
            method.begin(TinyPairs(), layout, micro_batch_size=4)
    finally:
        dist.destroy_process_group()


def test_float16_weights_need_the_loss_scale_of_fp16(tmp_path: Path) -> None:
    method = algorithm(tmp_path)
    method.networks["policy"].get_submodule("base_model.model.time").half()
    for precision in ("no", "bf16"):
        chosen = settings(mixed_precision=precision)
        with pytest.raises(UserError, match=f"model.dtype: float16 with train.mixed_precision: {precision}"):
            Trainer(method, TinyPairs(), chosen, tmp_path)
    refuse_float16(method.networks["policy"], "fp16")
    with pytest.raises(UserError, match="weights that are trained must not be float16"):
        refuse_float16(Denoiser().half(), "fp16")


def test_training_is_where_the_network_is(tmp_path: Path) -> None:
    method = algorithm(tmp_path)
    assert Trainer(method, TinyPairs(), settings(), tmp_path).accelerator.device.type == "cpu"
    here = start_accelerator(settings(), cpu=True)
    elsewhere = [nn.Linear(2, 2, device="meta")]
    with pytest.raises(UserError, match="model.device: the network is on meta, and training would run on cpu"):
        accelerator_beside(elsewhere, settings(), here)
    with pytest.raises(UserError, match="model.device: the weights are on cpu and meta; put them on one"):
        accelerator_beside([*elsewhere, nn.Linear(2, 2)], settings(), here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_a_network_on_the_cpu_is_trained_there_beside_a_gpu(tmp_path: Path) -> None:
    for device in ("cuda", "cpu", "cuda"):
        method = algorithm(tmp_path / device)
        method.networks["policy"].to(device)
        trainer = Trainer(method, TinyPairs(), settings(steps=1), tmp_path / device)
        trainer.run(anew=True)
        assert {parameter.device.type for parameter in method.networks["policy"].parameters()} == {device}


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        start_accelerator(settings(mixed_precision="fp16"), cpu=True)


def test_processes_that_did_not_start_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE says 2 processes, but 1 run together.*torchrun --nproc_per_node 2"):
        refuse_lost_processes(1)
    refuse_lost_processes(2)
    monkeypatch.delenv("WORLD_SIZE")
    refuse_lost_processes(1)


def test_metrics_file_drops_torn_and_later_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(3)
    for step in (1, 2, 3):
        file.append({"step": step})
    with open(file.path, "a") as torn:
        torn.write('{"step": 4, "lo')
    file.rewind(2)
    file.append({"step": 3})
    file.sync()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_figures_are_means_by_candidate() -> None:
    statistics = {
        "reward": torch.tensor([[1.0, 2.0, 4.0], [3.0, 2.0, 0.0]]),
        "error/policy": torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
        "margin": torch.tensor([1.0, 3.0]),
        "timestep": torch.tensor([[10], [20]]),
    }
    assert figures_of(statistics) == {
        "rewards/chosen": 2.0,
        "rewards/rejected": 2.0,
        "error/policy_chosen": 2.0,
        "error/policy_rejected": 4.0,
        "rewards/margins": 2.0,
        "margins_by_timestep": [[10, 1.0], [20, 3.0]],
    }


def test_a_tracker_without_its_package_names_the_extra(tmp_path: Path) -> None:
    import importlib.util

    missing = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name) is None]
    for name in missing:
        tracked = Trainer(algorithm(tmp_path), TinyPairs(), settings(), tmp_path, tracking=TrackingConfig(backend=name))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"polyalign\[track\]"):
            tracked.run()
