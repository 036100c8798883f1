"""Distil the embedded base: ``python -m polyalign.modalities.lidar.distil BASE FOLDER``.

Two students of one teacher, by Distillation-DPO and by plain score distillation, in equally many steps from the same start on
the same scenes; then both, and the teacher, on streets that are held out, in 1, 2 and 8 steps. Writes ``students/NAME`` (a
training's folder and ``completion.safetensors``), ``distillation.json`` and ``clouds.html``. A killed run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.trainer import Trainer
from polyalign.evaluation.report.clouds import CloudScene, clouds_page
from polyalign.modalities.lidar.algorithm import (
    STUDENT,
    DistillationPreference,
    DistillationSettings,
    distillation_optimizers,
)
from polyalign.modalities.lidar.checkpoints import CompletionNetworks, open_completion, save_completion
from polyalign.modalities.lidar.measuring import compared, completions, ground_truth, qualities
from polyalign.modalities.lidar.pretrain import WEIGHTS, completion_settings
from polyalign.modalities.lidar.scenes import Scene, SceneRows, SceneSettings, scenes

OBJECTIVES = {"distillation_dpo": True, "score_distillation": False}
TEACHER = "teacher"


@dataclass(frozen=True)
class Settings:
    """Args:
    steps: of a student's training, half of them the assistants'.
    rate, assistant_ratio: learning rate of the student, and the assistants' relative to it.
    courses: numbers of steps that the students are trained for.
    evaluated: numbers of steps that all are measured in.
    """

    seed: int = 0
    steps: int = 120
    batch: int = 4
    rate: float = 3e-4
    assistant_ratio: float = 5.0
    loser_weight: float = 0.3
    courses: tuple[int, ...] = (1, 2)
    evaluated: tuple[int, ...] = (1, 2, 8)
    streets: int = 40
    measured_streets: int = 13
    shown: int = 4
    scenes: SceneSettings = field(default_factory=SceneSettings)


def student_of(
    base: CompletionNetworks, preference: bool, given: Sequence[Scene], settings: Settings, folder: Path, identity: str
) -> CompletionNetworks:
    """Train a student, or go on with one, and write it to ``folder``."""
    how = DistillationSettings(
        preference=preference,
        completion=completion_settings(1, settings.scenes),
        courses=settings.courses,
        loser_weight=settings.loser_weight,
    )
    algorithm = DistillationPreference(base.denoiser, base.encoder, how, seed=settings.seed)
    train = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch,
        micro_batch_size=settings.batch,
        optimizer=OptimizerConfig(learning_rate=settings.rate, betas=(0.9, 0.99), weight_decay=0.0),
        save_every=20,
    )
    rates = distillation_optimizers(train.optimizer, settings.assistant_ratio)
    known = {"base": identity, "distillation": asdict(how), "scenes": asdict(settings.scenes)}
    Trainer(
        algorithm, SceneRows(given, settings.scenes), train, folder, seed=settings.seed, identity=known, optimizers=rates
    ).run()
    save_completion(folder / WEIGHTS, algorithm.networks[STUDENT], base.encoder)
    return open_completion(folder / WEIGHTS)


def distil(base: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """Train both students, measure, and write the record, which is returned.

    Raises:
        UserError: no base; training that diverges; a folder of other settings.
    """
    given = scenes("train", range(settings.streets), settings.scenes, seed=settings.seed)
    held_out = scenes("heldout", range(settings.measured_streets), settings.scenes, seed=settings.seed)
    identity = json.loads((base / "base.json").read_text(encoding="utf-8"))["sha256"]
    models = {TEACHER: open_completion(base / WEIGHTS)}
    for name, preference in OBJECTIVES.items():
        work = folder / "students" / name
        models[name] = student_of(open_completion(base / WEIGHTS), preference, given, settings, work, identity)
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    clouds: dict[str, list[np.ndarray]] = {}
    for name, model in models.items():
        rows[name] = {}
        for steps in settings.evaluated:
            how = completion_settings(steps, settings.scenes)
            made = completions(model.denoiser, model.encoder, held_out, how, settings.seed)
            rows[name][str(steps)] = qualities(made, held_out, settings.seed)
            clouds[f"{name} in {steps}"] = made[: settings.shown]
    record = {"settings": asdict(settings), "base": identity, "scenes": len(held_out), "compared": _comparisons(rows, held_out)}
    atomic_write(folder / "distillation.json", json.dumps(record | {"rows": rows}, indent=1) + "\n")
    atomic_write(folder / "clouds.html", _page(clouds, rows, held_out[: settings.shown], settings))
    return record


def _comparisons(rows: Mapping[str, Any], given: Sequence[Scene]) -> dict[str, Any]:
    """Each student with the teacher, and the two with each other, at each number of steps."""
    pairs = {f"{name} against {TEACHER}": (TEACHER, name) for name in OBJECTIVES}
    pairs["distillation_dpo against score_distillation"] = ("score_distillation", "distillation_dpo")
    return {
        said: {steps: compared(rows[before][steps], rows[after][steps], given, 0) for steps in rows[before]}
        for said, (before, after) in pairs.items()
    }


def _page(
    clouds: Mapping[str, Sequence[np.ndarray]], rows: Mapping[str, Any], given: Sequence[Scene], settings: Settings
) -> str:
    few, many = str(settings.evaluated[0]), str(settings.evaluated[-1])
    shown = [(TEACHER, few), *((name, few) for name in OBJECTIVES), (TEACHER, many)]
    found = []
    for place, scene in enumerate(given):
        views: dict[str, np.ndarray] = {"input": scene.scan}
        remarks = {}
        for name, steps in shown:
            label = f"{name} in {steps}"
            row = rows[name][steps][place]
            views[label] = clouds[label][place]
            remarks[label] = f"CD {row['cd']:.3f} m, JSD {row['jsd']:.3f}"
        views["ground truth"] = ground_truth(scene, settings.seed)
        found.append(CloudScene(scene.name, views, remarks))
    return clouds_page("Completed streets", found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="the folder that pretrain wrote")
    parser.add_argument("folder", type=Path, help="where students and the record go")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        record = distil(options.base, options.folder, Settings(seed=options.seed, steps=options.steps))
    except UserError as error:
        print(f"distil: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    for said, steps in record["compared"].items():
        for number, metrics in steps.items():
            for name, found in metrics.items():
                low, high = found["ratio_interval"]
                print(f"{said}, {number} steps, {name}: {found['before']:.3f} -> {found['after']:.3f} "
                      f"(ratio {found['ratio']:.2f}, {low:.2f} to {high:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
