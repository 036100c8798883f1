"""Earth mover's distance between two clouds: exact for small ones, otherwise between two proven bounds; and the published
number, which is none.

Letters: V voxels of the ground truth, W of the prediction, a (V,) and b (W,) their masses, C (V, W) distances in metres, P (V,
W) a transport plan with row sums a and column sums b. EMD = min over P of sum P C.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from polyalign.core.errors import UserError
from polyalign.evaluation.lidar_metrics.distances import checked_cloud

EXACT_PAIRS = 200_000
"""Pairs up to which the linear programme is solved exactly, in a few seconds at most."""
ASSIGNMENT_POINTS = 2_000
MAX_PAIRS = 100_000_000
_ABSORB = 10
_FALL = 3.0
_REPO_LIMIT = 130_000


@dataclass(frozen=True)
class Transport:
    """``cost``: of a plan that fulfils both sums exactly, hence never below the EMD. ``lower``: a proven lower bound. Where
    ``exact``, both are the EMD."""

    cost: float
    lower: float
    exact: bool


def voxel_masses(points: np.ndarray, voxel: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (V, 3) of the occupied voxels and the share of points in each (V,)."""
    cells, counts = np.unique(np.floor(points / voxel).astype(np.int64), axis=0, return_counts=True)
    return (cells + 0.5) * voxel, counts / counts.sum()


def earth_movers(
    pred: np.ndarray,
    gt: np.ndarray,
    *,
    voxel: float | None = 1.0,
    epsilon: float = 0.01,
    tolerance: float = 1e-2,
    max_iterations: int = 300,
    max_pairs: int = MAX_PAIRS,
) -> Transport:
    """The earth mover's distance in metres.

    Small problems are solved exactly: as an assignment for equally many points of equal mass, as a linear programme otherwise.
    Larger ones by Sinkhorn's algorithm in the log domain (Cuturi, NeurIPS 2013; Schmitzer, SIAM J. Sci. Comput. 41, 2019) with
    falling epsilon; its plan is rounded to fulfil both sums (Altschuler et al., NeurIPS 2017, algorithm 2), and its potentials,
    made feasible, give the lower bound.

    Args:
        voxel: points are gathered into voxels of this size; None takes the points themselves.
        epsilon: last regularisation, in units of the mean of C. Smaller is nearer to exact, and slower.
        tolerance: mass that may still be misplaced when the iteration stops.

    Raises:
        UserError: see :func:`checked_cloud`; or more than ``max_pairs`` pairs.
    """
    sides = []
    for points, name in ((gt, "ground truth"), (pred, "prediction")):
        cloud = checked_cloud(points, name)
        sides.append((cloud, np.full(len(cloud), 1 / len(cloud))) if voxel is None else voxel_masses(cloud, voxel))
    (gt_points, a), (pred_points, b) = sides
    pairs = len(a) * len(b)
    if pairs > max_pairs:
        raise UserError(
            f"the earth mover's distance would need {len(a)} x {len(b)} distances, more than {max_pairs}; take a larger voxel"
        )
    cost = cdist(gt_points, pred_points)
    if len(a) == len(b) <= ASSIGNMENT_POINTS and np.allclose(a, a[0]) and np.allclose(b, b[0]):
        value = float(cost[linear_sum_assignment(cost)].mean())
        return Transport(value, value, exact=True)
    if pairs <= EXACT_PAIRS:
        value = _linear_programme(cost, a, b)
        return Transport(value, value, exact=True)
    f, g = _sinkhorn(cost, a, b, epsilon * float(cost.mean()), tolerance, max_iterations)
    return _bounds(cost, a, b, f, g, epsilon * float(cost.mean()))


