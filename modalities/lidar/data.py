"""Scans with their ground truth, of the world or of a data set: what is trained on, and what is kept for evaluation.

Scenes of the world are made once, into ``scenes/train.safetensors`` and ``scenes/heldout.safetensors``. Scans of a data set
stay where they are and are read one at a time; only the maps are built, into ``scenes/maps/SEQUENCE/map_clean.npy``, unless
the recipe says where they are.

Letters: P points of a scan, M points of a ground truth.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save

from polyalign.core.adapter import Row
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.files import read_scan
from polyalign.datasets.lidar.filters import MAP_BUILDER, TRAINING_SCAN, PointFilter, farthest_points
from polyalign.datasets.lidar.layouts import ScanFile, ScanSequence, kitti_360, semantic_kitti
from polyalign.datasets.lidar.maps import MAP_FILE, SceneMap, build_map
from polyalign.datasets.lidar.samples import (
    SampleSettings,
    augmentation,
    evaluation_ground_truth,
    resampled,
    training_sample,
)
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.lidar.config import DataConfig, LidarRecipe
from polyalign.modalities.lidar.scenes import Scene, SceneSettings, scenes

SCENES = "scenes"
BLOCK = 50
"""Consecutive scans of a drive that count as one where intervals are made: five seconds, in which they show the same street."""


class Scans(Protocol):
    """Some scans. ``names`` are theirs; ``groups`` say which show the same place, and are not independent of each other."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def groups(self) -> Sequence[str]: ...

    def scan(self, index: int) -> np.ndarray:
        """(P, 3) float32 in metres: what a completion starts from."""
        ...

    def truth(self, index: int) -> np.ndarray:
        """(M, 3): everything that is known to be around."""
        ...

    def sample(self, index: int, points: int, *, seed: int, version: int) -> tuple[np.ndarray, np.ndarray]:
        """Scan (P, 3) and ground truth (``points``, 3) float32 as they are trained on, in one of their versions."""
        ...


class WorldScans:
    """Scenes of the world `streets`."""

    def __init__(self, given: Sequence[Scene]):
        self._given = given
        self.names = [scene.name for scene in given]
        self.groups = [name.rsplit("-", 1)[0] for name in self.names]

    def scan(self, index: int) -> np.ndarray:
        return self._given[index].scan

    def truth(self, index: int) -> np.ndarray:
        return self._given[index].surroundings

    def sample(self, index: int, points: int, *, seed: int, version: int) -> tuple[np.ndarray, np.ndarray]:
        scene = self._given[index]
        generator = np.random.default_rng(seed_of(seed, "lidar sample", scene.name, version))
        matrix = augmentation(generator) if version else np.eye(3)
        full = scene.full(points, generator) @ matrix.T
        return (scene.scan @ matrix.T).astype(np.float32), full.astype(np.float32)


class SequenceScans:
    """Scans of a data set's drives, each with the drive's map."""

    def __init__(self, data: DataConfig, sequences: Sequence[ScanSequence], maps: Path, every: int):
        self._data, self._maps = data, maps
        self._scans = [(sequence.name, scan) for sequence in sequences for scan in sequence.scans[::every]]
        self.names = [f"{name}-{scan.number:06d}" for name, scan in self._scans]
        self.groups = [f"{name}-{scan.number // BLOCK}" for name, scan in self._scans]

    def _at(self, index: int) -> tuple[ScanFile, SceneMap]:
        name, scan = self._scans[index]
        return scan, _opened_map(self._maps / name / MAP_FILE)

    def scan(self, index: int) -> np.ndarray:
        return input_points(read_scan(self._scans[index][1].points), self._data)

    def truth(self, index: int) -> np.ndarray:
        return evaluation_ground_truth(*self._at(index), max_range=self._data.max_range)

    def sample(self, index: int, points: int, *, seed: int, version: int) -> tuple[np.ndarray, np.ndarray]:
        scan, scene = self._at(index)
        kept = PointFilter(farthest=self._data.max_range, lowest=TRAINING_SCAN.lowest, static=scan.labels is not None)
        settings = SampleSettings(points, self._data.scan_points, self._data.max_range, version > 0, kept)
        made = training_sample(scan, scene, settings, seed=seed, epoch=version)
        return made.scan, made.full


@lru_cache(maxsize=16)
def _opened_map(path: Path) -> SceneMap:
    return SceneMap.load(path)


def input_points(points: np.ndarray, data: DataConfig) -> np.ndarray:
    """(P, 3) float32 that a completion of a raw scan (N, 3 or 4) starts from: within 3.5 m and ``max_range``, then farthest
    points. Where there are too few, all of them again and again, as in training.

    Raises:
        UserError: no point is within range.
    """
    near = points[PointFilter(farthest=data.max_range).keep(points), :3]
    if not len(near):
        raise UserError(f"none of the {len(points)} points of the scan is 3.5 to {data.max_range:g} m away")
    if len(near) < data.scan_points:
        return resampled(near, data.scan_points, np.random.default_rng(0)).astype(np.float32)
    return near[farthest_points(near, data.scan_points)].astype(np.float32)


class TrainingRows:
    """Scans as rows of a training: {"pair_id", "scan" (P, 3), "full" (``points``, 3)}. Row i of n scans is version i // n of
    scan i % n."""

    def __init__(self, given: Scans, points: int, *, versions: int, seed: int):
        self._given, self._points, self._versions, self._seed = given, points, versions, seed

    def __len__(self) -> int:
        return len(self._given.names) * self._versions

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> Row:
        version, place = divmod(index, len(self._given.names))
        scan, full = self._given.sample(place, self._points, seed=self._seed, version=version)
        return {"pair_id": f"{self._given.names[place]}/{version}", "scan": scan, "full": full}


