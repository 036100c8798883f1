"""Train the embedded base: ``python -m polyalign.modalities.vlm.pretrain FOLDER``.

It learns to answer questions about pictures of the world `scenes`: first about single ones, then mostly about one of two,
seldom of three, hardly ever of four. So it learns that ``Image2`` is the second picture, and still errs where there are more.
Captions of its training data are wrong as often as `scenes_questions.ERRORS` says, so that sampled captions tell of what is not
there.

It is gated at the end, on compositions that are held out, answers being greedy: above 0.9 right about single pictures, above
0.85 about one of two, and between 0.45 and 0.9 about one of four. Looking at a picture by chance gives a half of the first for
two, and a quarter for four, since no other picture has the same answer.

Only the tokens of answers count. AdamW with a warm-up and a cosine, and an exponential moving average of the weights, which is
what is kept. Every draw is keyed by its step, so that a killed run continues to the same weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from polyalign.core.randomness import seed_of
from polyalign.datasets.multi_image.hard import Format
from polyalign.datasets.worlds import scenes_questions, scenes_rows
from polyalign.datasets.worlds.scenes_questions import TASKS, noisy_answer
from polyalign.modalities.pretraining import Pace, Stage, Work, command_line, digest, unfit_in_words, write_record
from polyalign.modalities.vlm import tiny_architecture as tiny

MODULE = "polyalign.modalities.vlm.pretrain"
IGNORED = -100
# Captions teach to see, and every picture has another: a run with 2 of them in 13 (and 400 first steps) had learnt none after
# 2,400 steps. Counts, and what a post is about, take longest.
LESSONS = (*TASKS, "what", "what", "exists", "count", "count", "alt", "alt")
NAMES = ("one", "two", "three", "four")
MEASURING = ("save_every", "watched", "measured")
"""Settings that leave the weights as they are."""


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were trained with; the command line changes ``steps`` only, for trials."""

    seed: int = 20261121
    steps: int = 4_800
    alone: int = 600
    """First steps, with single pictures only."""
    shares: tuple[float, float, float, float] = (0.40, 0.46, 0.09, 0.05)
    """Of the later steps, with one, two, three and four pictures a question."""
    batches: tuple[int, int, int, int] = (64, 40, 28, 20)
    """Questions a step, by the number of pictures."""
    rate: float = 2e-3
    warmup: int = 50
    ema: float = 0.998
    tokenizer_texts: int = 4_000
    save_every: int = 600
    watched: int = 60
    measured: int = 500


@dataclass(frozen=True)
class Batch:
    """ids and labels (B, U), padded on the right, and the pictures (N, 3, 32, 32) in the order of their tokens."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor


def exercises(step: int, settings: Settings) -> list[tuple[dict[str, Any], str]]:
    """A step's rows and answers, as the training data have them."""
    draws = random.Random(seed_of(settings.seed, "exercises", step))
    pictures = 1 if step < settings.alone else draws.choices(range(1, 5), settings.shares)[0]
    found = []
    while len(found) < settings.batches[pictures - 1]:
        one = scenes_rows.exercise("train", pictures, draws, LESSONS)
        answer = noisy_answer(one.question, one.scene, draws)
        assert answer is not None  # an exercise's question has an answer
        found.append((scenes_rows.row_of(one, f"{step}-{len(found)}"), answer))
    return found


def prompts_of(processor: Any, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The chat template's text of every row, each picture as many tokens as it has."""
    messages = [row["condition"]["messages"] for row in rows]
    texts = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [text.replace(tiny.IMAGE, tiny.IMAGE * tiny.IMAGE_TOKENS) for text in texts]


def pixels_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """(N, 3, 32, 32), as the processor makes them of pictures of this size."""
    pictures = np.stack([np.asarray(picture) for row in rows for picture in row["condition"]["images"]])
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tiny.MEAN, tiny.STD))
    return (scaled - mean) / std


def batch_of(processor: Any, given: Sequence[tuple[dict[str, Any], str]]) -> Batch:
    """Prompts, and after each its answer with the end, whose tokens are the labels."""
    tokenizer, rows = processor.tokenizer, [row for row, _ in given]
    prompts = tokenizer(prompts_of(processor, rows), add_special_tokens=False).input_ids
    answers = tokenizer([f" {answer}{tiny.END}" for _, answer in given], add_special_tokens=False).input_ids
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[index, :end] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return Batch(ids, labels, pixels_of(rows))


def stage_of(network: LlavaForConditionalGeneration, settings: Settings, folder: Path) -> Stage:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    pace = Pace(settings.steps, settings.rate, settings.warmup, settings.ema, settings.save_every)
    made_with = {name: value for name, value in asdict(settings).items() if name not in MEASURING}
    return Stage("answers", network, optimizer, pace, Work(folder, made_with))


