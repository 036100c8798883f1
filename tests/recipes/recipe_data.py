"""What the shipped recipes read, as small as it goes: one place for each path that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from polyalign.core.cli import main
from polyalign.datasets.audio.waves import Wave, encode_flac
from polyalign.datasets.pictures import encode_png

PAIRS = 12
SIDES = ("chosen", "rejected")


def provide(recipe: Any) -> None:
    """Put what ``recipe`` reads into the working directory: pairs in its format, and the folders that its judges look at."""
    pairs = recipe.pairs
    if recipe.modality == "text":
        texts(recipe)
        return
    if recipe.modality == "vlm":
        seen(recipe)
        return
    if pairs.source == "alpaca":
        alpaca(Path(pairs.path))
    if pairs.source == "folders":
        folders(Path(pairs.folder))
    if pairs.source == "pickapic":
        pickapic(Path(pairs.path))
    if pairs.source == "labels":
        liked(Path(pairs.path))
    if pairs.source == "generate" and pairs.prompts.file is not None:
        lines(pairs.prompts.file, [f"a red circle, number {index}" for index in range(PAIRS)])
    for judge in (*pairs.judges, *recipe.evaluate.judges):
        if "pictures" in judge.options:
            drawings(Path(judge.options["pictures"]).parent)
    if pairs.source == "relabel":
        pickapic(Path("pickapic_v2"))
        assert main(["generate", "image/diffusion_dpo_sd15"]) == 0, "the recipe that says where its pairs come from"
        assert Path(pairs.store).is_dir()


def sides(index: int) -> tuple[bytes, bytes]:
    """Chosen and rejected: red and grey, in every third pair grey and red."""
    colours = [(200, 40 + index, 40), (90, 90 + index, 90)]
    first, second = reversed(colours) if index % 3 == 0 else colours
    return encode_png(Image.new("RGB", (40, 32), first)), encode_png(Image.new("RGB", (32, 40), second))


def folders(place: Path) -> None:
    """chosen/ with captions, and rejected/."""
    for index in range(PAIRS):
        for side, content in zip(("chosen", "rejected"), sides(index), strict=True):
            (place / side).mkdir(parents=True, exist_ok=True)
            (place / side / f"{index}.png").write_bytes(content)
        (place / "chosen" / f"{index}.txt").write_text(f"a red circle, number {index}", encoding="utf-8")


def drawings(place: Path) -> None:
    """Pictures with captions, and the lists of these, to align on and to evaluate on."""
    for split in ("train", "heldout"):
        (place / split).mkdir(parents=True, exist_ok=True)
        for index in range(PAIRS):
            (place / split / f"{index}.png").write_bytes(sides(index)[0])
            (place / split / f"{index}.txt").write_text(f"{split} thing {index}", encoding="utf-8")
        lines(str(place / f"{split}.txt"), [f"{split} thing {index}" for index in range(PAIRS)])


def alpaca(place: Path) -> None:
    """Audio-alpaca's columns: a low tone is preferred to a high one."""
    place.mkdir(parents=True, exist_ok=True)
    time = np.arange(8000) / 8000
    tones = [[encode_flac(Wave(0.5 * np.sin(hertz * time), 8000)) for hertz in (900 + i, 2700 + i)] for i in range(PAIRS)]
    columns = {side: [{"bytes": tone[place], "path": None} for tone in tones] for place, side in enumerate(SIDES)}
    prompts = [f"a low tone, number {index}" for index in range(PAIRS)]
    table = pa.table({"prompt": prompts, **columns, "strategy": ["1.2"] * PAIRS})
    parquet.write_table(table, place / "train-00000-of-00001.parquet")


def liked(place: Path) -> None:
    """liked/ and disliked/, each picture with its caption."""
    for index in range(PAIRS):
        for side, content in zip(("liked", "disliked"), sides(index), strict=True):
            (place / side).mkdir(parents=True, exist_ok=True)
            (place / side / f"{index}.png").write_bytes(content)
            (place / side / f"{index}.txt").write_text(f"a red circle, number {index}", encoding="utf-8")


def pickapic(place: Path) -> None:
    """One file of the split ``train``, in the published columns, with one tie more."""
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(PAIRS):
        chosen, rejected = sides(index)
        first, second = (chosen, rejected) if index % 2 else (rejected, chosen)
        rows.append({"jpg_0": first, "jpg_1": second, "label_0": float(index % 2), "caption": f"a red circle, number {index}"})
    tie = {**rows[0], "label_0": 0.5}
    parquet.write_table(pa.Table.from_pylist([*rows, tie]), place / "train-00000-of-00001.parquet")


