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
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import RANK, TARGETS, Measured

LENGTHS = (64, 256, 576, 1152)
ANSWER = 64  # tokens, the end among them
WORDS = 8000
WARM = 1  # steps that are not counted
SIZES = ("pairs", "steps", "threads", "width", "layers")


# --- what both sides share ----------------------------------------------------------------------------------------------------


def rows_of(pairs: int, prompt_tokens: int) -> list[dict[str, str]]:
    """Rows of random words."""
    draws = random.Random(prompt_tokens)
    lengths = {"prompt": prompt_tokens, "chosen": ANSWER - 1, "rejected": ANSWER - 1}
    return [{name: measuring.random_words(draws, count, WORDS) for name, count in lengths.items()} for _ in range(pairs)]


def write_model(folder: Path, width: int, layers: int) -> None:
    """A Llama with random weights, and a tokenizer whose tokens are words, as a transformers folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = measuring.word_tokenizer(WORDS)
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
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


# --- the two sides ------------------------------------------------------------------------------------------------------------


def peer(train: str, cached: bool, model: Path, rows: Sequence[Mapping[str, str]], steps: int) -> Measured:
    """TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return measuring.peer(
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
        Dataset.from_list([dict(row) for row in rows]),
        batch=len(rows),
        epochs=steps,
        cached=cached,
        targets=TARGETS if train == "lora" else None,
    )


def ours(train: str, cached: bool, sharing: str, model: Path, rows: Sequence[Mapping[str, str]], steps: int) -> Measured:
    """The trainer that recipes use."""
    from polyalign.modalities.text.adapter import TextAdapter
    from polyalign.modalities.text.settings import TextModelSettings

    settings = TextModelSettings(base=str(model), train=train, rank=RANK, targets=tuple(TARGETS), prefix_sharing=sharing)  # type: ignore[arg-type]
    adapter = TextAdapter(settings)
    live = "adapter_off" if train == "lora" else "frozen"
    pairs = [
        {"pair_id": f"pair-{index}", "condition": {"prompt": row["prompt"]}, **{s: row[s] for s in ("chosen", "rejected")}}
        for index, row in enumerate(rows)
    ]
    return measuring.ours(
        adapter, adapter.trainable(adapter.load()), pairs, batch=len(rows), steps=steps, seat="cached" if cached else live
    )


# --- the table ----------------------------------------------------------------------------------------------------------------

SIDES = {"TRL": None, "ours": "auto", "ours, prompt not shared": "off"}


def run_variant(options: argparse.Namespace) -> dict[str, Any]:
    measuring.begin(options.threads)
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
        "peak_memory_mib": measuring.peak_memory_mib(),
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
    numbers = {name: getattr(options, name) for name in SIZES}
    sides = {}
    for side in SIDES:
        chosen = {"side": side, "train": train, "reference": reference, "prompt": prompt, **numbers}
        sides[side] = measuring.apart("benchmarks.text_dpo", chosen)
        print(f"{train}, {reference}, {prompt}, {side}: {sides[side]['seconds_per_pair']:.3f} s a pair", file=sys.stderr)
    difference = measuring.largest_difference(sides["TRL"]["losses"], sides["ours"]["losses"])
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
        measuring.write_record(options.out, "benchmarks.text_dpo", options, SIZES, results)


if __name__ == "__main__":
    main()
