"""The stop rule of over-optimisation, by itself and in the trainer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyalign.core import checkpoint as checkpoints
from polyalign.core.algorithm import DirectPreference
from polyalign.core.candidates import Batch
from polyalign.core.early_stop import TopKWatch, indicators
from polyalign.core.errors import UserError
from polyalign.core.objectives import Outcome
from polyalign.core.recipe import StopConfig
from polyalign.core.tracking import figures_of
from polyalign.core.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import TinyPairs, algorithm, settings  # noqa: E402  # pyright: ignore[reportMissingImports]


def config(**changes: Any) -> StopConfig:
    return StopConfig(**{"every": 1, "patience": 2, "smoothing": 0.0, **changes})


def watched(entropies: list[float], masses: list[float] | None = None, **changes: Any) -> list[int]:
    """Steps after which the watch says to stop."""
    watch = TopKWatch(config(**changes))
    masses = masses or [1.0] * len(entropies)
    said = [watch.saw(step, *both) for step, both in enumerate(zip(entropies, masses, strict=True), 1)]
    return [step for step, why in enumerate(said, 1) if why]


def test_entropy_that_rises_and_then_falls_stops_after_the_patience() -> None:
    assert watched([1.0, 1.2, 1.4, 1.3, 1.2, 1.1]) == [5, 6]
    assert watched([1.0, 1.2, 1.4, 1.3, 1.2, 1.1], patience=3) == [6]


def test_entropy_that_falls_from_the_beginning_or_wavers_does_not_stop() -> None:
    assert watched([1.0, 0.9, 0.8, 0.7, 0.6]) == []
    assert watched([1.0, 1.3, 1.2, 1.3, 1.2, 1.3]) == []
    assert watched([1.0, 1.1, 1.2, 1.3]) == []


def test_mass_that_falls_while_entropy_rises_stops() -> None:
    assert watched([1.0, 1.1, 1.2, 1.3], [0.95, 0.96, 0.93, 0.90]) == [4]
    assert watched([1.0, 1.1, 1.2, 1.3], [0.95, 0.96, 0.93, 0.90], mass_drop=0.2) == []
    assert watched([1.3, 1.2, 1.1, 1.0], [0.95, 0.96, 0.93, 0.80]) == []


def test_checks_are_means_of_their_steps_and_smoothed() -> None:
    watch = TopKWatch(config(every=2, smoothing=0.5))
    for step, entropy in enumerate([1.0, 3.0, 4.0, 4.0], 1):
        watch.saw(step, entropy, 1.0)
    assert watch.entropies == [2.0, 3.0]
    assert watched([1.0, 1.0, 2.0, 2.0, 1.8, 1.8, 1.6, 1.6], every=2) == [8]


def test_no_stop_before_its_time_and_figures_that_are_no_numbers_are_left_out() -> None:
    assert watched([1.0, 1.2, 1.4, 1.3, 1.2, 1.1], after=6) == [6]
    watch = TopKWatch(config())
    watch.saw(1, float("nan"), 1.0)
    assert watch.entropies == []


def test_the_reason_has_the_numbers() -> None:
    watch = TopKWatch(config())
    for step, entropy in enumerate([1.0, 1.4, 1.3, 1.2], 1):
        watch.saw(step, entropy, 1.0)
    assert watch.stopped is not None and "at step 4" in watch.stopped and "from 1.4000 to 1.2000" in watch.stopped


def test_the_figures_of_a_line_are_means_over_both_sides() -> None:
    line = {"top_k/entropy_chosen": 1.0, "top_k/entropy_rejected": 2.0, "top_k/mass_chosen": 0.8, "top_k/mass_rejected": 0.6}
    assert indicators(line) == (1.5, pytest.approx(0.7))
    assert indicators({"top_k/entropy_chosen": 1.0}) is None


def test_single_candidates_are_watched_too() -> None:
    statistics = {"top_k/entropy": torch.tensor([[1.0], [2.0]]), "top_k/mass": torch.tensor([[0.7], [0.9]])}
    assert indicators(figures_of(statistics)) == (1.5, pytest.approx(0.8))


class Scripted(DirectPreference):
    """The real algorithm of the tiny training, with an entropy that is written down: rising to step 3, then falling."""

    def step(self, batch: Batch, *, step: int) -> dict[str, Outcome]:
        (outcome,) = super().step(batch, step=step).values()
        entropy = 1.0 + min(step, 6 - step) / 10

        def two(value: float) -> Tensor:
            return torch.full((len(batch), 2), value)

        added: Mapping[str, Tensor] = {"top_k/entropy": two(entropy), "top_k/mass": two(0.9)}
        return {"policy": Outcome(outcome.loss, {**outcome.statistics, **added})}


def scripted(folder: Path) -> DirectPreference:
    made = algorithm(folder)
    made.__class__ = Scripted
    return made


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_trainer_ends_with_a_checkpoint_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = settings(stop=config(), steps=9, save_every=4, log_every=2)
    summary = Trainer(scripted(tmp_path), TinyPairs(), stop, tmp_path).run()
    assert summary.last_step == 5 and summary.steps == 5 and summary.stopped is not None
    assert summary.checkpoint == tmp_path / "checkpoints/step-000005"
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    assert "ended early by train.stop: at step 5 the entropy" in capsys.readouterr().err


def test_a_stopped_run_stays_stopped_and_one_that_was_killed_stops_at_the_same_step(tmp_path: Path) -> None:
    stop = settings(stop=config(), steps=9, save_every=2)
    Trainer(scripted(tmp_path), TinyPairs(), stop, tmp_path).run()
    again = Trainer(scripted(tmp_path), TinyPairs(), stop, tmp_path).run()
    assert again.steps == 0 and again.last_step == 5 and again.stopped is not None
    checkpoints_of = tmp_path / "checkpoints"
    for file in (checkpoints_of / "step-000005").iterdir():
        file.unlink()
    (checkpoints_of / "step-000005").rmdir()
    resumed = Trainer(scripted(tmp_path), TinyPairs(), stop, tmp_path).run()
    newest = checkpoints.latest(checkpoints_of)
    assert resumed.steps == 1 and resumed.last_step == 5 and newest is not None and newest.step == 5


def test_a_model_without_these_figures_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.stop watches top_k/entropy and top_k/mass, which this run does not compute"):
        Trainer(algorithm(tmp_path), TinyPairs(), settings(stop=config()), tmp_path).run()
