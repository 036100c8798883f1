"""How different the outputs of one prompt are: what over-optimisation takes first, and no judge of single outputs sees.

Letters: N outputs, D features of an output, n outputs of one prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy.spatial.distance import pdist

from polyalign.core.randomness import seed_of
from polyalign.evaluation.statistics import bootstrap_mean

THUMBNAIL = 16
"""Side, in pixels, of the pictures that are compared where no network gives features."""

Metric = Literal["cosine", "rms"]


def thumbnails(pictures: Sequence[Image.Image], side: int = THUMBNAIL) -> np.ndarray:
    """(N, side * side * 3) RGB in [0, 1]: features for the metric ``rms`` that need no network. They see colours and layout."""
    small = [picture.convert("RGB").resize((side, side), Image.Resampling.BOX) for picture in pictures]
    return np.stack([np.asarray(picture, dtype=np.float64).reshape(-1) / 255 for picture in small])


def pairwise(features: np.ndarray, metric: Metric) -> float:
    """Mean distance of every two rows of (n, D), n >= 2: ``cosine`` 1 - cos, for embeddings; ``rms`` the root mean square
    difference, for :func:`thumbnails`.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"{count} outputs have no distances between them")
    if metric == "rms":
        return float(pdist(features).mean() / np.sqrt(features.shape[1]))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float((1 - unit @ unit.T)[np.triu_indices(count, 1)].mean())


def vendi(features: np.ndarray) -> float:
    """The Vendi score (Friedman and Dieng, arXiv 2210.02410) of (n, D) with the cosine as similarity: exp of the entropy of the
    eigenvalues of K / n. An effective number of different outputs, from 1 (all alike) to n (all orthogonal)."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def by_prompt(features: np.ndarray, prompts: Sequence[Hashable], metric: Metric) -> dict[Hashable, float]:
    """:func:`pairwise` of the outputs of each prompt; prompts with a single output are left out.

    Raises:
        ValueError: another number of prompts than of features.
    """
    if len(features) != len(prompts):
        raise ValueError(f"{len(features)} features for {len(prompts)} prompts")
    places: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    return {prompt: pairwise(features[own], metric) for prompt, own in places.items() if len(own) > 1}


def compare_diversity(
    base: np.ndarray, aligned: np.ndarray, prompts: Sequence[Hashable], *, metric: Metric, seed: int
) -> dict[str, Any]:
    """Diversity within a prompt of two models on the same prompts.

    Args:
        base, aligned: features (N, D) of their outputs; row i of both is of ``prompts[i]``.
        seed: keys the bootstrap over prompts.

    Returns:
        ``base`` and ``aligned``, means over prompts; ``change``, mean of aligned less base, with its 95 % ``interval``;
        ``prompts``, how many have two outputs or more. Empty if there are none.
    """
    before, after = by_prompt(base, prompts, metric), by_prompt(aligned, prompts, metric)
    if not before:
        return {}
    change, interval = bootstrap_mean([after[prompt] - before[prompt] for prompt in before], seed=seed_of(seed, "diversity"))
    return {
        "metric": metric,
        "prompts": len(before),
        "base": float(np.mean(list(before.values()))),
        "aligned": float(np.mean(list(after.values()))),
        "change": change,
        "interval": list(interval),
    }
