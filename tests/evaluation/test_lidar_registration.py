"""Open3D, where it loads: an alignment found again; where it does not: what is said."""

from __future__ import annotations

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.lidar_metrics.registration import aligned, open3d, show


def corner() -> np.ndarray:
    points = np.random.default_rng(0).uniform(0, 10, (900, 3))
    for axis in range(3):
        points[300 * axis : 300 * (axis + 1), axis] = 0
    return points


def loads() -> bool:
    try:
        open3d("this test")
    except UserError:
        return False
    return True


LOADS = loads()


@pytest.mark.skipif(not LOADS, reason="needs Open3D")
def test_a_small_motion_is_found() -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.03), -np.sin(0.03)], [np.sin(0.03), np.cos(0.03)]]
    turn[:3, 3] = [0.1, -0.05, 0.08]
    moved = corner() @ turn[:3, :3].T + turn[:3, 3]
    found = aligned(corner(), moved)
    np.testing.assert_allclose(found.pose, turn, atol=1e-4)
    assert found.fitness == 1 and found.rmse < 1e-3


@pytest.mark.skipif(LOADS, reason="Open3D is there")
def test_missing_it_is_said() -> None:
    with pytest.raises(UserError, match=r"ICP needs .*(polyalign\[lidar\]|apt-get install)"):
        aligned(corner(), corner())
    with pytest.raises(UserError, match="a window of point clouds needs"):
        show({"corner": corner()})


def test_bad_clouds_are_refused_first() -> None:
    with pytest.raises(UserError, match="the source is empty"):
        aligned(np.zeros((0, 3)), corner())
    with pytest.raises(UserError, match="of the target are NaN"):
        aligned(corner(), np.full((2, 3), np.nan))
    with pytest.raises(UserError, match="the wall is empty"):
        show({"wall": np.zeros((0, 3))})
