"""Train a refinement network: ``python -m polyalign.modalities.lidar.refine FOLDER``.

On small scenes of the world `streets`, or with ``--kitti ROOT`` on a data set in SemanticKITTI's layout, as published: full
width, 180,000 points, batches of 8, Adam at 1e-4. Writes ``FOLDER/refinement.safetensors`` in LiDiff's names, which
``checkpoints.open_refinement`` opens, ``FOLDER/refinement.json``, the record, and ``FOLDER/metrics.jsonl``. A killed run
continues to the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyalign.core.adapter import Row
from polyalign.core.algorithm import Rows
from polyalign.core.environment import without_folders
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.core.randomness import seed_of
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.trainer import Trainer
from polyalign.datasets.lidar.filters import TRAINING_MAP
from polyalign.datasets.lidar.layouts import TRAINING_SEQUENCES, ScanFile, semantic_kitti
from polyalign.datasets.lidar.maps import SceneMap, build_map
from polyalign.datasets.lidar.samples import evaluation_ground_truth
from polyalign.evaluation.lidar_metrics.distances import chamfer, nearest_distances
from polyalign.evaluation.statistics import bootstrap_mean
from polyalign.modalities.lidar.checkpoints import open_refinement, save_refinement
from polyalign.modalities.lidar.completion import refine
from polyalign.modalities.lidar.data import drive_hash
from polyalign.modalities.lidar.measuring import ground_truth
from polyalign.modalities.lidar.minkunet import MinkUNet, scaled
from polyalign.modalities.lidar.pretrain import VOXEL as SMALL_VOXEL
from polyalign.modalities.lidar.refinement_training import NETWORK, ChamferRefinement, RefinementSettings, jittered
from polyalign.modalities.lidar.scenes import Scene, SceneSettings, scenes

MODULE = "polyalign.modalities.lidar.refine"
WEIGHTS = "refinement.safetensors"
SMALL = RefinementSettings(points=2_000, full_points=8_000, voxel=SMALL_VOXEL)
"""For scenes of 16 m: as many points as their completions have, and as their ground truth is measured with."""


@dataclass(frozen=True)
class Settings:
    """Args:
    width: of the network, relative to the published one.
    streets, measured_streets: of the world, where no data set is given.
    """

    seed: int = 0
    steps: int = 400
    batch: int = 4
    rate: float = 1e-3
    width: float = 0.25
    save_every: int = 50
    streets: int = 40
    measured_streets: int = 13
    scenes: SceneSettings = field(default_factory=SceneSettings)
    refinement: RefinementSettings = SMALL


WORLD = Settings()
PUBLISHED = Settings(steps=12_000, batch=8, rate=1e-4, width=1.0, save_every=500, refinement=RefinementSettings())
"""``config_refine``; 12,000 steps are about its 5 epochs of 19,130 scans."""


class StreetClouds:
    """Scenes of the world as rows."""

    def __init__(self, given: Sequence[Scene]):
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [{"pair_id": self._given[index].name, "points": self._given[index].surroundings} for index in indices]


class MapClouds:
    """The map around every scan of some sequences, as rows, cut out when asked for. Maps are built once and lie in ``work``,
    named by their sequence and by what they were built from. ``source`` says which data these are: root, a hash by sequence.

    Raises:
        UserError: no such sequence, or poses, labels or calibration missing, see ``layouts.semantic_kitti``.
    """

    def __init__(self, root: Path, sequences: Sequence[str], work: Path):
        self._scans: list[tuple[str, ScanFile]] = []
        self._maps: dict[str, SceneMap] = {}
        self.source: dict[str, Any] = {"root": str(root.resolve()), "sequences": {}}
        work.mkdir(parents=True, exist_ok=True)
        for name in sequences:
            sequence = semantic_kitti(root, name)
            self.source["sequences"][name] = drive_hash(sequence)
            file = work / self.map_name(name)
            if not file.exists():
                partial = file.with_suffix(".part.npy")
                np.save(partial, build_map(sequence))
                partial.replace(file)
            self._maps[name] = SceneMap.load(file)
            self._scans += [(name, scan) for scan in sequence.scans]

    def map_name(self, sequence: str) -> str:
        """The file in ``work`` of an opened sequence's map."""
        known = f"{self.source['root']} {self.source['sequences'][sequence]}"
        return f"{sequence}-{sha256_of(known.encode())[:8]}.npy"

    def __len__(self) -> int:
        return len(self._scans)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        found = []
        for name, scan in (self._scans[index] for index in indices):
            points = evaluation_ground_truth(scan, self._maps[name], keep=TRAINING_MAP)
            found.append({"pair_id": f"{name}-{scan.number:06d}", "points": points})
        return found


