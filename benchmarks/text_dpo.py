"""One optimiser step of DPO on text: ours against TRL's DPOTrainer, on the same random-weight Llama, rows and loss.

    python -m benchmarks.text_dpo

Needs TRL (``pip install trl==1.16.0``). Variants are {full, LoRA} x {live reference, cached reference} x lengths of the prompt;
answers have 64 tokens. Every variant runs in a process of its own; a step trains on all rows, so that both sides see the same
batch, and the losses of the two sides are compared step by step. Seconds are those of the processor (all threads together)
between the ends of two steps, after one step of warming up, divided by the pairs of a step; memory is the peak of the process.

TRL runs at its best here: without gradient checkpointing (its default would recompute every layer), without dropout, and with
its LM head that builds no logits, which is always on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
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

LENGTHS = (64, 256, 576, 1152)
ANSWER = 64  # tokens, the end among them
WORDS = 8000
BETA = 0.1
RATE = 1e-4
RANK = 16
WARM = 1  # steps that are not counted
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- what both sides share ----------------------------------------------------------------------------------------------------


def rows_of(pairs: int, prompt_tokens: int) -> list[dict[str, str]]:
    """Rows of random words. A word is a token, and begins with its space, so that answers do not grow into their prompts."""
    draws = random.Random(prompt_tokens)

    def words(count: int) -> str:
        return "".join(f" w{draws.randrange(WORDS)}" for _ in range(count))

    return [{"prompt": words(prompt_tokens), "chosen": words(ANSWER - 1), "rejected": words(ANSWER - 1)} for _ in range(pairs)]


def write_model(folder: Path, width: int, layers: int) -> None:
    """A Llama with random weights, and a tokenizer whose tokens are words, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<end>", "<unknown>", *(f"w{number}" for number in range(WORDS))]
    tokens = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unknown>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", model_max_length=4096
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start_equal(network: Any) -> None:
    """Give every LoRA the same weights on both sides: A drawn by place, B zero as it is."""
    import torch

    downs = [(name, weight) for name, weight in network.named_parameters() if "lora_A" in name]
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(downs)):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(place)) / weight.shape[1] ** 0.5)


# --- the peer -----------------------------------------------------------------------------------------------------------------


def peer(
    train: str, cached: bool, model: Path, rows: Sequence[Mapping[str, str]], steps: int
) -> tuple[list[float], list[float]]:
    """Processor seconds and losses of each step by TRL."""
    importlib.import_module("polyalign")  # first: it mends torchvision's CPU wheels, without which trl does not import
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
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
            per_device_train_batch_size=len(rows),
            num_train_epochs=steps,
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
        lora = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=settings,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=lora if train == "lora" else None,
            callbacks=[clock],
        )
        start_equal(trainer.model)
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)], clock.losses


# --- ours ---------------------------------------------------------------------------------------------------------------------


class Pairs:
    """Rows held in memory, in the form the trainer asks for."""

    def __init__(self, rows: Sequence[Mapping[str, str]]):
        self.all = [
            {"pair_id": f"pair-{index}", "condition": {"prompt": row["prompt"]}, **{s: row[s] for s in ("chosen", "rejected")}}
            for index, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self.all)

    def rows(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self.all[index] for index in indices]


