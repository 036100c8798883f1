"""lidar_metrics.json: metrics of completed scenes as LiDiff and Distillation-DPO compute them, with their faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from golden_adapters.cases import Case, agree

from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances, precision_recall, precision_recall_area
from polyalign.evaluation.lidar_metrics.occupancy import Compat, confusion, jensen_shannon
from polyalign.evaluation.lidar_metrics.transport import repo_emd


def _check(case: Case) -> None:
    gt, pred = np.array(case.inputs["gt"]), np.array(case.inputs["pred"])
    outputs, params = case.outputs, case.params
    distances = nearest_distances(pred, gt)
    agree("chamfer", chamfer(distances), outputs["chamfer"])
    agree("rmse_field", chamfer(distances, direction="pred_to_gt"), outputs["rmse_field"])
    for suffix, found in (("auc", precision_recall_area(distances)), ("at_0.1", precision_recall(distances, 0.1))):
        for name in ("precision", "recall", "f1"):
            agree(f"{name}_{suffix}", 100 * getattr(found, name), outputs[f"{name}_{suffix}"])
    grid = {"voxel": params["jsd_voxel"], "max_range": params["jsd_range"]}
    agree("jsd_3d", jensen_shannon(pred, gt, **grid), outputs["jsd_3d"], atol=1e-7)
    agree("jsd_bev", jensen_shannon(pred, gt, bev=True, **grid), outputs["jsd_bev"], atol=1e-7)
    _overlap(case, pred, gt, "lidiff", "fixed")
    _overlap(case, pred, gt, "lidiff_old", "old")
    settings = params["emd"]
    emd = repo_emd(
        pred, gt, voxel=settings["voxel"], epsilon=settings["epsilon"], max_iterations=settings["max_iter"],
        tolerance=settings["tol"],
    )  # fmt: skip
    assert emd is not None
    agree("emd", emd, outputs["emd_sinkhorn_repo"])


def _overlap(case: Case, pred: np.ndarray, gt: np.ndarray, compat: Compat, suffix: str) -> None:
    for row, voxel in enumerate(case.params["iou_voxel_sizes"]):
        found = confusion(pred, gt, voxel, compat=compat)
        counts = [found.true_positive, found.false_negative, found.false_positive]
        assert counts == case.outputs[f"confusion_{suffix}_tp_fn_fp"][row]
        agree("iou", found.iou, case.outputs[f"iou_{suffix}"][str(voxel)])


METHODS: dict[str, Callable[[Case], None]] = {"lidar_metrics": _check}
NOT_IN_PLACE: dict[str, str] = {}
