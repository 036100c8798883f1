"""Measure a folder of completions, whoever made them, by the papers' protocol::

    python -m polyalign.modalities.lidar.evaluate_folder COMPLETIONS --kitti ROOT --out ROWS.jsonl

COMPLETIONS holds a file for each scan, named by its number (000123.ply, .npy, .bin or .npz), of one sequence of SemanticKITTI.
The ground truth is the sequence's map within 50 m and -4 to 4.4 m of height, in the 10 m voxels that the scan touches;
completions are cut to the scan's heights and 50 m, as all the projects do. One scan is in memory at a time. ROWS gets a line a
scan as they come, with the hash of its completion, and an interrupted command goes on after the last whole one; a completion
that was replaced is measured anew, and the row of one that was taken away goes. ROWS.summary.json has means, deviations and
intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.core.progress import ProgressLine
from polyalign.datasets.lidar.files import read_scan
from polyalign.datasets.lidar.filters import COMPLETION_SCAN
from polyalign.datasets.lidar.layouts import ScanFile, semantic_kitti
from polyalign.datasets.lidar.maps import MAP_FILE, SceneMap, build_map
from polyalign.datasets.lidar.samples import evaluation_ground_truth
from polyalign.evaluation.lidar_metrics.scenes import SceneMetrics, measure, summarise
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.lidar.complete import read_points
from polyalign.modalities.lidar.completion import postprocess

ENDINGS = (".ply", ".npy", ".bin", ".npz")
PLY_HEAD = 4096


@dataclass(frozen=True)
class Protocol:
    """What is measured, against what.

    Args:
        map_file: a map_clean.npy of the sequence; None builds it beside the rows, once for a root and kind of poses.
        postprocess: cut completions to the scan's heights and 50 m.
    """

    root: Path
    sequence: str = "08"
    map_file: Path | None = None
    sensor_poses: bool = False
    postprocess: bool = True
    metrics: SceneMetrics = field(default_factory=SceneMetrics)


def read_completion(path: Path) -> np.ndarray:
    """(N, 3) of a completion's file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if path.suffix != ".ply":
        return read_points(path)[:, :3]
    content = path.read_bytes()
    head, end, body = content.partition(b"end_header\n")
    lines = head[:PLY_HEAD].decode("ascii", errors="replace").split("\n")
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    count = next((int(line.split()[2]) for line in lines if line.startswith("element vertex")), None)
    kinds = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4"}
    binary = any(line.startswith("format binary_little_endian") for line in lines)
    known = all(len(one) == 2 and one[0] in kinds for one in properties)
    if not end or count is None or not binary or not known or not {"x", "y", "z"} <= {one[-1] for one in properties}:
        raise UserError(f"{path}: is read as a binary little-endian PLY with vertices x, y, z, and is none; write .npy instead")
    row = np.dtype([(one[1], kinds[one[0]]) for one in properties])
    if len(body) < count * row.itemsize:
        raise UserError(f"{path} says {count} points and has {len(body) // row.itemsize}: it is cut short")
    table = np.frombuffer(body, dtype=row, count=count)
    return np.stack([table[axis] for axis in "xyz"], axis=1).astype(np.float32)