def ours(
    train: str, cached: bool, sharing: str, model: Path, rows: Sequence[Mapping[str, str]], steps: int
) -> tuple[list[float], list[float]]:
    """Processor seconds and losses of each step, by the trainer that recipes use."""
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.objectives.table import DPO, build
    from polyalign.core.recipe import BetaConfig, OptimizerConfig, ReferenceConfig, ScheduleConfig, TrainSettings
    from polyalign.core.references import build_seat
    from polyalign.core.trainer import Trainer
    from polyalign.modalities.text.adapter import TextAdapter
    from polyalign.modalities.text.settings import TextModelSettings

    class Timed(DirectPreference):
        def prepare(self, rows: Any, *, step: int) -> Any:
            began.append(time.process_time())
            return super().prepare(rows, step=step)

    began: list[float] = []
    settings = TextModelSettings(base=str(model), train=train, rank=RANK, targets=tuple(TARGETS), prefix_sharing=sharing)  # type: ignore[arg-type]
    adapter = TextAdapter(settings)
    loaded = adapter.trainable(adapter.load())
    start_equal(loaded.network)
    live = "adapter_off" if train == "lora" else "frozen"
    reference = ReferenceConfig(seat="cached" if cached else live, draws_per_pair=1)  # type: ignore[arg-type]
    training = TrainSettings(
        steps=steps + 1,  # a step's time ends where the next begins
        batch_size=len(rows),
        micro_batch_size=len(rows),
        optimizer=OptimizerConfig(name="adamw", learning_rate=RATE, weight_decay=0.0, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        clip_norm=1.0,
        save_every=steps + 1,
        reference=reference,
    )
    beta = BetaConfig(value=BETA, convention="nats")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        seat = build_seat(reference, loaded.network, folder=place / "reference", identity="benchmark")
        bank = 1 if cached else None
        algorithm = Timed(adapter, loaded, build(DPO(beta=beta)), Beta.of(beta), {"reference": seat}, draw_bank=bank)
        Trainer(algorithm, Pairs(rows), training, place).run()
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    began = began[-(steps + 1) :]  # those before filled the cache
    taken = [after - before for before, after in zip(began, began[1:], strict=False)]
    return taken, [line["loss"] for line in lines][:steps]


# --- the table ----------------------------------------------------------------------------------------------------------------

SIDES = {"TRL": None, "ours": "auto", "ours, prompt not shared": "off"}


def run_variant(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    rows, cached = rows_of(options.pairs, options.prompt), options.reference == "cached"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(model, options.width, options.layers)
        sharing = SIDES[options.side]
        if sharing is None:
            seconds, losses = peer(options.train, cached, model, rows, options.steps)
        else:
            seconds, losses = ours(options.train, cached, sharing, model, rows, options.steps)
    return {
        "seconds_per_pair": statistics.median(seconds[WARM:]) / options.pairs,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| trained | reference | prompt | TRL, s a pair | ours | faster | not shared | loss differs | MiB, TRL | MiB, ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        sides = one["sides"]
        trl, own, plain = (sides[side]["seconds_per_pair"] for side in SIDES)
        cells = [one["train"], one["reference"], one["prompt"], f"{trl:.3f}", f"{own:.3f}", f"{trl / own:.2f} x"]
        cells += [f"{trl / plain:.2f} x", f"{one['loss_difference']:.0e}"]
        cells += [f"{sides[side]['peak_memory_mib']:.0f}" for side in ("TRL", "ours")]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def compared(options: argparse.Namespace, train: str, reference: str, prompt: int) -> dict[str, Any]:
    """All sides of one row of the table, each in its own process."""
    numbers = {name: getattr(options, name) for name in ("pairs", "steps", "threads", "width", "layers")}
    sides = {}
    for side in SIDES:
        chosen = {"side": side, "train": train, "reference": reference, "prompt": prompt, **numbers}
        words = [f"--{name}={value}" for name, value in chosen.items()]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.text_dpo", *words], check=True, stdout=subprocess.PIPE, text=True
        )
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{train}, {reference}, {prompt}, {side}: {sides[side]['seconds_per_pair']:.3f} s a pair", file=sys.stderr)
    losses = zip(sides["TRL"]["losses"], sides["ours"]["losses"], strict=True)
    difference = max(abs(theirs - own) / abs(theirs) for theirs, own in losses)
    return {"train": train, "reference": reference, "prompt": prompt, "sides": sides, "loss_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--side", choices=list(SIDES), help="run one only, in this process; the next three say which")
    parser.add_argument("--train", choices=("full", "lora"), default="lora")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--prompt", type=int, default=256)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_variant(options)))
        return
    kinds = [(train, reference) for train in ("full", "lora") for reference in ("live", "cached")]
    results = [compared(options, *kind, prompt) for kind in kinds for prompt in LENGTHS]
    print("\n".join(table(results)))
    if options.out is not None:
        sizes = " ".join(f"--{name}={getattr(options, name)}" for name in ("pairs", "steps", "threads", "width", "layers"))
        record = {
            "command": f"python -m benchmarks.text_dpo {sizes}",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
