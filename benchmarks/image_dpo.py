"""One optimiser step of Diffusion-DPO: ours against the live loop of the public scripts, on the same model, pairs and draws.

    python -m benchmarks.image_dpo

The live loop (:mod:`benchmarks.live_loop`) decodes the pictures, runs VAE and text encoders, and forwards a full copy of
the network as reference, in every step, as the Salesforce and the diffusers scripts do. Ours keeps latents and text states, and
takes the reference from the network itself (LoRA switched off), from a frozen copy (full training), or from a bank of cached
errors. Every variant runs in a process of its own: seconds of processor time per step after two steps of warming up, and the
peak memory of the process. The losses of the live loop and of ours with a live reference are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

VARIANTS = {  # what is trained, and where the reference comes from; None is the live loop
    "live loop, LoRA": ("lora", None),
    "ours, LoRA, adapter off": ("lora", "adapter_off"),
    "ours, LoRA, cached": ("lora", "cached"),
    "live loop, full": ("full", None),
    "ours, full, frozen copy": ("full", "frozen"),
    "ours, full, cached": ("full", "cached"),
}
WARM = 2  # steps that are not counted: the first one also fills our cache of latents and text states
BETA = 500.0  # larger ones make rounding grow from step to step
RATE = 1e-5
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def rows_of(count: int) -> list[dict[str, Any]]:
    """Pairs of the world `shapes`: a right picture against a picture of something else, as PNG."""
    import io
    import random

    from polyalign.datasets.worlds import shapes

    def png(spec: Any, draws: random.Random) -> dict[str, bytes]:
        file = io.BytesIO()
        shapes.render(spec, draws).save(file, "PNG")
        return {"bytes": file.getvalue()}

    rows = []
    for index in range(count):
        draws = random.Random(index)
        spec, other = shapes.random_spec(draws), shapes.random_spec(draws)
        condition = {"prompt": shapes.caption(spec)}
        pictures = {"chosen": png(spec, draws), "rejected": png(other, draws)}
        rows.append({"pair_id": f"pair-{index}", "condition": condition, **pictures})
    return rows


def adapter_of(train: str) -> Any:
    from polyalign.modalities.image.adapter import ImageAdapter
    from polyalign.modalities.image.settings import ImageModelSettings

    return ImageAdapter(ImageModelSettings(train=train, rank=16, posterior="mode"))  # type: ignore[arg-type]


class Pairs:
    """Rows held in memory, in the form the trainer asks for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.all = rows

    def __len__(self) -> int:
        return len(self.all)

    def rows(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self.all[index] for index in indices]


def ours(train: str, seat: str, rows: Sequence[Mapping[str, Any]], steps: int) -> tuple[list[float], list[float]]:
    """Processor seconds and losses of each step, by the trainer that recipes use."""
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.objectives.table import DPO, build
    from polyalign.core.recipe import BetaConfig, OptimizerConfig, ReferenceConfig, ScheduleConfig, TrainSettings
    from polyalign.core.references import build_seat
    from polyalign.core.trainer import Trainer

    class Timed(DirectPreference):
        def prepare(self, rows: Any, *, step: int) -> Any:
            began.append(time.process_time())
            return super().prepare(rows, step=step)

    began: list[float] = []
    adapter = adapter_of(train)
    model = adapter.trainable(adapter.load())
    reference = ReferenceConfig(seat=seat, draws_per_pair=1)  # type: ignore[arg-type]
    settings = TrainSettings(
        steps=steps,
        batch_size=len(rows),
        micro_batch_size=len(rows),
        optimizer=OptimizerConfig(name="adamw", learning_rate=RATE),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        save_every=steps,
        reference=reference,
    )
    beta = BetaConfig(value=BETA, convention="mean_half")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        algorithm = Timed(
            adapter,
            model,
            build(DPO(beta=beta)),
            Beta.of(beta),
            {"reference": build_seat(reference, model.network, folder=place / "reference", identity="benchmark")},
            draw_bank=1 if seat == "cached" else None,
        )
        Trainer(algorithm, Pairs(rows), settings, place).run()
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    taken = [after - before for before, after in zip(began[-steps:], began[-steps + 1 :], strict=False)]
    return taken, [line["loss"] for line in lines]


def run_variant(name: str, pairs: int, steps: int, threads: int) -> dict[str, Any]:
    import torch
    from benchmarks.live_loop import live_loop

    torch.set_num_threads(threads)
    train, seat = VARIANTS[name]
    rows = rows_of(pairs)
    if seat is None:
        seconds, losses = live_loop(adapter_of(train), rows, steps, beta=BETA, rate=RATE)
    else:
        seconds, losses = ours(train, seat, rows, steps)
    return {
        "seconds_per_step": statistics.median(seconds[WARM:]),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| variant | s a step | ratio | peak memory, MiB |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        live = results["live loop, LoRA" if "LoRA" in name else "live loop, full"]
        ratio = result["seconds_per_step"] / live["seconds_per_step"]
        lines.append(f"| {name} | {result['seconds_per_step']:.3f} | {ratio:.2f} | {result['peak_memory_mib']:.0f} |")
    return lines


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Over the steps, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--variant", choices=list(VARIANTS), help="run one only, in this process")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run_variant(options.variant, options.pairs, options.steps, options.threads)))
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("pairs", "steps", "threads")]
    results = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.image_dpo", "--variant", name, *sizes]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {results[name]['seconds_per_step']:.3f} s a step", file=sys.stderr)
    differences = {
        "LoRA": largest_difference(results["live loop, LoRA"]["losses"], results["ours, LoRA, adapter off"]["losses"]),
        "full": largest_difference(results["live loop, full"]["losses"], results["ours, full, frozen copy"]["losses"]),
    }
    print("\n".join(table(results)))
    print(f"largest relative difference of the losses of ours and the live loop: {differences}")
    if options.out is not None:
        record = {
            "command": f"python -m benchmarks.image_dpo {' '.join(sizes)}",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "results": results,
            "loss_differences": differences,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
