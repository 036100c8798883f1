"""Metrics of completed scenes: numbers worked out by hand, identities, brute force, and bad clouds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from polyalign.core.errors import UserError
from polyalign.evaluation.lidar_metrics import transport
from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances, precision_recall, precision_recall_area
from polyalign.evaluation.lidar_metrics.occupancy import Confusion, confusion, jensen_shannon
from polyalign.evaluation.lidar_metrics.scenes import SceneMetrics, compare, measure, summarise
from polyalign.evaluation.lidar_metrics.transport import earth_movers, repo_emd


def street(points: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform([-20, -20, -2], [20, 20, 2], size=(points, 3))


class TestDistances:
    def test_by_hand(self) -> None:
        """Predicted 0 and 3, true 1: distances 1, 2 and 1."""
        found = nearest_distances(np.array([[0.0, 0, 0], [3, 0, 0]]), np.array([[1.0, 0, 0]]))
        assert chamfer(found) == pytest.approx((1.5 + 1) / 2)
        assert chamfer(found, squared=True) == pytest.approx((2.5 + 1) / 2)
        assert chamfer(found, direction="pred_to_gt") == 1.5 and chamfer(found, direction="gt_to_pred") == 1
        at = precision_recall(found, 1.5)
        assert (at.precision, at.recall, at.f1) == (0.5, 1.0, pytest.approx(2 / 3))
        assert precision_recall(found, 1.0).f1 == 0  # strictly nearer

    def test_against_all_pairs(self) -> None:
        pred, gt = street(), street(300, 1)
        every = cdist(pred, gt)
        found = nearest_distances(pred, gt)
        np.testing.assert_allclose(found.pred_to_gt, every.min(axis=1))
        np.testing.assert_allclose(found.gt_to_pred, every.min(axis=0))

    def test_areas(self) -> None:
        exact = precision_recall_area(nearest_distances(street(), street()))
        assert (exact.precision, exact.recall, exact.f1) == pytest.approx((1, 1, 1))
        shifted = precision_recall_area(nearest_distances(street() + [0, 0, 0.075], street()))
        assert shifted.f1 == pytest.approx(0.5, abs=0.01)


class TestOccupancy:
    def test_distance_of_histograms(self) -> None:
        assert jensen_shannon(street(), street()) == 0
        apart = jensen_shannon(street(), street() + [0.0, 0, 10])
        assert apart == pytest.approx(np.sqrt(np.log(2)))
        assert jensen_shannon(street(), street() + [0.0, 0, 10], base=2) == pytest.approx(1)
        assert jensen_shannon(street(), street() + [0.0, 0, 10], bev=True) < 0.5

    def test_from_above_counts_voxels_and_not_points(self) -> None:
        one, many = np.array([[0.1, 0.1, 0.1], [2.1, 0.1, 0.1]]), np.array([[0.1, 0.1, 0.1]] * 9 + [[2.1, 0.1, 0.1]])
        assert jensen_shannon(one, many, bev=True) == 0 and jensen_shannon(one, many) > 0.2

    def test_overlap_by_hand(self) -> None:
        gt, pred = np.array([[0.1, 0, 0], [1.1, 0, 0], [60.0, 0, 0]]), np.array([[0.9, 0.9, 0.9], [2.5, 0, 0]])
        assert confusion(pred, gt, 1.0) == Confusion(1, 2, 1)
        assert confusion(pred, gt, 1.0, compat="lidiff") == Confusion(1, 1, 1)  # beyond 50 m nothing counts
        assert Confusion(1, 2, 1).iou == 0.25 and Confusion(0, 0, 0).iou == 0

    def test_the_old_overlap_sees_only_the_middle(self) -> None:
        far = street() * 0.1 + [30.0, 0, 0]
        assert confusion(far, far, 0.5).iou == 1
        assert confusion(far, far, 0.5, compat="lidiff_old").union == 0

    def test_sets_against_dense_histograms(self) -> None:
        pred, gt, size = street(2000), street(2000, 1), 0.7
        bins, cube = int(100 / size), [(-50.0, 50.0)] * 3
        dense = [np.histogramdd(cloud, bins=bins, range=cube)[0] > 0 for cloud in (pred, gt)]
        expected = Confusion(
            int((dense[0] & dense[1]).sum()), int((~dense[0] & dense[1]).sum()), int((dense[0] & ~dense[1]).sum())
        )
        assert confusion(pred, gt, size, compat="lidiff") == expected


class TestTransport:
    def test_a_shift_is_its_length(self) -> None:
        found = earth_movers(street() + [3.0, 0, 4], street(), voxel=None)
        assert found.exact and found.cost == pytest.approx(5) and found.lower == found.cost

    def test_unequal_masses(self) -> None:
        """Half of the mass moves by 2 m."""
        pred, gt = np.array([[0.5, 0.5, 0.5], [2.5, 0.5, 0.5]]), np.array([[0.5, 0.5, 0.5]])
        found = earth_movers(pred, gt)
        assert found.exact and found.cost == pytest.approx(1)

    def test_bounds_hold_the_exact_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pred, gt = street(150), street(150, 1) + [1.0, 0, 0]
        exact = earth_movers(pred, gt, voxel=4.0)
        assert exact.exact
        monkeypatch.setattr(transport, "EXACT_PAIRS", 0)
        found = earth_movers(pred, gt, voxel=4.0, epsilon=0.002, max_iterations=2000)
        assert not found.exact and found.lower <= exact.cost * (1 + 1e-9) <= found.cost * (1 + 2e-9)
        assert found.cost < 1.05 * exact.cost and found.lower > 0.9 * exact.cost

    def test_too_many_pairs(self) -> None:
        with pytest.raises(UserError, match="take a larger voxel"):
            earth_movers(street(), street(300, 1), voxel=None, max_pairs=1000)

    def test_the_published_number_is_far_off(self) -> None:
        pred, gt = street(), street() + [0.6, 0, 0]
        value = repo_emd(pred, gt)
        assert value is not None and value > 5 * earth_movers(pred, gt, voxel=None).cost


class TestScenes:
    def test_row(self) -> None:
        row = measure(street(), street(500, 1), refined=street(900, 2), metrics=SceneMetrics(iou_voxels=(2.0, 0.5)))
        assert row["cd"] == pytest.approx((row["cd_pred_to_gt"] + row["cd_gt_to_pred"]) / 2)
        assert row["refined_cd_gt_to_pred"] < row["cd_gt_to_pred"]
        assert Confusion(*row["voxels_2"]).iou == row["iou_2"] and "emd" not in row and "refined_iou_0.5" in row
        assert row["cd"] == chamfer(nearest_distances(street(), street(500, 1)))

    def test_published_emd_leaves_zeros_out(self) -> None:
        old = SceneMetrics(emd=True, compat="lidiff_old", iou_voxels=())
        point = np.array([[1.0, 1.0, 1.0]])
        assert "emd" not in measure(point, point, metrics=old)
        ours = measure(point, point + 0.7, metrics=SceneMetrics(emd=True, iou_voxels=()))
        assert ours["emd"] == ours["emd_lower"] == 0 and measure(street(), point, metrics=old)["emd"] > 0

    def test_summary_is_micro_averaged_and_holds_its_mean(self) -> None:
        rows = [
            measure(street(seed=seed), street(seed=seed + 50), metrics=SceneMetrics(iou_voxels=(4.0,))) for seed in range(6)
        ]
        found = summarise(rows, seed=0)
        assert found["cd"].mean == pytest.approx(np.mean([row["cd"] for row in rows])) and found["cd"].scenes == 6
        assert found["cd"].interval[0] <= found["cd"].mean <= found["cd"].interval[1]
        counts = np.sum([row["voxels_4"] for row in rows], axis=0)
        assert found["iou_4"].mean == counts[0] / counts.sum()
        assert found["iou_4"].interval[0] <= found["iou_4"].mean <= found["iou_4"].interval[1]
        assert not any(name.startswith("voxels_") for name in found) and found == summarise(rows, seed=0)

    def test_paired_comparison(self) -> None:
        base = [measure(street(seed=seed), street(seed=seed + 50)) for seed in range(5)]
        better = [row | {"cd": row["cd"] - 0.1} for row in base]
        found = compare(base, better, seed=0)
        assert found["cd"].mean == pytest.approx(-0.1) and found["cd"].interval == pytest.approx((-0.1, -0.1))
        assert found["jsd_bev"].mean == 0
        with pytest.raises(ValueError, match="the same scenes"):
            compare(base, better[1:], seed=0)

    @pytest.mark.parametrize(
        ("pred", "message"),
        [
            (np.zeros((0, 3)), "the prediction is empty"),
            (np.array([[0.0, np.nan, 0.0]]), "1 of the 1 points of the prediction are NaN"),
            (np.zeros((4, 2)), r"\(N, 3\), found \(4, 2\)"),
            (np.full((4, 3), 70.0), "no point of the prediction lies within 50"),
        ],
    )
    def test_bad_clouds(self, pred: np.ndarray, message: str) -> None:
        with pytest.raises(UserError, match=message):
            measure(pred, street())
