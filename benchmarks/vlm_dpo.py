"""One optimiser step of DPO on images and text: ours against TRL, and MCM-DPO's eight sequences against plain ones.

    python -m benchmarks.vlm_dpo

Needs TRL (``pip install trl==1.16.0``). Models are a LLaVA and a Qwen2.5-VL with random weights and a LoRA on the language
tower; a picture has 576 tokens, a question 24, both answers equally many. Every variant runs in a process of its own; a step
trains on one pair, and the losses of all sides are compared step by step. Seconds are those of the processor (all threads
together) between the ends of two steps, after one step of warming up, divided by the pairs of a step; memory is the peak of the
process. Decoding and preparing pictures is part of every step, on every side.

**New pictures**, the headline, is a first epoch: every step has a pair that was not seen before, so that its features are
computed in that step, by ours once for chosen, rejected, policy and reference. **Pictures seen before** is the epoch after it:
tower and projector stand still, and ours has kept the features. Ours is shown with a live reference, and with one whose scores
were computed before the first step; TRL refuses that (``precompute_ref_log_probs``) for images, so its one mode stands beside
both. "Plain" is ours with each sequence and its pictures computed for itself, as TRL does it.

TRL runs at its best: without gradient checkpointing, without dropout, rows without padding. Tower and vocabulary are as narrow
as they are beside the language towers of 7B models, or what is saved on them would count for too much: on a CPU, TRL's LM head
also scores the positions of pictures. The last row is of towers twice as wide.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import RANK, TARGETS, Measured

MODULE = "benchmarks.vlm_dpo"
QUESTION = 24  # tokens
WORDS = 500
WARM = 1  # steps that are not counted
SIDE = {"llava": 336, "qwen2_5_vl": 672}  # of a picture in pixels: 576 tokens
SIZES = ("pairs", "steps", "threads", "width", "layers", "vision_width", "vision_layers")
SIDES = {"pair": ("TRL", "plain", "live", "cached"), "eight": ("plain", "live", "cached")}
EIGHT = ("chosen", "response", "image", "image+response", "context", "context+response", "context+image")
BRANCHES = {"pair": EIGHT[:2], "eight": (*EIGHT, "context+image+response")}
TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}PICTURE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if turn['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
)


# --- what both sides share ----------------------------------------------------------------------------------------------------


def picture(draws: random.Random, side: int) -> dict[str, Any]:
    """Blocks of random colours, as PNG."""
    from PIL import Image

    image = Image.frombytes("RGB", (8, 8), draws.randbytes(8 * 8 * 3)).resize((side, side), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each pair of an epoch, every one with pictures of its own."""
    draws = random.Random(options.images)

    def words(count: int) -> str:
        return measuring.random_words(draws, count, WORDS)

    def asked() -> list[dict[str, Any]]:
        parts = [*[{"type": "image"}] * options.images, {"type": "text", "text": words(QUESTION)}]
        return [{"role": "user", "content": parts}]

    def pictures() -> list[dict[str, Any]]:
        return [picture(draws, SIDE[options.family]) for _ in range(options.images)]

    return [
        {
            "pair_id": f"pair-{index}",
            "condition": {"messages": asked(), "images": pictures()},
            "chosen": words(options.answer - 1),  # the end is a token too
            "rejected": words(options.answer - 1),
            "rejected_images": pictures(),
            "rejected_messages": asked(),
        }
        for index in range(options.pairs * options.steps)
    ]


def text_of(options: argparse.Namespace, words: int) -> dict[str, Any]:
    """The configuration of the language tower."""
    return {
        "vocab_size": words,
        "hidden_size": options.width,
        "intermediate_size": options.width * 8 // 3,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "num_key_value_heads": options.width // 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def llava(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokens = measuring.word_tokenizer(WORDS, "<image>", extra_special_tokens={"image_token": "<image>"})
    side = SIDE["llava"]
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    vision = CLIPVisionConfig(
        hidden_size=options.vision_width,
        intermediate_size=4 * options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_width // 32,
        image_size=side,
        patch_size=14,
    )
    text = LlamaConfig(**text_of(options, len(tokens)))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokens.image_token_id)
    processor = LlavaProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = TEMPLATE.replace("PICTURE", "<image>")
    return config, processor


