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


def paired_change(before: Sequence[float], after: Sequence[float], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Both means of a metric over the same S scenes, the mean difference and the ratio of the means, with bootstrap intervals
    that draw whole groups of scenes. There is no ratio (None) where ``before`` may be 0 on average."""
    difference, interval = bootstrap_mean([b - a for a, b in zip(before, after, strict=True)], seed=seed, clusters=groups)
    drawn = [resampled_means(values, seed=seed, clusters=groups) for values in (before, after)]
    divisible = bool((drawn[0] != 0).all())  # an F1 may be 0 everywhere
    return {
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "difference": difference,
        "difference_interval": list(interval),
        "ratio": float(np.mean(after) / np.mean(before)) if divisible else None,
        "ratio_interval": list(percentile_interval(drawn[1] / drawn[0])) if divisible else None,
    }
