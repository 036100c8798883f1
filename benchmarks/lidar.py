"""Completing a scan: ours against the published order of work (:mod:`benchmarks.lidar_naive`), same networks, scan and seed.

    python -m benchmarks.lidar              # one core: a scan of 3,000 points to 30,000, a quarter of the width
    python -m benchmarks.lidar --full       # a GPU: 18,000 points to 180,000, full width

Both take 8 steps with guidance 3.5. The scan is one of the world `streets`; weights are random, which time does not ask for.
Every variant runs in a process of its own. On the CPU seconds are those of the processor, on a GPU those of the clock; memory
is the peak of the process, or of the GPU. First both complete a small scan in double precision, and must agree to
1e-6 m; in single precision a point that rounds into another voxel takes its own way, so there the share of points
within a millimetre is reported. Seconds by stage are ours, each stage without those inside it. A layer of sparse convolution
is compared with spconv's and Open3D's where they import (:mod:`benchmarks.lidar_convolution`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import lidar_naive
from benchmarks.lidar_convolution import compared
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.datasets.worlds import streets
from polyalign.modalities.lidar import completion, diffusion, sparse
from polyalign.modalities.lidar.completion import CompletionSettings, prepare_scan
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff, scaled
from polyalign.modalities.lidar.spconv_backend import spconv_convolutions

PACKAGES = ("torch", "numpy", "scipy", "spconv", "open3d")
TOLERANCE = 1e-6
"""Metres, in double precision."""
GOAL = 4.0
VARIANTS = ("naive", "ours")
GPU_VARIANTS = ("naive", "ours", "ours, bf16", "ours, spconv")
STAGES: tuple[str, ...] = ("voxelise", "kernel maps", "look-ups", "encoder", "network", "solver")
SEED = 3
PREDICTED = 0.01
"""Standard deviation, in metres, of what the networks answer on the scan."""
NOISE = 0.2
"""Metres at the start. As next to nothing of it is taken away again, the solver makes a metre of it."""


class Stopwatch:
    """Seconds by stage; those of a stage inside another count for the inner one only."""

    def __init__(self, device: str):
        self.device, self.seconds, self._inner = device, dict.fromkeys(STAGES, 0.0), [0.0]

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What ``call`` gives, and seconds."""
        began = self.now()
        found = call()
        return found, self.now() - began

    def stage(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            found, seconds = self.timed(lambda: function(*arguments, **named))
            self.seconds[name] += seconds - self._inner.pop()
            self._inner[-1] += seconds
            return found

        return watched

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stages of our completion are watched within this."""
        places = [
            (completion, "voxelise", "voxelise"),
            (sparse.VoxelGeometry, "kernel_map", "kernel maps"),
            (sparse.VoxelGeometry, "coordinates", "kernel maps"),
            (sparse.VoxelGeometry, "nearest", "look-ups"),
            (MinkGlobalEnc, "forward", "encoder"),
            (MinkUNetDiff, "condition", "encoder"),
            (MinkUNetDiff, "forward", "network"),
            (completion, "solve", "solver"),
        ]
        with ExitStack() as stack:
            for owner, name, stage in places:
                own = getattr(owner, name)
                stack.callback(setattr, owner, name, own)
                setattr(owner, name, self.stage(stage, own))
            yield


def networks(width: float, scan: Tensor) -> tuple[MinkUNetDiff, MinkGlobalEnc]:
    """Random weights for a scan (1, P, 3). Batch normalisation takes its statistics from the scan, as training would have left
    it: otherwise what goes in is lost on the way, or grows without bounds where points lie densely. The noise that comes out
    is made small, since none of it is right."""
    torch.manual_seed(0)
    denoiser = MinkUNetDiff(scaled(width)).eval().to(scan.device, scan.dtype)
    encoder = MinkGlobalEnc(scaled(width)).eval().to(scan.device, scan.dtype)
    modules = [*denoiser.modules(), *encoder.modules()]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        begun = scan.repeat(1, CompletionSettings().copies, 1)
        begun = begun + NOISE * torch.randn(begun.shape, dtype=begun.dtype).to(begun)
        levels = torch.zeros(1, dtype=torch.int64, device=scan.device)
        voxels, encoded = (sparse.voxelise(points, completion.VOXEL)[0] for points in (begun, scan))
        predicted = denoiser(voxels, denoiser.condition(encoder(encoded)), levels)
        for parameter in denoiser.last[2].parameters():
            parameter *= PREDICTED / float(predicted.std())
    for norm in norms:
        norm.eval()
    return denoiser, encoder


def scan_of(points: int, device: str, dtype: torch.dtype) -> Tensor:
    """(1, P, 3) of a street."""
    found = streets.drive(streets.street("heldout", 0), 1)[0]
    return torch.from_numpy(prepare_scan(found.points, points)[None]).to(device, dtype)


def completed(
    variant: str, options: argparse.Namespace, dtype: torch.dtype, stopwatch: Stopwatch, *, guidance: float = 3.5
) -> tuple[Tensor, float]:
    """A completion (1, N, 3), in the variant's way, and its seconds."""
    scan, settings = scan_of(options.points, options.device, dtype), CompletionSettings(guidance=guidance, noise_scale=NOISE)
    both = networks(options.width, scan)
    bf16 = torch.autocast(options.device, dtype=torch.bfloat16) if "bf16" in variant else nullcontext()
    fast = spconv_convolutions() if "spconv" in variant else nullcontext()
    with torch.no_grad(), bf16, fast:
        if variant == "naive":
            return stopwatch.timed(lambda: lidar_naive.complete(*both, scan, [SEED], settings))
        with stopwatch.watching():
            return stopwatch.timed(lambda: completion.complete(*both, scan, [SEED], settings))


def equality(options: argparse.Namespace) -> dict[str, float]:
    """Largest difference in metres, in double precision, on a small scan: of ours and the naive order, and of ours with and
    without guidance, which says that the condition counts for something.

    Raises:
        SystemExit: the first two are not equal, or the others are.
    """
    small = argparse.Namespace(width=0.25, points=100, device=options.device)
    naive, ours, unguided = (
        completed(variant, small, torch.float64, Stopwatch(options.device), guidance=guidance)[0]
        for variant, guidance in (("naive", 3.5), ("ours", 3.5), ("ours", 1.0))
    )
    difference, guided = float((naive - ours).abs().max()), float((ours - unguided).abs().max())
    if not difference < TOLERANCE < guided:
        raise SystemExit(
            f"in double precision ours and the naive order differ by {difference} m, and guidance changes {guided} m; "
            f"the first has to be below {TOLERANCE}, the second above"
        )
    return {"difference": difference, "guidance_changes": guided}


def run_variant(options: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process; its output goes to ``options.output``."""
    torch.set_num_threads(options.threads)
    if options.variant == "convolution":
        voxels = sparse.voxelise(scan_of(options.points, options.device, torch.float32), completion.VOXEL)[0]
        watch = Stopwatch(options.device)
        compared(voxels, watch.timed)  # warms up
        return {"equality": equality(options), "convolution": compared(voxels, watch.timed)}
    results = []
    for _ in range(options.repeats + (options.device != "cpu")):  # a GPU's first run is not counted
        watch = Stopwatch(options.device)
        made, seconds = completed(options.variant, options, torch.float32, watch)
        results.append((seconds, watch.seconds))
    seconds, stages = min(results[-options.repeats :], key=lambda result: result[0])
    np.save(options.output, made.float().cpu().numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds_per_scan": seconds, "peak_memory_mib": peak, "stages": stages if options.variant != "naive" else None}


def in_own_process(variant: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    words = [f"--{name}={getattr(options, name)}" for name in ("points", "width", "device", "threads", "repeats")]
    command = [sys.executable, "-m", "benchmarks.lidar", f"--variant={variant}", f"--output={output}", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All variants, and how near their outputs are to the naive one's."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {}
        first = in_own_process("convolution", options, Path(folder) / "none.npy")
        print(f"equal in double precision to {first['equality']['difference']:.1e} m", file=sys.stderr)
        results: dict[str, Any] = {}
        for name in VARIANTS if options.device == "cpu" else GPU_VARIANTS:
            outputs[name] = Path(folder) / f"{len(outputs)}.npy"
            try:
                results[name] = in_own_process(name, options, outputs[name])
            except subprocess.CalledProcessError:
                if name in VARIANTS:
                    raise
                print(f"{name}: did not run, see above", file=sys.stderr)
                continue
            away = np.linalg.norm(np.load(outputs[name]) - np.load(outputs["naive"]), axis=2)
            results[name]["within_a_millimetre"] = float((away < 1e-3).mean())
            print(f"{name}: {results[name]['seconds_per_scan']:.2f} s a scan", file=sys.stderr)
    return {**first, "variants": results}


def table(found: Mapping[str, Any]) -> list[str]:
    lines = ["| variant | s a scan | faster | points within 1 mm | peak memory, MiB |", "| --- | --- | --- | --- | --- |"]
    base = found["variants"]["naive"]["seconds_per_scan"]
    for name, one in found["variants"].items():
        ratio, near = base / one["seconds_per_scan"], one["within_a_millimetre"]
        memory = one["peak_memory_mib"]
        lines.append(f"| {name} | {one['seconds_per_scan']:.2f} | {ratio:.2f} x | {near:.4f} | {memory:.0f} |")
    stages = found["variants"]["ours"]["stages"]
    whole = found["variants"]["ours"]["seconds_per_scan"]
    lines += ["", "| stage of ours | s | share |", "| --- | --- | --- |"]
    lines += [f"| {name} | {seconds:.3f} | {seconds / whole:.0%} |" for name, seconds in stages.items()]
    lines += ["", "| 3x3x3, 32 to 32 | map, s | forward | backward | differs |", "| --- | --- | --- | --- | --- |"]
    for name, one in found["convolution"].items():
        if "missing" in one:
            lines.append(f"| {name} | not measured: {one['missing'].splitlines()[0][:60]} | | | |")
        else:
            cells = " | ".join(f"{one[part]:.4f}" for part in ("map", "forward", "backward"))
            lines.append(f"| {name} | {cells} | {one['difference']:.0e} |")
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return found if device == "cpu" else found | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="as published, on a GPU: 18,000 points, full width")
    parser.add_argument("--points", type=int, help="of the scan; the completion has ten times as many")
    parser.add_argument("--width", type=float, help="of the networks, relative to the published ones")
    parser.add_argument("--device", help="cpu, or cuda with --full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, and the table beside it as .md")
    parser.add_argument("--variant", choices=("convolution", *GPU_VARIANTS), help="run one only, in this process")
    parser.add_argument("--output", type=Path, help="where the one writes its completion")
    options = parser.parse_args()
    defaults = {"points": 18_000, "width": 1.0, "device": "cuda"} if options.full else {"points": 3_000, "width": 0.25}
    for name, value in {"device": "cpu", **defaults}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.variant:
        try:
            print(json.dumps(run_variant(options)))
        except UserError as error:
            raise SystemExit(str(error)) from None
        return
    found = measured(options)
    lines = table(found)
    print("\n".join(lines))
    ratio = found["variants"]["naive"]["seconds_per_scan"] / found["variants"]["ours"]["seconds_per_scan"]
    print(f"\nours is {ratio:.2f} times as fast; the goal is {GOAL:g} or more")
    if options.out is not None:
        sizes = " ".join(f"--{name}={getattr(options, name)}" for name in ("points", "width", "device", "threads", "repeats"))
        record = {
            "command": f"python -m benchmarks.lidar {sizes}",
            **hardware(options.device),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "steps": diffusion.SolverSettings().steps,
            "tolerance_in_double": TOLERANCE,
            "faster": ratio,
            **found,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
