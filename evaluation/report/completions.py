"""The page's sections on completed scans: distances by number of steps, what changed, clouds to turn by hand, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.evaluation.report import charts
from polyalign.evaluation.report.charts import Line
from polyalign.evaluation.report.clouds import CloudScene, clouds_body
from polyalign.evaluation.report.collect import Metrics, ReportData
from polyalign.evaluation.report.markup import figures, foreign, note, number, table, text

METRICS = {
    "cd": ("Chamfer distance, m", False),
    "jsd_bev": ("JSD from above", False),
    "jsd_3d": ("JSD in 3-D", False),
    "f1": ("F1", True),
}
"""Name and whether more is better, of the metrics that are compared."""
FIRST_COLUMNS = ("cd", "jsd_bev", "jsd_3d", "f1")
MEASURED_SIZE_LIMIT = 64 * 2**20
PHASES = (
    ("distance/", "Distance of the student's samples", "distance to the ground truth"),
    ("student/score_gap", "Score differences", "mean |noise of teacher \u2212 noise of assistant|"),
    ("/error", "Assistants", "mean squared error of the noise"),
    ("student/gradient_norm", "Gradient norm of the student", "norm before clipping"),
    ("student/official_value", "The published scalar", "value, which has no gradient"),
)
"""What of a distillation's figures is drawn: part of the name, title, axis."""
COLOURS = ("policy", "chosen", "rejected", "plain")


def by_steps(block: Mapping[str, Any]) -> str:
    """Means of every model at each number of steps, and what changed between models on the same scans."""
    words = (
        f"All complete the same {text(block['scans'])} held-out scans of {text(block['places'])} places from the same noise "
        "and are measured against the same ground truth. Numbers in brackets are 95 % bootstrap intervals."
    )
    return f"<p>{words}</p>{''.join(_readings(block))}{_means(block)}{_changes(block)}"


def _means(block: Mapping[str, Any]) -> str:
    first = next(iter(next(iter(block["means"].values())).values()))
    columns = [name for name in FIRST_COLUMNS if name in first] + [name for name in first if name.startswith("iou_")]
    columns += [name for name in ("refined_cd", "refined_jsd_bev", "emd") if name in first]
    rows = []
    if "input" in block:
        rows.append(["the scan itself", *(_interval(block["input"][key]) if key in block["input"] else "" for key in columns)])
    for steps in block["steps"]:
        for name, means in block["means"].items():
            found = means[str(steps)]
            rows.append([f"{foreign(block['labels'][name], 60)}, {_steps(steps)}", *(_interval(found[key]) for key in columns)])
    head = ["model", *(METRICS[name][0] if name in METRICS else text(name.replace("_", " ")) for name in columns)]
    return f"<h3>Every model in every number of steps</h3>{table(head, rows, numeric=range(1, len(head)))}"


def _steps(steps: int) -> str:
    return f"{steps} step{'s' if steps != 1 else ''}"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} <span class='quiet'>[{low:.3f}, {high:.3f}]</span>"


def _changes(block: Mapping[str, Any]) -> str:
    labels, rows = block["labels"], []
    for change in block["changes"]:
        who = f"{foreign(labels[change['after']], 60)} against {foreign(labels[change['before']], 60)}"
        for steps, metrics in change["steps"].items():
            for name, found in metrics.items():
                kind = judged(name, found)
                by, (least, most) = found["difference"], found["difference_interval"]
                rows.append(
                    [f"{who}, {_steps(int(steps))}", METRICS[name][0], f"{found['before']:.3f}", f"{found['after']:.3f}"]
                    + [f"{by:+.3f} [{least:+.3f}, {most:+.3f}]", _share(found)]
                    + [f'<span class="badge {KIND_OF[kind]}">{kind}</span>']
                )
    head = ["who", "metric", "before", "after", "difference", "ratio of the means", ""]
    words = "Differences are paired, scan by scan, and intervals draw whole places."
    return f"<h3>What changed</h3><p>{words}</p>{table(head, rows, numeric=(2, 3, 4, 5))}"


def _share(found: Mapping[str, Any]) -> str:
    """The ratio of the means in per cent, with its interval; a dash where there is none."""
    if found["ratio"] is None:
        return "\u2013"
    low, high = found["ratio_interval"]
    return f"{100 * found['ratio']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


KIND_OF = {"better": "good", "worse": "bad", "even": "tie"}


def judged(metric: str, found: Mapping[str, Any]) -> str:
    """``better``, ``worse``, or ``even`` where the interval of the difference holds zero."""
    low, high = found["difference_interval"]
    if low <= 0 <= high:
        return "even"
    return "better" if (low > 0) == METRICS[metric][1] else "worse"


