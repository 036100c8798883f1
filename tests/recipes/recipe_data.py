"""What the shipped recipes read, as small as it goes: one place for each path that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from polyalign.core.cli import main
from polyalign.datasets.pictures import encode_png

PAIRS = 12


def provide(recipe: Any) -> None:
    """Put what ``recipe`` reads into the working directory: pairs in its format, and the folders that its judges look at."""
    pairs = recipe.pairs
    if pairs.source == "folders":
        folders(Path(pairs.folder))
    if pairs.source == "pickapic":
        pickapic(Path(pairs.path))
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
