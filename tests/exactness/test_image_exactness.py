"""What must always hold of a training, on a Stable Diffusion XL in small, from the recipe to the exported file."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyalign.core.algorithm import DirectPreference
from polyalign.core.config import load
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import build
from polyalign.core.references import AdapterOff
from polyalign.core.run import RunFolder
from polyalign.core.trainer import Trainer
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.image import stages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "image"))

from image_runs import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    LORA,
    digest,
    environment,
    lines,
    only_generated,
    polyalign,
    recipe,
    save_base,
    script,
    write_recipe,
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a run folder with its pairs: eight prompts, so that a batch of eight has eight different pairs."""
    root = tmp_path_factory.mktemp("exactness")
    content = recipe(save_base(root / "base"))
    content["pairs"]["prompts"]["count"] = 8
    content["pairs"]["prompts_per_shard"] = 2
    content["train"] |= {"batch_size": 8, "micro_batch_size": 8, "save_every": 1}
    content["train"]["schedule"] = {"name": "cosine", "warmup_steps": 1}
    content["prepare"] = {"caption_dropout": 0.2}
    config = write_recipe(root, content)
    assert polyalign("generate", config, root / "pairs_only") == 0
    return config, root / "pairs_only"


@pytest.fixture(scope="module")
def whole(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training in this process."""
    config, pairs = generated
    run = only_generated(pairs, tmp_path_factory.mktemp("whole") / "run")
    assert polyalign("train", config, run) == 0
    return run


def nearly_equal(one: Path, other: Path) -> None:
    """Equal but for the rounding of float32 sums. Adam's first steps are learning rate * sign where a gradient is nearly zero,
    so single weights may differ by steps; the mean may not."""
    first, second = load_file(one / LORA), load_file(other / LORA)
    assert first.keys() == second.keys()
    difference = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert difference.max() < 3e-3 and difference.mean() < 2e-6
    for line, twin in zip(lines(one), lines(other), strict=True):
        assert line.keys() == twin.keys()
        assert [t for t, _ in line["margins_by_timestep"]] == [t for t, _ in twin["margins_by_timestep"]]
        assert math.isclose(line["loss"], twin["loss"], rel_tol=1e-3)
        assert math.isclose(line["error/policy_chosen"], twin["error/policy_chosen"], rel_tol=1e-5)


def test_the_first_step_is_exactly_the_loss_at_zero(whole: Path) -> None:
    first = lines(whole)[0]
    assert first["loss"] == torch.tensor(math.log(2.0)).item()  # ln 2 in float32
    assert first["rewards/margins"] == 0.0
    assert [margin for _, margin in first["margins_by_timestep"]] == [0.0] * 8
    assert first["error/policy_chosen"] == first["error/reference_chosen"]
    assert first["error/policy_rejected"] == first["error/reference_rejected"]
    assert first["gradient_weight"] == 0.5
    assert lines(whole)[-1]["rewards/margins"] != 0.0


def test_micro_batches_of_one_are_one_batch_of_eight(generated: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    config, pairs = generated
    cut = only_generated(pairs, tmp_path / "cut")
    assert polyalign("train", config, cut, "train.micro_batch_size=1") == 0
    nearly_equal(whole, cut)


def live_with_bank(config: Path, run: Path, *overrides: str, draws: int) -> Path:
    """The training of a recipe against the live reference, but with the draws of a bank of ``draws``: what a cached one has."""
    settings, _ = load(config, overrides, stages.SCHEMA)
    adapter, model = stages.open_model(settings, RunFolder(run))
    model = adapter.trainable(model)
    algorithm = DirectPreference(
        adapter,
        model,
        build(settings.objective),
        Beta.of(settings.objective.beta),
        {"reference": AdapterOff(model.network)},
        draw_bank=draws,
        seed=settings.seed,
    )
    Trainer(algorithm, PairStore(run / "pairs"), settings.train, run, seed=settings.seed).run()
    adapter.export(model, run / "adapter")
    return run


def test_a_cached_reference_is_the_live_one(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """The same figures to the last digit, and the same file; also when the cache is full from the beginning."""
    config, pairs = generated
    cached = ("train.reference.seat=cached", "train.reference.draws_per_pair=2", "train.steps=4")
    filling = only_generated(pairs, tmp_path / "filling")
    assert polyalign("train", config, filling, *cached) == 0
    full = only_generated(pairs, tmp_path / "full")
    (filling / "cache" / "reference").rename(tmp_path / "reference")
    (full / "cache").mkdir()
    (tmp_path / "reference").rename(full / "cache" / "reference")
    assert polyalign("train", config, full, *cached) == 0
    live = live_with_bank(config, only_generated(pairs, tmp_path / "live"), "train.steps=4", draws=2)
    assert len(lines(live)) == 4
    assert lines(live) == lines(filling) == lines(full)
    assert digest(live / LORA) == digest(filling / LORA) == digest(full / LORA)


def test_two_processes_are_one(generated: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    config, pairs = generated
    two = only_generated(pairs, tmp_path / "two")
    command = script(config, two, "train.micro_batch_size=4", processes=2)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    nearly_equal(whole, two)


def kill_when(command: list[str], reached: Callable[[], bool], delay: float) -> None:
    """Start a command, and SIGKILL it ``delay`` seconds after it got so far."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not reached() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_killed_at_a_random_moment_and_run_again_is_uninterrupted(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint every step; killed within or between two steps, drawn from a fixed seed."""
    config, pairs = generated
    steps, draw = "train.steps=30", random.Random(20)
    uninterrupted = only_generated(pairs, tmp_path / "uninterrupted")
    assert polyalign("train", config, uninterrupted, steps) == 0
    killed = only_generated(pairs, tmp_path / "killed")
    folder = killed / "checkpoints" / f"step-{draw.randint(2, 20):06d}"
    kill_when(script(config, killed, steps), folder.exists, draw.random() * 0.03)
    assert not (killed / LORA).exists()
    assert polyalign("train", config, killed, steps) == 0
    assert digest(killed / LORA) == digest(uninterrupted / LORA)
    assert lines(killed) == lines(uninterrupted)


def test_the_same_recipe_gives_the_same_bytes(generated: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """Also without a cache of latents and text states on disk."""
    config, pairs = generated
    again = only_generated(pairs, tmp_path / "again")
    assert polyalign("train", config, again, "prepare.cache=false") == 0
    assert not (again / "cache").exists()
    assert digest(again / LORA) == digest(whole / LORA)
    assert lines(again) == lines(whole)


def test_generation_killed_and_run_again_is_uninterrupted(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed with SIGKILL after its first shard; the store ends with the bytes of the one that was made at once."""
    config, pairs = generated
    store = tmp_path / "killed" / "pairs"
    command = [sys.executable, "-m", "polyalign", "generate", str(config), "--run", str(store.parent)]
    kill_when(command, (store / "samples-00000.parquet").exists, 0.0)
    assert not (store / "summary.json").exists()
    assert polyalign("generate", config, store.parent) == 0
    files = {path.name: digest(path) for path in (pairs / "pairs").iterdir()}
    assert len(files) == 10  # four shards of pairs, four of samples, generation.json, summary.json
    assert {path.name: digest(path) for path in store.iterdir()} == files
