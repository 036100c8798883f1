"""Completions of small scenes against their ground truth, and two models on the same scenes, seeds and ground truths.

Letters: S scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyalign.core.randomness import seed_of
from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances
from polyalign.evaluation.lidar_metrics.occupancy import jensen_shannon
from polyalign.evaluation.statistics import bootstrap_mean, percentile_interval, resampled_means
from polyalign.modalities.lidar.completion import CompletionSettings, complete
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.scenes import Scene

METRICS = ("cd", "jsd")
TRUTH = 8_000
"""Points of a ground truth; the Chamfer distance of a good completion depends on it, so it is the same everywhere."""
BATCH = 8


def ground_truth(scene: Scene, seed: int) -> np.ndarray:
    """(TRUTH, 3) float64 of a scene's surroundings, the same for every model."""
    return scene.full(TRUTH, np.random.default_rng(seed_of(seed, "truth", scene.name))).astype(np.float64)


def quality(cloud: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """``cd``: Chamfer distance in metres, not squared; ``jsd``: Jensen-Shannon distance of the clouds seen from above."""
    return {"cd": chamfer(nearest_distances(cloud, truth)), "jsd": jensen_shannon(cloud, truth, bev=True)}


@torch.no_grad()
def completions(
    denoiser: MinkUNetDiff, encoder: MinkGlobalEnc, given: Sequence[Scene], settings: CompletionSettings, seed: int
) -> list[np.ndarray]:
    """(N, 3) float64 of each scene. Networks are put in evaluation mode."""
    denoiser.eval()
    encoder.eval()
    scans = torch.from_numpy(np.stack([scene.scan for scene in given]))
    seeds = [seed_of(seed, "measure", scene.name) for scene in given]
    parts: list[Tensor] = []
    for start in range(0, len(given), BATCH):
        part = slice(start, start + BATCH)
        parts.append(complete(denoiser, encoder, scans[part], seeds[part], settings))
    return list(torch.cat(parts).double().numpy())


def qualities(clouds: Sequence[np.ndarray], given: Sequence[Scene], seed: int) -> list[dict[str, float]]:
    """:func:`quality` of each scene's cloud."""
    return [quality(cloud, ground_truth(scene, seed)) for cloud, scene in zip(clouds, given, strict=True)]


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


def compared(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], given: Sequence[Scene], seed: int
) -> dict[str, Any]:
    """What has changed from ``before`` to ``after`` on the same S scenes: for each metric both means, the mean difference
    (below 0: better) and the ratio of the means, with bootstrap intervals over streets."""
    streets = [scene.name.rsplit("-", 1)[0] for scene in given]
    found: dict[str, Any] = {}
    for name in METRICS:
        first, second = ([row[name] for row in rows] for rows in (before, after))
        difference, interval = bootstrap_mean([b - a for a, b in zip(first, second, strict=True)], seed=seed, clusters=streets)
        drawn = [resampled_means(values, seed=seed, clusters=streets) for values in (first, second)]
        found[name] = {
            "before": float(np.mean(first)),
            "after": float(np.mean(second)),
            "difference": difference,
            "difference_interval": list(interval),
            "ratio": float(np.mean(second) / np.mean(first)),
            "ratio_interval": list(percentile_interval(drawn[1] / drawn[0])),
        }
    return found
