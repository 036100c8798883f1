"""Complete scans: ``python -m polyalign.modalities.lidar.complete SCAN.bin ... --model MODEL --out FOLDER``.

MODEL is an export or an ``adapter`` folder of a run, which say how they are used; a checkpoint of LiDiff, ScoreLiDAR or
Distillation-DPO, used as published; or ``tiny``. Scans are velodyne .bin files, .npy or .npz (``xyz`` in metres or ``xyz_cm``).
Writes FOLDER/NAME.ply (or .npy, .bin), one scan at a time; those already there are kept, so an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.randomness import seed_of
from polyalign.datasets.lidar.files import read_scan
from polyalign.datasets.lidar.filters import PointFilter
from polyalign.evaluation.lidar_metrics.distances import checked_cloud
from polyalign.modalities.lidar.checkpoints import CompletionNetworks, open_completion, open_refinement
from polyalign.modalities.lidar.completion import CompletionSettings, complete, postprocess, refine
from polyalign.modalities.lidar.config import DataConfig, SamplerConfig
from polyalign.modalities.lidar.data import input_points
from polyalign.modalities.lidar.diffusion import SolverSettings
from polyalign.modalities.lidar.minkunet import MinkUNet
from polyalign.modalities.lidar.pretrain import GUIDANCE, NOISE_SCALE, VOXEL
from polyalign.modalities.lidar.training import SETTINGS, TINY_BASE, WEIGHTS

FORMATS = ("ply", "npy", "bin")
PUBLISHED_STEPS = 8
TINY: dict[str, Any] = {
    "sampler": {
        "guidance": GUIDANCE,
        "noise_scale": NOISE_SCALE,
        "voxel": VOXEL,
        "stochastic": False,
        "postprocess": False,
    },
    "data": {"scan_points": 200, "max_range": 16.0},
    "steps": 8,
}
"""How the embedded base is used."""


@dataclass(frozen=True)
class Completer:
    """Networks with the settings that go with them."""

    networks: CompletionNetworks
    sampler: SamplerConfig
    data: DataConfig
    steps: int
    refinement: MinkUNet | None = None

    @torch.no_grad()
    def __call__(self, points: np.ndarray, seed: int) -> np.ndarray:
        """(N, 3) float32 of a raw scan (n, 3 or 4).

        Raises:
            UserError: no finite points, or none within range.
        """
        checked_cloud(points[:, :3], "scan")
        scan, how = input_points(points, self.data), self.sampler
        settings = CompletionSettings(
            SolverSettings(self.steps, how.start, how.stochastic, how.final),
            how.formulation,
            how.guidance,
            how.copies,
            how.noise_scale,
            how.voxel,
            how.coarser,
        )
        device = next(self.networks.denoiser.parameters()).device
        batch = torch.from_numpy(scan).unsqueeze(0).to(device)
        made = complete(self.networks.denoiser, self.networks.encoder, batch, [seed], settings)
        made = refine(self.refinement, made, voxel=how.voxel) if self.refinement is not None else made
        cloud = made[0].double().cpu().numpy()
        return (postprocess(cloud, scan, max_range=self.data.max_range) if how.postprocess else cloud).astype(np.float32)


def open_completer(
    model: str, *, steps: int | None = None, refinement: Path | None = None, device: str = "cpu", **changes: Any
) -> Completer:
    """Open MODEL (see above) on a device.

    Args:
        changes: keys of the recipe's ``sampler``, and ``scan_points`` and ``max_range``, where they differ from what the model
            says.

    Raises:
        UserError: no such model, or settings that are none.
    """
    place = TINY_BASE if model == "tiny" else Path(model).expanduser()
    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}: a completion takes 1 step or more")
    said: dict[str, Any] = TINY if model == "tiny" else {"sampler": {}, "data": {}, "steps": PUBLISHED_STEPS}
    if place.is_dir():
        said, place = _settings(place / SETTINGS), place / WEIGHTS
    given = {key: value for key, value in changes.items() if value is not None}
    of_data = {key: given.pop(key) for key in ("scan_points", "max_range") if key in given}
    try:
        sampler, data = SamplerConfig(**said["sampler"] | given), DataConfig(**said["data"] | of_data)
    except (ValidationError, TypeError) as error:
        raise UserError(f"{model}: settings that are none: {error}") from error
    networks = open_completion(place)
    networks.denoiser.to(device)
    networks.encoder.to(device)
    finer = None if refinement is None else open_refinement(refinement).to(device)
    return Completer(networks, sampler, data, int(said["steps"]) if steps is None else steps, finer)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        adapter = path.parent / "adapter"
        instead = f"Did you mean {adapter}?" if (adapter / path.name).is_file() else "Name its checkpoint file instead"
        raise UserError(f"{path.parent} has no {path.name}: it is no export of a LiDAR run. {instead}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"sampler": dict(found["sampler"]), "data": dict(found["data"]), "steps": int(found["steps"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the run again") from error


def read_points(path: Path) -> np.ndarray:
    """(n, 3 or 4) of a scan file.

    Raises:
        UserError: no such file, another ending, or no points in it.
    """
    if path.suffix == ".bin":
        return read_scan(path)
    if path.suffix not in (".npy", ".npz"):
        found = "a folder; name the files in it" if path.is_dir() else path.suffix or "no ending"
        raise UserError(f"{path}: scans are read from .bin, .npy and .npz, found {found}")
    if not path.is_file():
        raise UserError(f"there is no scan {path}")
    try:
        found: Any = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            name = next((key for key in ("xyz", "xyz_cm") if key in found), None)
            if name is None:
                raise UserError(f"{path}: has {', '.join(found)}; its points are looked for in 'xyz' (metres) or 'xyz_cm'")
            found = found[name] / (100.0 if name == "xyz_cm" else 1.0)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable array ({error}); it may be cut short") from error
    if found.ndim != 2 or found.shape[1] not in (3, 4):
        raise UserError(f"{path}: a scan is points (n, 3) or (n, 4), found {found.shape}")
    return np.asarray(found, dtype=np.float32)


def cloud_bytes(cloud: np.ndarray, form: str) -> bytes:
    """A cloud (N, 3) as the content of a file; in ``bin`` with remission 0."""
    points = np.ascontiguousarray(cloud, dtype="<f4")
    if form == "npy":
        content = io.BytesIO()
        np.save(content, points)
        return content.getvalue()
    if form == "bin":
        return np.concatenate([points, np.zeros((len(points), 1), dtype="<f4")], axis=1).tobytes()
    names = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{names}end_header\n"
    return header.encode() + points.tobytes()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.modalities.lidar.complete", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help="velodyne .bin, .npy, or .npz files")
    parser.add_argument("--model", default="tiny", help="export or adapter folder, checkpoint, or tiny (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where completions go")
    parser.add_argument("--format", choices=FORMATS, default="ply")
    parser.add_argument("--steps", type=int, help="default: what the model says, 8 for a checkpoint")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--voxel", type=float, help="metres")
    parser.add_argument("--scan-points", type=int, help="points that a completion starts from")
    parser.add_argument("--max-range", type=float, help="metres")
    parser.add_argument("--refinement", type=Path, help="checkpoint of the refinement network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        _complete_all(options)
    except UserError as error:
        print(f"complete: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _complete_all(options: argparse.Namespace) -> None:
    names = [path.stem for path in options.scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"several scans are called {', '.join(twice[:3])}: their completions would be one file. Do them in turn"
        )
    completer = open_completer(
        options.model,
        steps=options.steps,
        refinement=options.refinement,
        device=options.device,
        guidance=options.guidance,
        voxel=options.voxel,
        scan_points=options.scan_points,
        max_range=options.max_range,
    )
    for path in options.scans:
        target = options.out / f"{path.stem}.{options.format}"
        if target.is_file():
            print(f"{target}: is there already, kept")
            continue
        points, reach = read_points(path), completer.data.max_range
        made = completer(points, seed_of(options.seed, "complete", path.stem))
        atomic_write(target, cloud_bytes(made, options.format))
        near = int(PointFilter(farthest=reach).keep(points).sum())
        begun = min(near, completer.data.scan_points)
        print(f"{target}: {len(made)} points, begun from {begun} of {near} within {reach:g} m ({len(points)} in the scan)")


if __name__ == "__main__":
    main()
