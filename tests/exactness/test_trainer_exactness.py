"""What must always hold of a training, to the bit where it says so, on a real small denoiser with a real LoRA."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from polyalign.core.trainer import Trainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from tiny_training import TinyPairs, algorithm, digest, settings  # noqa: E402  # pyright: ignore[reportMissingImports]

ROOT = HERE.parents[1]
TIMES = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def train(folder: Path, *, pairs: TinyPairs | None = None, **options: Any) -> Path:
    """Train in this process and return the last checkpoint."""
    names = ("seat", "bank", "auto_beta", "lora", "dropout")
    method = algorithm(folder, **{name: options.pop(name) for name in names if name in options})
    checkpoint = Trainer(method, pairs or TinyPairs(), settings(**options), folder).run().checkpoint
    assert checkpoint is not None
    return checkpoint


def script(folder: Path, *options: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(HERE / "tiny_training.py"), str(folder), *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_script(command: list[str], *, timeout: float = 180) -> None:
    process = psutil.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        kill_with_workers(process)
    assert process.returncode == 0, said


def kill_with_workers(process: psutil.Popen) -> None:
    """Kill a process, if it still runs, and all below it: torchrun starts its workers in sessions of their own, so they outlive
    it when it alone is killed, and then wait for one another."""
    if process.poll() is None:
        family = [*process.children(recursive=True), process]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=20)


def nearly_equal(one: Path, other: Path, tolerance: float = 2e-6) -> None:
    first, second = load_file(one / "policy.safetensors"), load_file(other / "policy.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("seat", "lora"), [("adapter_off", True), ("frozen", True), ("cached", True), ("ema", False), ("frozen", False)]
)
def test_policy_equal_to_reference_starts_at_ln_2_and_margins_of_exactly_zero(tmp_path: Path, seat: str, lora: bool) -> None:
    train(tmp_path, steps=1, seat=seat, lora=lora)
    first = lines(tmp_path)[0]
    assert first["rewards/margins"] == 0.0
    assert first["rewards/chosen"] == 0.0
    assert first["loss"] == torch.tensor(2.0).log().item()
    assert math.isclose(first["loss"], math.log(2), rel_tol=1e-7)
    assert first["rewards/accuracies"] == 0.5
    assert first["gradient_weight"] == 0.5
    assert first["error/policy_chosen"] == first["error/reference_chosen"] > 0
    assert all(margin == 0.0 for _, margin in first["margins_by_timestep"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_cached_reference_gives_the_bytes_of_the_live_one(tmp_path: Path, lora: bool) -> None:
    live = train(tmp_path / "live", seat="frozen", bank=3, lora=lora, micro_batch_size=4)
    filling = train(tmp_path / "filling", seat="cached", lora=lora, micro_batch_size=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "filling" / "reference").rename(tmp_path / "full" / "reference")
    full = train(tmp_path / "full", seat="cached", lora=lora, micro_batch_size=4)
    assert lines(tmp_path / "live") == lines(tmp_path / "filling") == lines(tmp_path / "full")
    assert digest(live) == digest(filling) == digest(full)


def test_micro_batches_of_one_and_of_eight_give_the_same_training(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", micro_batch_size=8)
    cut = train(tmp_path / "cut", micro_batch_size=1)
    uneven = train(tmp_path / "uneven", micro_batch_size=3)
    nearly_equal(whole, cut)
    nearly_equal(whole, uneven)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    options = {"dropout": 0.1, "auto_beta": True}
    one, other = train(tmp_path / "one", **options), train(tmp_path / "other", **options)
    assert digest(one) == digest(other)
    assert lines(tmp_path / "one") == lines(tmp_path / "other")


@pytest.mark.parametrize("seat", ["ema", "cached"])
def test_a_training_in_two_parts_is_the_training_in_one(tmp_path: Path, seat: str) -> None:
    """Dropout, automatic beta, a moving reference and the schedule all go on where they were."""
    options = {"dropout": 0.1, "auto_beta": True, "seat": seat}
    whole = train(tmp_path / "whole", **options)
    method = algorithm(tmp_path / "parts", **options)
    stopping = Trainer(method, StoppingPairs(after=5), settings(), tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        stopping.run()
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    parts = train(tmp_path / "parts", **options)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for file in ("policy.safetensors", "policy.optimizer.pt", "state.json"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


class StoppingPairs(TinyPairs):
    """Breaks off when the rows of a later step are asked for."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def rows(self, indices: Any) -> list[dict[str, Any]]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().rows(indices)


def test_killed_at_any_moment_and_started_again_ends_in_the_same_weights(tmp_path: Path) -> None:
    options = ["--steps", "60", "--seat", "ema", "--auto-beta", "--dropout", "0.1"]
    whole = train(
        tmp_path / "whole",
        steps=60,
        seat="ema",
        auto_beta=True,
        dropout=0.1,
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        script(folder, *options), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(folder.glob("checkpoints/step-*[0-9]")) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(time.time() % 0.2)  # any moment: within a step, within a write
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    seen = sorted(path.name for path in folder.glob("checkpoints/step-*[0-9]"))
    assert seen and "step-000060" not in seen, "the kill came too late to prove anything"
    run_script(script(folder, *options))
    assert digest(folder / "checkpoints/step-000060") == digest(whole)
    assert [line["step"] for line in lines(folder)] == list(range(1, 61))
    assert lines(folder) == lines(tmp_path / "whole")


def test_a_launch_that_takes_too_long_leaves_no_process(tmp_path: Path) -> None:
    sleeping = "import os, sys, time\nopen(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close()\ntime.sleep(300)\n"
    (tmp_path / "sleeping.py").write_text(sleeping)
    launch = [*script(tmp_path, processes=2)[:-2], str(tmp_path / "sleeping.py"), str(tmp_path)]
    process = psutil.Popen(launch, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.05)
    finally:
        kill_with_workers(process)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    assert not [pid for pid in workers if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Dropout too, since it is keyed by the place of a micro-batch in the order of the data."""
    one = train(tmp_path / "one", micro_batch_size=2, dropout=0.3)
    run_script(script(tmp_path / "two", "--micro", "2", "--dropout", "0.3", processes=2))
    nearly_equal(one, tmp_path / "two/checkpoints/step-000006")
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        assert math.isclose(first["loss"], second["loss"], rel_tol=1e-4)
        assert [t for t, _ in first["margins_by_timestep"]] == [t for t, _ in second["margins_by_timestep"]]


def test_weights_sharded_over_two_processes_are_trained_saved_whole_and_loaded(tmp_path: Path) -> None:
    """Raw ``fully_shard`` on gloo, going on from the checkpoint of a whole network half way."""
    options: dict[str, Any] = {"lora": False, "seat": "frozen", "micro_batch_size": 4}
    one = train(tmp_path / "one", **options)
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            algorithm(tmp_path / "two", lora=False, seat="frozen"),
            StoppingPairs(after=6),
            settings(micro_batch_size=4),
            tmp_path / "two",
        ).run()
    run_script(script(tmp_path / "two", "--micro", "4", "--full", "--shard", "--seat", "frozen", processes=2))
    nearly_equal(one, tmp_path / "two/checkpoints/step-000006", tolerance=2e-5)
    state = torch.load(tmp_path / "two/checkpoints/step-000006/policy.optimizer.pt", weights_only=True)
    shapes = {tuple(moments["exp_avg"].shape) for moments in state["state"].values()}
    assert (8, 3, 3, 3) in shapes and state["state"][0]["step"] == 6