# --- texts --------------------------------------------------------------------------------------------------------------------


def texts(recipe: Any) -> None:
    """Preferences, labels, prompts, and the folders that a text recipe names, here with a file that only stands for them."""
    pairs = recipe.pairs
    lines("my_rows.jsonl", [preference(index) for index in range(PAIRS)])
    if pairs.location is not None:
        place = Path(pairs.location)
        if place.suffix:
            rows = {"generate": asked, "labels": labelled, "rows": preference}[pairs.source]
            lines(pairs.location, [rows(index) for index in range(PAIRS)])
        else:
            conversations(place / f"{pairs.options['split']}-00000-of-00001.parquet")
    if pairs.location is not None and "clinical_notes" in pairs.location:
        lines("clinical_notes/sft.jsonl", [labelled(index, told=False) for index in range(PAIRS)])
        lines("clinical_notes/prompts-heldout.jsonl", [asked(index) for index in range(100, 103)])
        lines("clinical_notes/lexicon.json", [{}])
    named = [recipe.guide.folder] if recipe.guide is not None else []
    named += [recipe.model.lora.start] if recipe.model.lora.start is not None else []
    for judge in (*pairs.judges, *recipe.evaluate.judges):
        named += [judge.options["model"]] if judge.name == "reward_model" else []
    for folder in map(Path, named):
        if folder.exists():
            continue  # a real one
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors"):
            (folder / file).write_text("{}", encoding="utf-8")
        if folder.name == "adapter":  # of a run
            (folder.parent / "stages.json").write_text("{}", encoding="utf-8")


def lines(place: str, rows: list[Any]) -> None:
    """Objects a line, or bare texts."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")


def seen(recipe: Any) -> None:
    """Questions and preferences about pictures, and the folders of pictures that are named."""
    for folder in ("pictures", "train2014"):
        Path(folder).mkdir(exist_ok=True)
    for index in range(PAIRS):
        Image.new("RGB", (40, 32), (20 * index, 40, 90)).save(f"{index}.png")
        Image.new("RGB", (40, 32), (20 * index, 40, 90)).save(f"pictures/{index}.png")
    rows = [
        {"image": f"{index}.png", "question": f"What is number {index}?", "chosen": f"It is {index}.", "rejected": "It is not."}
        for index in range(PAIRS)
    ]
    lines("questions.jsonl", [{"image": row["image"], "prompt": row["question"]} for row in rows])
    lines("rlhf_v.jsonl", rows)
    Path("pref_data.json").write_text(json.dumps(rows), encoding="utf-8")
    packed = [
        {
            "image": {"bytes": Path(row["image"]).read_bytes(), "path": None},
            "text": json.dumps({name: row[name] for name in ("question", "chosen", "rejected")}),
            "idx": index,
        }
        for index, row in enumerate(rows)
    ]
    parquet.write_table(pa.Table.from_pylist(packed), "palt.parquet")
    said = [
        {
            "id": str(index),
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": "<image>\n" + row["question"]},
                {"from": "gpt", "value": row["chosen"]},
            ],
        }
        for index, row in enumerate(rows)
    ]
    Path("llava_v1_5_mix665k.json").write_text(json.dumps(said), encoding="utf-8")


def asked(index: int) -> dict[str, Any]:
    """A prompt with what judges of summaries read."""
    prompt = f"Question {index}: is it good?"
    return {"prompt": prompt, "source": prompt, "reference": " yes, it is good"}


def preference(index: int) -> dict[str, Any]:
    return {**asked(index), "chosen": f" yes, it is {index}", "rejected": f" no {index} news"}


def labelled(index: int, *, told: bool = True) -> dict[str, Any]:
    good = index % 2 == 0 or not told
    row = {"prompt": f"Question {index}: is it good?", "completion": " yes, it is" if good else " no news"}
    return {**row, "label": good} if told else row


def conversations(file: Path) -> None:
    """As UltraFeedback has them: whole conversations, the prompt beside them as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(PAIRS):
        one = preference(index)
        said = {
            side: [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one[side]}] for side in SIDES
        }
        rows.append({"prompt": one["prompt"], **said})
    parquet.write_table(pa.Table.from_pylist(rows), file)