def _readings(block: Mapping[str, Any]) -> list[str]:
    """A sentence for each pair of models in the fewest steps."""
    return [f"<p>{foreign(sentence, 400)}</p>" for sentence in readings(block)]


def readings(block: Mapping[str, Any]) -> list[str]:
    """What changed in the fewest steps, in words."""
    few, labels = block["steps"][0], block["labels"]
    told = []
    for change in block["changes"]:
        parts = []
        for name in ("cd", "jsd_bev"):
            found = change["steps"][str(few)][name]
            parts.append(f"its {METRICS[name][0].split(',')[0]} is {_share(found)}, {judged(name, found)}")
        who = f"{labels[change['after']]} against {labels[change['before']]}"
        told.append(f"{who}, in {_steps(few)}: {'; '.join(parts)}.")
    return told


def clouds(data: ReportData) -> str:
    """The clouds of some scans, to be turned; those whose files are missing are named."""
    found, missing = [], []
    for scene in (data.evaluation or {}).get("clouds") or []:
        views = {str(view["label"]): _cloud(data.folder, str(view["file"])) for view in scene["views"]}
        missing += [f"{scene['name']}: {label}" for label, cloud in views.items() if cloud is None]
        shown = {label: cloud for label, cloud in views.items() if cloud is not None}
        if shown:
            remarks = {str(view["label"]): str(view["remark"]) for view in scene["views"]}
            found.append(CloudScene(str(scene["name"]), shown, remarks))
    told = note(f"Missing or unreadable: {text(', '.join(missing))}.") if missing else ""
    return (clouds_body(found, heading="h3") if found else note("No clouds were kept.")) + told


def _cloud(folder: Path, name: str) -> np.ndarray | None:
    """(N, 3), or None for what is no cloud below the run's ``samples``."""
    root, path = (folder / "samples").resolve(), (folder / name).resolve()
    if not path.is_relative_to(root) or path.suffix != ".npy" or not path.is_file():
        return None
    if path.stat().st_size > MEASURED_SIZE_LIMIT:
        return None
    try:
        cloud = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    whole = cloud.ndim == 2 and cloud.shape[1] == 3 and len(cloud) > 0 and cloud.dtype.kind == "f"
    return cloud if whole and np.isfinite(cloud).all() else None


def curves(metrics: Metrics) -> str:
    """A chart for each kind of figure that a distillation logs; its loss is a surrogate, whose value means nothing."""
    parts = []
    for key, title, axis in PHASES:
        names = [name for name in metrics.columns if key in name and len(metrics.series(name)[0])]
        if not names:
            continue
        lines = [
            Line(_called(name, key), COLOURS[place % len(COLOURS)], *metrics.series(name))
            for place, name in enumerate(sorted(names)[: len(COLOURS)])
        ]
        drawing = charts.line_chart(f"completion-{len(parts)}", lines, x_label="optimiser step", y_label=axis)
        parts.append(
            f'<figure class="panel"><h3>{title}</h3>{drawing}<figcaption>{_said(metrics, names)}</figcaption></figure>'
        )
    if not parts:
        return ""
    words = (
        "The student's loss is a surrogate: its gradient is what counts, and its value means nothing. A prefix p/n is the p-th"
    )
    return f'<p>{words} step of a course of n.</p><div class="charts">{"".join(parts)}</div>'


def _called(name: str, key: str) -> str:
    short = name.removeprefix(key) if key.endswith("/") else name.removesuffix(key) if key.startswith("/") else name
    return short.replace("student/", "").replace("_", " ")


def _said(metrics: Metrics, names: Sequence[str]) -> str:
    told = []
    for name in sorted(names)[: len(COLOURS)]:
        first, last = metrics.first_tenth(name), metrics.last_tenth(name)
        if first is not None and last is not None:
            told.append(f"{name.split('/', 1)[-1].replace('_', ' ')}: {number(first)} \u2192 {number(last)}")
    return text("; ".join(told), 400)


def data_card(data: ReportData) -> str:
    """Where scans came from, and how many there are on each side."""
    found = data.scans
    if not found:
        return note("No summary of the scans was found.")
    cells = [("source", foreign(found.get("source", "?"), 60), "")]
    for name, label in (("train", "trained on"), ("heldout", "held out")):
        side = found.get(name)
        if isinstance(side, Mapping):
            cells.append((f"scans {label}", f"{side.get('scans', '?')}", f"of {side.get('places', '?')} places"))
    cells.append(("points of a scan", f"{found.get('scan_points', '?')}", ""))
    return figures(cells)
