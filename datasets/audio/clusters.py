"""Prompts of many kinds out of many prompts: k-means of their embeddings, and as many of each cluster.

Tango 2 took 200 clusters of AudioCaps' captions (embedded by gte-large) and 70 captions of each (arXiv 2404.09956).

Letters: N prompts, D width of an embedding.
"""

from __future__ import annotations

import numpy as np

from polyalign.core.randomness import seed_of

ROUNDS = 100


def clusters_of(embeddings: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """(N,) the cluster of each row of ``embeddings`` (N, D): k-means with k-means++ starts, until nothing moves.

    Raises:
        ValueError: more clusters than rows.
    """
    points = np.asarray(embeddings, dtype=np.float64)
    if not 1 <= count <= len(points):
        raise ValueError(f"{count} clusters of {len(points)} embeddings; from 1 to their number is possible")
    centres = points[_starts(points, count, np.random.default_rng(seed_of(seed, "clusters")))]
    labels = np.full(len(points), -1)
    for _ in range(ROUNDS):
        moved = _squared(points, centres).argmin(axis=1)
        if (moved == labels).all():
            break
        labels = moved
        for cluster in np.unique(labels):
            centres[cluster] = points[labels == cluster].mean(axis=0)
    return labels


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, K) squared distances, up to a constant of each row."""
    return (centres**2).sum(axis=1) - 2 * points @ centres.T


def _starts(points: np.ndarray, count: int, draws: np.random.Generator) -> list[int]:
    """Rows far from one another: each is drawn with its squared distance to the nearest one before."""
    chosen = [int(draws.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(points), 1 / len(points))
        chosen.append(int(draws.choice(len(points), p=share)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def spread(embeddings: np.ndarray, clusters: int, per_cluster: int, *, seed: int) -> list[int]:
    """Rows of ``embeddings``, at most ``per_cluster`` of each cluster by a keyed draw, in their order."""
    labels = clusters_of(embeddings, clusters, seed=seed)
    draws = np.random.default_rng(seed_of(seed, "of each cluster"))
    kept: list[int] = []
    for cluster in range(clusters):
        members = np.flatnonzero(labels == cluster)
        kept += draws.permutation(members)[:per_cluster].tolist()
    return sorted(kept)