def _linear_programme(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    rows, columns = (index.ravel() for index in np.indices(cost.shape))
    variables = np.arange(cost.size)
    sums = coo_array(
        (np.ones(2 * cost.size), (np.concatenate([rows, len(a) + columns]), np.concatenate([variables, variables]))),
        shape=(len(a) + len(b), cost.size),
    ).tocsr()
    # One of the sums follows from the others; with rounding in both it would make the programme infeasible.
    answer = linprog(cost.ravel(), A_eq=sums[:-1], b_eq=np.concatenate([a, b])[:-1], method="highs")
    if not answer.success:
        raise RuntimeError(f"the transport problem was not solved: {answer.message}")
    return float(answer.fun)


def _sinkhorn(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, last: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Potentials (V,), (W,) of the regularised problem. Within a level of epsilon the iteration is on the scalings, which are
    matrix products, and is absorbed into the potentials every few steps, so that nothing under- or overflows."""
    f, g = np.zeros(len(a)), np.zeros(len(b))
    level = float(cost.mean())
    while True:
        # One update in the log domain gives every row its mass at this level; the scalings then start from numbers near one.
        f = -level * np.asarray(logsumexp((g - cost) / level, axis=1, b=b))
        rounds = 1 if level > last else max(1, max_iterations // _ABSORB)
        for _ in range(rounds):
            kernel = _plan(cost, a, b, f, g, level)
            u, v = np.ones(len(a)), np.ones(len(b))
            for _ in range(_ABSORB):
                v = b / np.maximum(u @ kernel, 1e-300)
                u = a / np.maximum(kernel @ v, 1e-300)
            f, g = f + level * np.log(u), g + level * np.log(v)
            if np.abs(v * (u @ kernel) - b).sum() < tolerance:
                break
        if level <= last:
            return f, g
        level = max(level / _FALL, last)


def _plan(cost: np.ndarray, a: np.ndarray, b: np.ndarray, f: np.ndarray, g: np.ndarray, level: float) -> np.ndarray:
    return np.exp((f[:, None] + g - cost) / level) * (a[:, None] * b)


def _bounds(cost: np.ndarray, a: np.ndarray, b: np.ndarray, f: np.ndarray, g: np.ndarray, level: float) -> Transport:
    plan = _plan(cost, a, b, f, g, level)
    plan *= np.minimum(1.0, a / np.maximum(plan.sum(axis=1), 1e-300))[:, None]
    plan *= np.minimum(1.0, b / np.maximum(plan.sum(axis=0), 1e-300))
    rest_a, rest_b = np.maximum(a - plan.sum(axis=1), 0), np.maximum(b - plan.sum(axis=0), 0)
    missing = rest_a.sum()
    upper = float((plan * cost).sum())
    if missing > 0:  # what is still to be moved goes as an independent coupling of the rests
        upper += float(rest_a @ cost @ rest_b) / float(missing)
    column = (cost - f[:, None]).min(axis=0)
    row = (cost - column).min(axis=1)
    return Transport(upper, max(0.0, float(a @ row + b @ column)), exact=False)


def repo_emd(
    pred: np.ndarray,
    gt: np.ndarray,
    *,
    voxel: float = 0.5,
    epsilon: float = 1e-3,
    max_iterations: int = 3000,
    tolerance: float = 1e-4,
) -> float | None:
    """What Distillation-DPO's utils/EMD.py returns, and its tables call EMD: for comparison with them only.

    Sinkhorn on K = exp(-C / epsilon) + 1e-9 with epsilon a millimetre: everything but voxels that coincide is at the floor of
    1e-9, so all other mass is spread as if the clouds had nothing to do with each other. The value is near the mean distance of
    any two points, and ranks models otherwise than an EMD does. None where both clouds together have more than 130,000 voxels.
    """
    # The prediction comes first: the iteration stops before it has converged, and the order shows in the fourth digit.
    pred_points, a = voxel_masses(checked_cloud(pred, "prediction"), voxel)
    gt_points, b = voxel_masses(checked_cloud(gt, "ground truth"), voxel)
    if len(a) + len(b) > _REPO_LIMIT:
        return None
    cost = cdist(pred_points, gt_points)
    kernel = np.exp(-cost / epsilon) + 1e-9
    u, v = np.ones_like(a), np.ones_like(b)
    for _ in range(max_iterations):
        before = u
        u = a / (kernel @ v)
        v = b / (u @ kernel)
        if np.abs(u - before).sum() < tolerance:
            break
    return float((u[:, None] * v * kernel * cost).sum())