@dataclass(frozen=True)
class Split:
    """What of a recipe's data one side takes."""

    name: str
    streets: int
    sequences: tuple[str, ...]
    every: int


def splits_of(recipe: LidarRecipe) -> tuple[Split, Split]:
    """What is trained on, and what is held out.

    Raises:
        UserError: a drive is on both sides.
    """
    data, held_out = recipe.data, recipe.evaluate
    both = sorted(set(data.sequences) & set(held_out.sequences))
    if data.source != "streets" and both:
        raise UserError(
            f"data.sequences and evaluate.sequences both have {', '.join(both)}: what was trained on is no test. Take them out "
            "of one of the two"
        )
    return (
        Split("train", data.streets, data.sequences, data.every),
        Split("heldout", held_out.streets, held_out.sequences, held_out.every),
    )


def scene_settings(recipe: LidarRecipe) -> SceneSettings:
    """How scenes of the world are cut for this recipe."""
    return SceneSettings(recipe.data.scan_points, recipe.sampler.copies, recipe.data.max_range)


def opened(recipe: LidarRecipe, folder: Path, split: Split) -> Scans:
    """The scans of one side, from ``folder``, the run's ``scenes``.

    Raises:
        UserError: a data set that is not there or does not hold together; no scan at all.
    """
    data = recipe.data
    if data.source == "streets":
        found: Scans = WorldScans(read_scenes(folder / f"{split.name}.safetensors"))
    else:
        maps = folder / "maps" if data.maps is None else Path(data.maps).expanduser()
        found = SequenceScans(data, sequences_of(data, split), maps, split.every)
    if not found.names:
        raise UserError(f"there are no scans for the {split.name} side; take more streets, or a shorter data.max_range")
    return found


def sequences_of(data: DataConfig, split: Split) -> list[ScanSequence]:
    """The drives of one side.

    Raises:
        UserError: one that is not there, or has no poses or labels.
    """
    assert data.folder is not None  # the schema asks for it
    root = Path(data.folder).expanduser()
    if not root.is_dir():
        raise UserError(f"data.folder: there is no folder {root}")
    if data.source == "semantic_kitti":
        return [semantic_kitti(root, name, sensor_poses=data.sensor_poses) for name in split.sequences]
    labels = None if data.labels is None else Path(data.labels).expanduser()
    return [kitti_360(root, name, labels=None if labels is None else labels / name) for name in split.sequences]


def drive_hash(sequence: ScanSequence) -> str:
    """Of names and sizes of a drive's scans and labels, and of the content of its poses. Reading all scans for a hash would
    take longer than the maps."""
    files = [path for scan in sequence.scans for path in (scan.points, scan.labels) if path is not None]
    poses = [scan.pose.tolist() for scan in sequence.scans if scan.pose is not None]
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return sha256_of(f"{listing}\n{json.dumps(poses)}".encode())


def data_files(recipe: LidarRecipe) -> dict[str, Any]:
    """What a data set looks like, as an input of stages: see :func:`drive_hash`, and the content of given maps."""
    data = recipe.data
    if data.source == "streets":
        return {}
    drives = {}
    for split in splits_of(recipe):
        for sequence in sequences_of(data, split):
            drives[sequence.name] = drive_hash(sequence)
    maps = {} if data.maps is None else {"maps": fingerprint(data.maps, endings=frozenset({".npy"}))}
    return {"drives": drives} | maps


# --- what is made once -------------------------------------------------------------------------------------------------------


def make(recipe: LidarRecipe, folder: Path) -> dict[str, Any]:
    """Make what of ``scenes/`` is not there yet, and ``summary.json``, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in splits_of(recipe):
        if recipe.data.source == "streets":
            _make_scenes(recipe, folder, split)
        elif recipe.data.maps is None:
            _make_maps(recipe.data, folder / "maps", split)
        found = opened(recipe, folder, split)
        counts[split.name] = {"scans": len(found.names), "places": len(set(found.groups))}
    summary = {"source": recipe.data.source, "scan_points": recipe.data.scan_points, **counts}
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _make_scenes(recipe: LidarRecipe, folder: Path, split: Split) -> None:
    path = folder / f"{split.name}.safetensors"
    if path.is_file():
        return
    made: list[Scene] = []
    with ProgressLine(f"streets, {split.name}", total=split.streets) as line:
        for number in range(split.streets):
            made += scenes(split.name, [number], scene_settings(recipe), seed=recipe.seed)
            line.advance()
    atomic_write(path, scenes_bytes(made))


def _make_maps(data: DataConfig, folder: Path, split: Split) -> None:
    for sequence in sequences_of(data, split):
        path = folder / sequence.name / MAP_FILE
        if path.is_file():
            continue
        labelled = all(scan.labels is not None for scan in sequence.scans)
        keep = MAP_BUILDER if labelled else PointFilter(farthest=None)
        with ProgressLine(f"map of {sequence.name}", total=len(sequence.scans)) as line:
            content = io.BytesIO()
            np.save(content, build_map(sequence, keep=keep, progress=lambda _, line=line: line.advance()))
        atomic_write(path, content.getvalue())


def scenes_bytes(given: Sequence[Scene]) -> bytes:
    """A safetensors file of scenes, the same bytes for the same scenes."""
    tensors = {}
    for scene in given:
        tensors |= {f"{scene.name}/scan": scene.scan, f"{scene.name}/surroundings": scene.surroundings}
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


def read_scenes(path: Path) -> list[Scene]:
    """Scenes of :func:`scenes_bytes`, by name.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there are no scenes at {path}; run 'polyalign generate' first")
    tensors = load_file(path)
    names = sorted({name.rsplit("/", 1)[0] for name in tensors})
    return [Scene(name, tensors[f"{name}/scan"], tensors[f"{name}/surroundings"]) for name in names]