def completions_in(folder: Path) -> dict[int, Path]:
    """Completions by their scan's number.

    Raises:
        UserError: no folder, no completions, a name that is no number, or two of one scan.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found: dict[int, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in ENDINGS):
        if not path.stem.isdecimal():
            raise UserError(f"{path}: a completion is named by its scan's number, as 000123{path.suffix}")
        if int(path.stem) in found:
            raise UserError(f"{path} and {found[int(path.stem)]} are of one scan; take one of them away")
        found[int(path.stem)] = path
    if not found:
        raise UserError(f"{folder} has no completions ({', '.join(ENDINGS)})")
    return found


def evaluate_folder(folder: Path, rows_file: Path, protocol: Protocol) -> dict[str, Any]:
    """Measure all completions of a folder, write rows and the summary, and return the summary.

    Raises:
        UserError: completions of scans that the sequence does not have; files that cannot be read; rows of another protocol or
            another map.
    """
    files = completions_in(folder)
    sequence = semantic_kitti(protocol.root, protocol.sequence, labels=False, sensor_poses=protocol.sensor_poses)
    scans = {scan.number: scan for scan in sequence.scans}
    unknown = [number for number in files if number not in scans]
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} completions are of no scan of sequence {sequence.name}, first {unknown[0]}")
    claim = {"completions": str(folder.resolve()), **json.loads(json.dumps(asdict(protocol), default=str))}
    if protocol.map_file is not None:
        claim["map"] = fingerprint(str(protocol.map_file))
    hashes = {number: sha256_of(path) for number, path in files.items()}
    rows = _earlier(rows_file, claim, hashes)
    done, scene = {row["scan"] for row in rows}, _map_of(protocol, rows_file)
    with ProgressLine("measuring", total=len(files), start=len(rows)) as line, open(rows_file, "a", encoding="utf-8") as out:
        for number, path in files.items():
            if number in done:
                continue
            row = {"scan": number, "completion": hashes[number]} | _measured(path, scans[number], scene, protocol)
            out.write(json.dumps(row) + "\n")
            out.flush()
            rows.append(row)
            line.advance()
    places = {number: place for place, number in enumerate(files)}
    rows.sort(key=lambda row: places[row["scan"]])  # as an uninterrupted command has them, to the last bit of the intervals
    _write(rows_file, rows)
    numbers = [{name: value for name, value in row.items() if name not in ("scan", "completion")} for row in rows]
    summary = {"protocol": claim, "scans": len(rows)}
    summary["metrics"] = {name: asdict(found) for name, found in summarise(numbers, seed=0).items()}
    atomic_write(rows_file.with_suffix(".summary.json"), json.dumps(summary, indent=1) + "\n")
    return summary


def _measured(path: Path, scan: ScanFile, scene: SceneMap, protocol: Protocol) -> dict[str, Any]:
    made = read_completion(path).astype(np.float64)
    if protocol.postprocess:
        raw = read_scan(scan.points)
        made = postprocess(made, raw[COMPLETION_SCAN.keep(raw), :3].astype(np.float64))
    try:
        return measure(made, evaluation_ground_truth(scan, scene), metrics=protocol.metrics)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _earlier(rows_file: Path, claim: dict[str, Any], hashes: Mapping[int, str]) -> list[dict[str, Any]]:
    """Rows of an interrupted command, after a half-written line was cut off and those of completions that are no longer as they
    were measured (``hashes`` by scan) left the file; the first time, the protocol is written down.

    Raises:
        UserError: the rows are of another protocol, folder or map.
    """
    note = rows_file.with_suffix(".protocol.json")
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = [f"{key} was {before.get(key)}, now {value}" for key, value in claim.items() if before.get(key) != value]
        if changed:
            raise UserError(f"{rows_file} has rows measured otherwise ({'; '.join(changed)}). Give another --out")
    else:
        atomic_write(note, json.dumps(claim, indent=1) + "\n")
    lines = rows_file.read_text(encoding="utf-8").split("\n")[:-1] if rows_file.is_file() else []
    rows = [json.loads(line) for line in lines]
    kept = [row for row in rows if row["scan"] in hashes and row.get("completion") == hashes[row["scan"]]]
    _write(rows_file, kept)
    return kept


def _write(rows_file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    atomic_write(rows_file, "".join(f"{json.dumps(row)}\n" for row in rows))


def _map_of(protocol: Protocol, rows_file: Path) -> SceneMap:
    if protocol.map_file is not None:
        return SceneMap.load(protocol.map_file)
    source = sha256_of(f"{protocol.root.resolve()} {protocol.sensor_poses}".encode())[:8]
    path = rows_file.with_name(f"{protocol.sequence}-{source}-{MAP_FILE}")
    if not path.is_file():
        sequence = semantic_kitti(protocol.root, protocol.sequence, sensor_poses=protocol.sensor_poses)
        points = build_map(sequence)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, points)
        partial.replace(path)
    return SceneMap.load(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.modalities.lidar.evaluate_folder",
        description="Scene metrics of a folder of completions against SemanticKITTI, in the papers' protocol.",
    )
    parser.add_argument("completions", type=Path, help="folder of 000123.ply, .npy, .bin or .npz")
    parser.add_argument("--kitti", type=Path, required=True, metavar="ROOT", help="what holds dataset/sequences or sequences")
    parser.add_argument("--sequence", default="08")
    parser.add_argument("--map", type=Path, help="map_clean.npy of the sequence; built once where it is not given")
    parser.add_argument("--sensor-poses", action="store_true", help="poses.txt has poses of the sensor, and no calib.txt")
    parser.add_argument("--raw", action="store_true", help="measure completions as they are, not cut to the scan's heights")
    parser.add_argument("--compat", choices=("none", "lidiff", "lidiff_old"), default="none", help="whose IoU and EMD")
    parser.add_argument("--emd", action="store_true", help="earth mover's distance too: seconds to minutes a scan")
    parser.add_argument("--out", type=Path, required=True, metavar="ROWS.jsonl")
    options = parser.parse_args(argv)
    metrics = SceneMetrics(emd=options.emd, compat=options.compat)
    protocol = Protocol(options.kitti, options.sequence, options.map, options.sensor_poses, not options.raw, metrics)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = evaluate_folder(options.completions, options.out, protocol)
    except UserError as error:
        print(f"evaluate_folder: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    for name, found in summary["metrics"].items():
        low, high = found["interval"]
        print(f"{name:20}{found['mean']:.4f}  [{low:.4f}, {high:.4f}]  over {found['scenes']} scans")


if __name__ == "__main__":
    main()
