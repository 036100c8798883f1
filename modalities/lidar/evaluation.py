"""Teacher, student and arms on held-out scans: completed from the same noise in the same numbers of steps, measured against the
same ground truth.

Rows are written as they come, ``samples/rows/MODEL-STEPS.jsonl``, a line a scan; an interrupted evaluation goes on after the
last whole batch. One batch of scans is in memory at a time.

Letters: S scans, B of them completed together, N points of a completion, M of a ground truth.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.samples import resampled
from polyalign.evaluation.lidar_metrics.occupancy import MAX_RANGE
from polyalign.evaluation.lidar_metrics.scenes import SceneMetrics, measure, summarise
from polyalign.evaluation.statistics import bootstrap_mean, paired_win_rate
from polyalign.modalities.lidar.checkpoints import CompletionNetworks, open_refinement
from polyalign.modalities.lidar.completion import complete, postprocess, refine
from polyalign.modalities.lidar.config import Distillation, LidarRecipe
from polyalign.modalities.lidar.data import SCENES, Scans, opened, splits_of
from polyalign.modalities.lidar.measuring import paired_change
from polyalign.modalities.lidar.minkunet import MinkUNet
from polyalign.modalities.lidar.training import completion_settings, device_of, open_networks, student_guidance

DECIDING, SECOND = "cd", "jsd_bev"
NAMES = {"cd": "chamfer distance", "jsd_bev": "jsd from above"}
COMPARED = ("cd", "jsd_bev", "jsd_3d", "f1")
BASE, ALIGNED = "base", "aligned"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """A model that takes part: its folder of weights (None is the base) and its guidance."""

    name: str
    label: str
    weights: Path | None
    guidance: float


def contenders_of(recipe: LidarRecipe, folder: Path) -> list[Contender]:
    """Base, aligned and arms, in this order."""
    distilled = isinstance(recipe.objective, Distillation)
    labels = ("teacher", "student") if distilled else (BASE, ALIGNED)
    found = [Contender(BASE, labels[0], None, recipe.sampler.guidance)]
    for place, objective in recipe.objectives().items():
        name = place.split("/")[1] if place else ALIGNED
        label = name if place else labels[1]
        found.append(Contender(name, label, folder / f"{place}adapter", student_guidance(recipe, objective)))
    return found


@dataclass(frozen=True)
class HeldOut:
    """Scans of an evaluation, and how they are measured."""

    recipe: LidarRecipe
    scans: Scans
    metrics: SceneMetrics
    refinement: MinkUNet | None

    @classmethod
    def of(cls, recipe: LidarRecipe, folder: Path) -> HeldOut:
        """``folder`` is the run's."""
        how, path = recipe.evaluate.metrics, recipe.evaluate.refinement
        metrics = SceneMetrics(
            how.f1_threshold,
            how.jsd_voxel,
            how.iou_voxels,
            max(MAX_RANGE, recipe.data.max_range),
            emd=how.emd,
            compat=how.compat,
        )
        refinement = None if path is None else open_refinement(Path(path).expanduser()).to(device_of(recipe))
        return cls(recipe, opened(recipe, folder / SCENES, splits_of(recipe)[1]), metrics, refinement)

    def seed(self, index: int) -> int:
        """Of a scan's noise, whichever model completes it."""
        return seed_of(self.recipe.seed, "measure", self.scans.names[index])

    def truth(self, index: int) -> np.ndarray:
        """(M, 3) float64, the same for every model."""
        found, points = self.scans.truth(index), self.recipe.evaluate.truth_points
        if points is not None:
            found = resampled(found, points, np.random.default_rng(seed_of(self.recipe.seed, "truth", self.scans.names[index])))
        return found.astype(np.float64)

    def untouched(self, index: int) -> dict[str, Any]:
        """The metrics of a scan itself, as if it were its completion: what completing has to better."""
        return measure(self.scans.scan(index).astype(np.float64), self.truth(index), metrics=self.metrics)

    def batches(self) -> list[range]:
        size, count = self.recipe.sampler.batch_size, len(self.scans.names)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @torch.no_grad()
    def completions(
        self, networks: CompletionNetworks, guidance: float, steps: int, batch: range
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(N, 3) float64 of each scan of a batch, and refined where there is a network for it."""
        scans = [self.scans.scan(index) for index in batch]
        device = next(networks.denoiser.parameters()).device
        how, seeds = completion_settings(self.recipe, steps, guidance), [self.seed(index) for index in batch]
        made = complete(networks.denoiser, networks.encoder, torch.from_numpy(np.stack(scans)).to(device), seeds, how)
        finer = refine(self.refinement, made, voxel=self.recipe.sampler.voxel) if self.refinement is not None else None
        return [
            (self._kept(made[place], scan), None if finer is None else self._kept(finer[place], scan))
            for place, scan in enumerate(scans)
        ]

    def _kept(self, cloud: Tensor, scan: np.ndarray) -> np.ndarray:
        points = cloud.double().cpu().numpy()
        return postprocess(points, scan, max_range=self.recipe.data.max_range) if self.recipe.sampler.postprocess else points


def measured(held: HeldOut, contender: Contender, steps: int, folder: Path) -> Rows:
    """A row of every scan, from ``folder/rows`` as far as they are there; clouds to be shown go to ``folder/clouds``."""
    file = folder / "rows" / f"{contender.name}-{steps}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, batches = _whole_rows(file), held.batches()
    done = sum(batch.stop <= len(rows) for batch in batches)
    rows = rows[: batches[done - 1].stop if done else 0]
    atomic_write(file, "".join(_line(row) for row in rows))
    if done == len(batches):
        return rows
    networks = open_networks(held.recipe, contender.weights)
    title = f"completing, {contender.label} in {steps}"
    with ProgressLine(title, total=len(held.scans.names), start=len(rows)) as line, open(file, "a", encoding="utf-8") as out:
        for batch in batches[done:]:
            made = held.completions(networks, contender.guidance, steps, batch)
            found = [_row(held, contender, steps, index, *one) for index, one in zip(batch, made, strict=True)]
            for index, (cloud, _) in zip(batch, made, strict=True):
                if index < held.recipe.evaluate.shown:
                    _write_cloud(folder, index, f"{contender.name}-{steps}", cloud)
            out.write("".join(_line(row) for row in found))
            out.flush()
            rows += found
            line.advance(count=len(batch))
    return rows


def _row(
    held: HeldOut, contender: Contender, steps: int, index: int, cloud: np.ndarray, finer: np.ndarray | None
) -> dict[str, Any]:
    name = held.scans.names[index]
    try:
        return {"scan": name} | measure(cloud, held.truth(index), refined=finer, metrics=held.metrics)
    except UserError as error:
        raise UserError(f"scan {name}, completed by {contender.label} in {steps} steps: {error}") from error


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _whole_rows(file: Path) -> Rows:
    """The rows of a file up to its last whole line."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def cloud_file(index: int, name: str) -> str:
    """Where a shown cloud lies, relative to ``samples``."""
    return f"clouds/{index:03d}-{name}.npy"


def _write_cloud(folder: Path, index: int, name: str, cloud: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, cloud.astype(np.float32))
    atomic_write(folder / cloud_file(index, name), content.getvalue())


def evaluate(recipe: LidarRecipe, folder: Path) -> dict[str, Any]:
    """Everything that goes into ``evaluation.json``; rows and clouds are written to ``samples/`` of the run's ``folder``.

    Raises:
        UserError: no scans; a completion without points.
    """
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    held, samples = HeldOut.of(recipe, folder), folder / "samples"
    contenders = contenders_of(recipe, folder)
    for index in range(min(recipe.evaluate.shown, len(held.scans.names))):
        _write_cloud(samples, index, "input", held.scans.scan(index))
        _write_cloud(samples, index, "truth", held.truth(index))
    table = {one.name: {steps: measured(held, one, steps, samples) for steps in recipe.evaluate.steps} for one in contenders}
    return _report(held, contenders, table) | {"completions": _completions(held, contenders, table)}


def _report(held: HeldOut, contenders: Sequence[Contender], table: Mapping[str, Mapping[int, Rows]]) -> dict[str, Any]:
    few = held.recipe.evaluate.steps[0]
    work = _Comparison(held, {name: rows[few] for name, rows in table.items()})
    base, aligned = work.scores(BASE), work.scores(ALIGNED)
    arms = [one.name for one in contenders if one.name not in (BASE, ALIGNED)]
    return {
        "judge": {"name": NAMES[DECIDING], "version": "1", "parts": [NAMES[DECIDING]]},
        "prompts": len(held.scans.names),
        "win_rate": work.win_rate(BASE, ALIGNED),
        "scores": {BASE: work.mean(BASE), ALIGNED: work.mean(ALIGNED)},
        "tasks": {},
        "other_judges": {
            NAMES[SECOND]: {**work.win_rate(BASE, ALIGNED, SECOND), "parts": [NAMES[SECOND]], "version": "1"},
        },
        "items": [
            {"prompt": name, "seed": held.seed(index), "base_score": base[index], "aligned_score": aligned[index]}
            for index, name in enumerate(held.scans.names)
        ],
        "arms": {
            name: {**work.win_rate(BASE, name), "scores": work.mean(name), "aligned_over_this": work.win_rate(name, ALIGNED)}
            for name in arms
        },
        "clouds": _clouds(held, contenders, table),
    }


@dataclass(frozen=True)
class _Comparison:
    """Rows of every model in one number of steps; a score is minus a distance."""

    held: HeldOut
    rows: Mapping[str, Rows]

    def scores(self, name: str, metric: str = DECIDING) -> list[float]:
        return [-float(row[metric]) for row in self.rows[name]]

    def win_rate(self, other: str, better: str, metric: str = DECIDING) -> dict[str, Any]:
        keyed = seed_of(self.held.recipe.seed, "evaluation", other, better, metric)
        sides = self.scores(other, metric), self.scores(better, metric)
        return paired_win_rate(*sides, seed=keyed, prompts=self.held.scans.groups).as_json()

    def mean(self, name: str) -> dict[str, Any]:
        keyed = seed_of(self.held.recipe.seed, "evaluation", "scores")
        mean, interval = bootstrap_mean(self.scores(name), seed=keyed, clusters=self.held.scans.groups)
        return {"mean": mean, "interval": list(interval)}


def _completions(held: HeldOut, contenders: Sequence[Contender], table: Mapping[str, Mapping[int, Rows]]) -> dict[str, Any]:
    """Means of all metrics, and what has changed between models, at each number of steps. Intervals of changes draw whole
    places; those of means draw scans."""
    labels = {one.name: one.label for one in contenders}
    pairs = [(BASE, one.name) for one in contenders[1:]] + [(one.name, ALIGNED) for one in contenders[2:]]
    seed = held.recipe.seed
    means = {
        name: {str(steps): _means([_numbers(row) for row in rows], seed) for steps, rows in by_steps.items()}
        for name, by_steps in table.items()
    }
    changes = [
        {
            "before": before,
            "after": after,
            "steps": {
                str(steps): {
                    metric: paired_change(
                        [row[metric] for row in table[before][steps]],
                        [row[metric] for row in table[after][steps]],
                        held.scans.groups,
                        seed,
                    )
                    for metric in COMPARED
                }
                for steps in held.recipe.evaluate.steps
            },
        }
        for before, after in pairs
    ]
    return {
        "scans": len(held.scans.names),
        "places": len(set(held.scans.groups)),
        "steps": list(held.recipe.evaluate.steps),
        "labels": labels,
        "input": _means([held.untouched(index) for index in range(len(held.scans.names))], seed),
        "means": means,
        "changes": changes,
    }


def _means(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    return {
        metric: {"mean": found.mean, "interval": list(found.interval)} for metric, found in summarise(rows, seed=seed).items()
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "scan"}


def _clouds(held: HeldOut, contenders: Sequence[Contender], table: Mapping[str, Mapping[int, Rows]]) -> list[dict[str, Any]]:
    """The clouds that the report shows, by their files: input, all models in the fewest steps, base and aligned in the next
    more, the base in the most, ground truth."""
    few, *more = held.recipe.evaluate.steps
    views = [(one, few) for one in contenders] + [(one, steps) for steps in more[:1] for one in contenders[:2]]
    views += [(contenders[0], steps) for steps in more[-1:] if len(more) > 1]
    found = []
    for index, name in enumerate(held.scans.names[: held.recipe.evaluate.shown]):
        shown = [{"label": "input", "file": f"samples/{cloud_file(index, 'input')}", "remark": ""}]
        for one, steps in views:
            row = table[one.name][steps][index]
            label = f"{one.label}, {steps} step{'s' if steps > 1 else ''}"
            remark = f"CD {row['cd']:.3f} m, JSD {row['jsd_bev']:.3f}"
            shown.append({"label": label, "file": f"samples/{cloud_file(index, f'{one.name}-{steps}')}", "remark": remark})
        shown.append({"label": "ground truth", "file": f"samples/{cloud_file(index, 'truth')}", "remark": ""})
        found.append({"name": name, "views": shown})
    return found