def qwen2_5_vl(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    special = {"image_token": names[2], "video_token": names[3]}
    tokens = measuring.word_tokenizer(WORDS, *names, extra_special_tokens=special)
    start, end, image, video = tokens.convert_tokens_to_ids(list(names))
    vision = {
        "depth": options.vision_layers,
        "hidden_size": options.vision_width,
        "out_hidden_size": options.width,
        "intermediate_size": options.vision_width * 8 // 3,
        "num_heads": options.vision_width // 32,
        "patch_size": 14,
        "fullatt_block_indexes": [options.vision_layers - 1],
        "window_size": 112,
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        text_config={**text_of(options, len(tokens)), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 56**2, "longest_edge": 1024**2}
    )
    processor = Qwen2_5_VLProcessor(images, tokens, Qwen2VLVideoProcessor())
    processor.chat_template = TEMPLATE.replace("PICTURE", f"{names[0]}{names[2]}{names[1]}")
    return config, processor


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}


def write_model(options: argparse.Namespace, folder: Path) -> None:
    """A model with random weights and its processor, as a transformers folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    config, processor = FAMILIES[options.family](options)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


# --- the two sides ------------------------------------------------------------------------------------------------------------


def peer(options: argparse.Namespace, model: Path, rows: Sequence[Mapping[str, Any]]) -> Measured:
    """TRL, over the rows in the order in which ours takes them."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from polyalign.core.trainer import order

    def turns(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    turn = [{"role": Value("string"), "content": Value("string")}]
    examples = [
        {
            "prompt": turns("user", row["condition"]["messages"][0]["content"][-1]["text"]),  # it puts the pictures first
            "chosen": turns("assistant", row["chosen"]),
            "rejected": turns("assistant", row["rejected"]),
            "images": row["condition"]["images"],
        }
        for row in (rows[place] for place in order(0, len(rows), 0))
    ]
    features = Features({"prompt": turn, "chosen": turn, "rejected": turn, "images": Sequence(Image())})
    return measuring.peer(
        AutoModelForImageTextToText.from_pretrained(model),
        AutoProcessor.from_pretrained(model),
        Dataset.from_list(examples, features=features),
        batch=options.pairs,
        targets=rf".*language_model.*\.({'|'.join(TARGETS)})",
        sampling="sequential",
    )


def ours(options: argparse.Namespace, model: Path, rows: Sequence[Mapping[str, Any]]) -> Measured:
    """The trainer that recipes use, for two epochs; plain for one, since it keeps nothing."""
    from polyalign.modalities.vlm.adapter import VlmAdapter
    from polyalign.modalities.vlm.settings import VlmModelSettings

    plain, cached = options.side == "plain", options.side == "cached"
    settings = VlmModelSettings(
        base=str(model),
        device="cpu",
        rank=RANK,
        targets=tuple(TARGETS),
        branches=BRANCHES[options.task],
        prefix_sharing="off" if plain else "auto",
    )
    adapter = VlmAdapter(settings)
    loaded = adapter.trainable(adapter.load())
    if plain:  # a family that takes no features is given its pictures once for each sequence
        loaded = replace(loaded, parts={**loaded.parts, "family": replace(loaded.parts["family"], takes_features=False)})
    return measuring.ours(
        adapter,
        loaded,
        rows,
        batch=options.pairs,
        steps=options.steps if plain else 2 * options.steps,
        seat="cached" if cached else "adapter_off",
        objective="mcm_dpo" if options.task == "eight" else "dpo",
        beforehand=VlmAdapter(settings) if cached else None,  # another one, so that features are not known from it
    )


def run_variant(options: argparse.Namespace) -> dict[str, Any]:
    measuring.begin(options.threads)
    rows = rows_of(options)
    with tempfile.TemporaryDirectory() as folder:
        write_model(options, Path(folder))
        side = peer if options.side == "TRL" else ours
        seconds, losses = side(options, Path(folder), rows)
    new, seen = seconds[WARM : options.steps], seconds[options.steps :]
    return {
        "seconds_per_pair": statistics.median(new) / options.pairs,
        "seconds_per_pair_seen_before": statistics.median(seen) / options.pairs if seen else None,
        "peak_memory_mib": measuring.peak_memory_mib(),
        "losses": losses,
    }


# --- the table ----------------------------------------------------------------------------------------------------------------


def compared(options: argparse.Namespace, task: str, family: str, images: int, answer: int) -> dict[str, Any]:
    """All sides of one row of the table, each in its own process."""
    sizes = {name: getattr(options, name) for name in SIZES}
    row = {"task": task, "family": family, "images": images, "answer": answer}
    sides = {}
    for side in SIDES[task]:
        sides[side] = measuring.apart(MODULE, {"side": side, **row, **sizes})
        named = f"{family} {options.width} x {options.layers}, {task}, {images} images, answers of {answer}"
        print(f"{named}, {side}: {sides[side]['seconds_per_pair']:.3f} s a pair", file=sys.stderr)
    first, *others = (side["losses"] for side in sides.values())
    difference = max(measuring.largest_difference(first, losses[: len(first)]) for losses in others)
    return {**row, **sizes, "sides": sides, "loss_difference": difference}


def table(task: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds and memory of what ours is compared with, and how many times faster each way of ours is."""
    base, *ways = SIDES[task]
    shown = [(way, "seconds_per_pair") for way in ways]
    shown += [(way, "seconds_per_pair_seen_before") for way in ways if way != "plain"]
    titles = ["model", "language tower", "tokens of pictures : answer", f"{base}, s a pair"]
    titles += [f"{way}, seen before" if name.endswith("before") else way for way, name in shown]
    titles += ["loss differs", f"MiB, {base}", "MiB, live"]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for one in (result for result in results if result["task"] == task):
        sides = one["sides"]
        known = sides[base]["seconds_per_pair"]
        cells = [one["family"], f"{one['width']} x {one['layers']}", f"{576 * one['images']} : {one['answer']}", f"{known:.3f}"]
        cells += [f"{known / sides[way][name]:.2f} x" for way, name in shown]
        cells += [f"{one['loss_difference']:.0e}", *(f"{sides[side]['peak_memory_mib']:.0f}" for side in (base, "live"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def all_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of both tables."""
    if options.quick:
        return [compared(options, task, "llava", 1, 64) for task in SIDES]
    shapes = [(images, answer) for images in (1, 2) for answer in (64, 100)]
    results = [compared(options, "pair", family, *shape) for family in FAMILIES for shape in shapes]
    results += [compared(options, "eight", family, *shape) for family in FAMILIES for shape in shapes if shape[0] == 1]
    twice = {name: 2 * getattr(options, name) for name in ("width", "layers", "vision_width")}
    return [*results, compared(argparse.Namespace(**{**vars(options), **twice}), "pair", "llava", 2, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1, help="in a step")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch; the first one is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256, help="of the language tower")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-width", type=int, default=64)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one row of each table only")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--side", choices=SIDES["pair"], help="run one only, in this process; the next four say which")
    parser.add_argument("--task", choices=list(SIDES), default="pair")
    parser.add_argument("--family", choices=list(FAMILIES), default="llava")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--answer", type=int, default=64, help="tokens, the end among them")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_variant(options)))
        return
    results = all_rows(options)
    for task in SIDES:
        print("\n".join(["", *table(task, results)]))
    if options.out is not None:
        measuring.write_record(options.out, MODULE, options, SIZES, results)


if __name__ == "__main__":
    main()