def loss_at(step: int, network: LlavaForConditionalGeneration, processor: Any, settings: Settings) -> Tensor:
    """Mean cross-entropy of the answers' tokens. Rows are padded on the right, where a causal model does not look."""
    batch = batch_of(processor, exercises(step, settings))
    answered: Any = network(input_ids=batch.ids[:, :-1], pixel_values=batch.pixels)
    return F.cross_entropy(answered.logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def answers(
    network: LlavaForConditionalGeneration, processor: Any, rows: Sequence[dict[str, Any]], seed: int | None = None
) -> list[str]:
    """One answer for each row: greedy, or with a seed a sample at temperature 1."""
    processor.tokenizer.padding_side = "left"
    sampler: Any = network  # transformers' annotations of generate ask for attributes that its models do not declare
    how: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    texts: list[str] = []
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        messages = [row["condition"]["messages"] for row in part]
        inputs = processor(
            text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=[row["condition"]["images"] for row in part],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if seed is None else seed + start)
            made = sampler.generate(**inputs, **how, max_new_tokens=32)
        texts += processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    processor.tokenizer.padding_side = "right"
    return texts


def measure(network: LlavaForConditionalGeneration, processor: Any, settings: Settings, count: int) -> dict[str, float]:
    """Shares of held-out questions: right by number of pictures, taken from another picture (confused), of collages of two, of
    each task with single pictures; and of sampled captions: right, and telling of what is not there."""
    network.eval()
    figures: dict[str, float] = {}

    def held_out(pictures: int, format: Format = "sequence", tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
        return scenes_rows.rows("heldout", count, settings.seed, pictures=pictures, format=format, tasks=tasks)

    for pictures, name in enumerate(NAMES, start=1):
        rows = held_out(pictures)
        figures |= _figures(name, rows, answers(network, processor, rows))
    rows = held_out(2, "grid")
    figures |= _figures("collage_of_two", rows, answers(network, processor, rows))
    rows = held_out(1, tasks=("what",))
    figures |= _figures("sampled_caption", rows, answers(network, processor, rows, settings.seed))
    network.train()
    return figures


def _figures(name: str, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, float]:
    asked = [scenes_questions.asked(row["condition"]) for row in rows]
    verdicts = [one.verdict(text) for one, text in zip(asked, texts, strict=True)]
    found = {name: _share([verdict == "right" for verdict in verdicts])}
    if asked[0].others:
        found[f"{name}_confused"] = _share([one.confused(text) for one, text in zip(asked, texts, strict=True)])
    if name == NAMES[0]:
        for task in TASKS:
            of_task = [verdict == "right" for verdict, one in zip(verdicts, asked, strict=True) if one.question.task == task]
            found[f"{name}_{task}"] = _share(of_task)
    if name == "sampled_caption":
        found[f"{name}_hallucinated"] = _share([verdict == "hallucinated" for verdict in verdicts])
    return found


def _share(found: Sequence[bool]) -> float:
    return round(sum(found) / max(1, len(found)), 4)


def unfit(figures: dict[str, float]) -> str | None:
    """Why a base with these figures is none to align, or None."""
    if figures["one"] <= 0.9:
        return f"{figures['one']} right about single pictures, which is not above 0.9: it has not learnt to see"
    if figures["two"] <= 0.85:
        return f"{figures['two']} right about one of two pictures, which is not above 0.85: it does not know which is meant"
    if not 0.45 <= figures["four"] <= 0.9:
        return f"{figures['four']} right about one of four pictures; 0.45 to 0.9 leaves something to learn"
    return None


def texts(settings: Settings) -> list[str]:
    """Conversations of the training data, for the tokenizer."""
    draws = random.Random(seed_of(settings.seed, "tokenizer"))
    found = []
    for index in range(settings.tokenizer_texts):
        one = scenes_rows.exercise("train", 1 + index % scenes_rows.MOST_PICTURES, draws)
        found.append(f"USER: Image1:\nImage2:\n{one.opening()} ASSISTANT: {one.answer}")
    return found


def new_processor(settings: Settings) -> Any:
    """The processor, its tokenizer learnt from the training data's texts."""
    return tiny.processor_of(tiny.tokenizer_of(texts(settings)))


def pretrain(folder: Path, settings: Settings, options: Sequence[str] = ("FOLDER",)) -> dict[str, Any]:
    """Train a base and write it to ``folder`` with ``base.json``, its record, which is returned. ``options`` are the words of
    the command line, for the record.

    Raises:
        UserError: the state in ``FOLDER.work`` is of a run with other settings.
    """
    started = time.time()
    work = folder.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    processor = new_processor(settings)
    network = tiny.build(processor.tokenizer, settings.seed)
    stage_of(network, settings, work).run(
        lambda step: loss_at(step, network, processor, settings),
        lambda: measure(network, processor, settings, settings.watched),
    )
    tiny.save(folder, network.to(torch.float16), new_processor(settings))  # the other has kept how it padded
    kept = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)  # measured as it is shipped
    found = {
        "world": "scenes",
        "errors_in_its_captions": dict(scenes_questions.ERRORS),
        "settings": asdict(settings),
        "sha256": digest(folder),
        "figures": measure(kept, AutoProcessor.from_pretrained(folder), settings, settings.measured),
    }
    return write_record(folder, found, started=started, module=MODULE, options=options)


def main(argv: Sequence[str] | None = None) -> None:
    def train(folder: Path, lengths: dict[str, int], words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        record = pretrain(folder, Settings(**lengths), words)
        return record, unfit_in_words(unfit(record["figures"]))

    command_line(argv, __doc__, {"steps": Settings.steps}, train)


if __name__ == "__main__":
    main()
