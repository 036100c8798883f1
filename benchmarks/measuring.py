"""What the benchmarks against TRL share: words, the loops of both sides with their clocks, processes, and the record.

Seconds are those of the processor (all threads together) between the ends of two steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

BETA = 0.1
RATE = 1e-4
RANK = 16
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Measured = tuple[list[float], list[float]]
"""Processor seconds and losses of each step."""


# --- words --------------------------------------------------------------------------------------------------------------------


def word_tokenizer(words: int, *special: str, **named: Any) -> Any:
    """A tokenizer whose tokens are the words w0, w1, ..., and the special ones behind <pad>, <end> and <unknown>; ``named`` are
    further arguments of transformers' tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<end>", "<unknown>", *special, *(f"w{number}" for number in range(words))]
    tokens = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unknown>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", model_max_length=4096, **named
    )


def random_words(draws: random.Random, count: int, words: int) -> str:
    """A word is a token, and begins with its space, so that answers do not grow into their prompts."""
    return "".join(f" w{draws.randrange(words)}" for _ in range(count))


# --- the peer -----------------------------------------------------------------------------------------------------------------


def start_equal(network: Any) -> None:
    """Give every LoRA the same weights on both sides: A drawn by place, B zero as it is."""
    import torch

    downs = [(name, weight) for name, weight in network.named_parameters() if "lora_A" in name]
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(downs)):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(place)) / weight.shape[1] ** 0.5)


def peer(
    network: Any,
    processing: Any,
    data: Any,
    *,
    batch: int,
    epochs: int = 1,
    cached: bool = False,
    targets: list[str] | str | None = None,
    sampling: str = "random",
) -> Measured:
    """TRL's trainer over ``data`` (a ``datasets.Dataset``), with a LoRA on ``targets``, or with all weights (None)."""
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.process_time())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            train_sampling_strategy=sampling,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            max_grad_norm=1.0,
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,
            precompute_ref_log_probs=cached,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        lora = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": targets, "task_type": "CAUSAL_LM"}
        trainer = DPOTrainer(
            model=network,
            args=settings,
            train_dataset=data,
            processing_class=processing,
            peft_config=None if targets is None else LoraConfig(**lora),  # type: ignore[arg-type]
            callbacks=[clock],
        )
        start_equal(trainer.model)
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)], clock.losses


# --- ours ---------------------------------------------------------------------------------------------------------------------


class Pairs:
    """Rows held in memory, in the form the trainer asks for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.all = rows

    def __len__(self) -> int:
        return len(self.all)

    def rows(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self.all[index] for index in indices]


def ours(
    adapter: Any,
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch: int,
    steps: int,
    seat: str,
    objective: str = "dpo",
    beforehand: Any = None,
) -> Measured:
    """The trainer that recipes use, over ``rows``, again and again until ``steps`` are done.

    Args:
        seat: of the reference.
        beforehand: an adapter that scores every row for a cached reference before the first step. Without one that happens as
            the rows come.
    """
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.objectives.table import TABLE, build
    from polyalign.core.recipe import BetaConfig, OptimizerConfig, ReferenceConfig, ScheduleConfig, TrainSettings
    from polyalign.core.references import build_seat
    from polyalign.core.trainer import Trainer

    class Timed(DirectPreference):
        def prepare(self, rows: Any, *, step: int) -> Any:
            began.append(time.process_time())
            return super().prepare(rows, step=step)

    began: list[float] = []
    start_equal(model.network)
    reference = ReferenceConfig(seat=seat, draws_per_pair=1)  # type: ignore[arg-type]
    training = TrainSettings(
        steps=steps + 1,  # a step's time ends where the next begins
        batch_size=batch,
        micro_batch_size=batch,
        optimizer=OptimizerConfig(name="adamw", learning_rate=RATE, weight_decay=0.0, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        clip_norm=1.0,
        save_every=steps + 1,
        reference=reference,
    )
    beta = BetaConfig(value=BETA, convention="nats")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        kept = build_seat(reference, model.network, folder=place / "reference", identity="benchmark")
        if beforehand is not None:
            for start in range(0, len(rows), batch):
                kept.scores(beforehand, model, beforehand.prepare(model, rows[start : start + batch], step=0), None, index=0)
        bank = 1 if seat == "cached" else None
        loss = build(TABLE[objective].parameters(beta=beta))
        algorithm = Timed(adapter, model, loss, Beta.of(beta), {"reference": kept}, draw_bank=bank)
        Trainer(algorithm, Pairs(rows), training, place).run()
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    began = began[-(steps + 1) :]  # those before filled the cache
    taken = [after - before for before, after in zip(began, began[1:], strict=False)]
    return taken, [line["loss"] for line in lines][:steps]


# --- processes and records ----------------------------------------------------------------------------------------------------


def begin(threads: int) -> None:
    """Before anything else in a process that measures."""
    importlib.import_module("polyalign")  # first: it mends torchvision's CPU wheels, without which much does not import
    import torch

    torch.set_num_threads(threads)


def peak_memory_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(module: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What ``module`` prints at the end, as JSON, when it runs with these options in a process of its own."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    done = subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the losses of two sides over the steps, relative to the first."""
    return max(abs(theirs - own) / abs(theirs) for theirs, own in zip(first, second, strict=True))


def write_record(path: Path, module: str, options: argparse.Namespace, sizes: Sequence[str], results: Any) -> None:
    """The figures with the command and what it ran on."""
    words = " ".join(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes)
    record = {
        "command": f"python -m {module} {words}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