def train(data: Rows, settings: Settings, folder: Path, device: str = "cpu", *, source: Mapping[str, Any]) -> MinkUNet:
    """Train a network, or go on with one, write it to ``folder`` and open it again. ``source`` says which data these are.

    Raises:
        UserError: no data; a folder of other settings or of other data; a loss that is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = MinkUNet(scaled(settings.width))
    algorithm = ChamferRefinement(network.to(device), settings.refinement, seed=settings.seed)
    how = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch,
        micro_batch_size=settings.batch,
        optimizer=OptimizerConfig(learning_rate=settings.rate, weight_decay=0.0),
        clip_norm=None,
        save_every=settings.save_every,
    )
    known = {"refinement": asdict(settings.refinement), "width": settings.width, "clouds": len(data), "data": dict(source)}
    Trainer(algorithm, data, how, folder, seed=settings.seed, identity=known).run()
    save_refinement(folder / WEIGHTS, algorithm.networks[NETWORK])
    return open_refinement(folder / WEIGHTS)


@torch.no_grad()
def measured(network: MinkUNet, given: Sequence[Scene], settings: Settings) -> dict[str, Any]:
    """Chamfer distance in metres, not squared, of jittered held-out ground truth before and after refinement, and the mean
    difference with its bootstrap interval over streets. ``copies`` is what the input becomes when its points are jittered once
    more in as many copies: a denser cloud is nearer to the ground truth by itself, and the network has to do better."""
    how, rows = settings.refinement, []
    for scene in given:
        generator = np.random.default_rng(seed_of(settings.seed, "refinement measure", scene.name))
        points = jittered(scene.surroundings.astype(np.float64), how, generator)
        refined = refine(network, torch.tensor(points[None], dtype=torch.float32), voxel=how.voxel)[0].double().numpy()
        copied = np.repeat(points, len(refined) // len(points), axis=0)
        copied = copied + np.clip(how.jitter * generator.standard_normal(copied.shape), -how.clip, how.clip)
        truth = ground_truth(scene, settings.seed)
        rows.append([chamfer(nearest_distances(cloud, truth)) for cloud in (points, copied, refined)])
    before, copies, after = np.array(rows).T
    streets = [scene.name.rsplit("-", 1)[0] for scene in given]
    difference, interval = bootstrap_mean((after - before).tolist(), seed=settings.seed, clusters=streets)
    named = {"before": before, "copies": copies, "after": after}
    figures: dict[str, Any] = {name: round(float(values.mean()), 4) for name, values in named.items()}
    return figures | {"difference": difference, "difference_interval": list(interval), "scenes": len(rows)}


def run(folder: Path, settings: Settings, options: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Train on what the command line names and write the record, which is returned."""
    figures = None
    if options.kitti is None:
        given = scenes("train", range(settings.streets), settings.scenes, seed=settings.seed)
        source = {"streets": settings.streets, "scenes": asdict(settings.scenes)}
        network = train(StreetClouds(given), settings, folder, options.device, source=source)
        held_out = scenes("heldout", range(settings.measured_streets), settings.scenes, seed=settings.seed)
        figures = measured(network, held_out, settings)
    else:
        clouds = MapClouds(options.kitti, options.sequences, folder / "maps")
        train(clouds, settings, folder, options.device, source=clouds.source)
    record = {
        "data": "streets" if options.kitti is None else {"semantic_kitti": list(options.sequences)},
        "settings": asdict(settings),
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "figures": figures,
        "torch": torch.__version__,
        "command": shlex.join(["python", "-m", MODULE, *map(without_folders, words)]),
    }
    atomic_write(folder / "refinement.json", json.dumps(record, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the network, the record and the checkpoints go")
    parser.add_argument("--kitti", type=Path, help="a data set in SemanticKITTI's layout; the published settings then hold")
    parser.add_argument("--sequences", nargs="+", default=list(TRAINING_SEQUENCES))
    parser.add_argument("--steps", type=int, help=f"{WORLD.steps}, or {PUBLISHED.steps} with --kitti")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    settings = WORLD if options.kitti is None else PUBLISHED
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)
    try:
        record = run(options.folder, settings, options, words)
    except UserError as error:
        print(f"refine: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
