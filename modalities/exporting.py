"""What the exports of all modalities share: files that come into place whole, and the model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from polyalign.core.files import disk_full_explained

GRID = "samples.png"
SHOWN, CELL = 8, 256
"""Prompts in the grid of samples, and the most pixels of a picture's side there."""


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``. When the block ends well its files are renamed into ``folder``, one by one,
    over those of the same names; an interruption or a full disk before that leaves the earlier export as it was.

    Raises:
        UserError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the export {folder}, which is as it was before"):
            yield partial
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(partial)


def hub_name(identity: str) -> str | None:
    """The hub id in a model's identity, or None where the base is a folder."""
    name = identity.split("@")[0]
    return name if name.count("/") == 1 else None


def model_card(
    identity: str, *, library: str, tags: Sequence[str], is_lora: bool, code: str, card: Mapping[str, Any], **header: Any
) -> str:
    """The README.md of an export: the hub's header, how to load it, and what it was made with.

    Args:
        identity: of the base, with its hash.
        library: that opens the export. header: further keys of the hub's header.
        code: Python that opens it.
        card: what it was made with, key by key; ``title`` is the headline.
    """
    name = identity.split("@")[0]
    top: dict[str, Any] = {"library_name": library, **header}
    top["tags"] = [*tags, "polyalign", "preference-alignment", *(["lora"] if is_lora else [])]
    if hub_name(identity) is not None:
        top["base_model"] = name
    lines = [
        f"---\n{yaml.safe_dump(top, sort_keys=False)}---",
        f"# {card.get('title', 'Aligned ' + ('LoRA of ' if is_lora else '') + name)}",
        f"Aligned with preferences by polyalign. Base: `{identity}`.",
        f"```python\n{code}\n```",
    ]
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in card.items() if key != "title"]
    if rows:
        lines.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    return "\n\n".join(lines) + "\n"


def add_evaluation(folder: Path, *, run: Path, arm: str | None = None) -> None:
    """Add to an export what ``evaluation.json`` of its run says of it, and, where outputs are pictures, ``samples.png``: the
    base above, the aligned model below, on the same prompts and seeds. The prompts are the first ones, not chosen."""
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    lines = evaluation_lines(evaluation, arm)
    prompts = _grid(run / "samples", "aligned" if arm is None else f"arms/{arm}", evaluation["items"], folder / GRID)
    if prompts:
        listed = ", ".join(f"`{' '.join(prompt.replace('`', ' ').split())}`" for prompt in prompts)
        lines += [f"![Samples]({GRID})", f"Above the base, below this model, on the same seeds: {listed}."]
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\n" + "\n\n".join(lines) + "\n", encoding="utf-8")


def evaluation_lines(evaluation: Mapping[str, Any], arm: str | None = None) -> list[str]:
    """Markdown of an evaluation against the base: every judge's win rate with its interval, and the first judge's scores. The
    other judges are asked about the recipe's own objective only, not about arms."""
    found = evaluation if arm is None else evaluation["arms"][arm]
    rate = evaluation["win_rate"] if arm is None else found
    base = evaluation["scores"]["base"]
    aligned = evaluation["scores"]["aligned"] if arm is None else found["scores"]
    rows = {str(evaluation["judge"]["name"]): rate, **(evaluation["other_judges"] if arm is None else {})}
    table = ["| judge | wins | losses | ties | win rate over the base | 95 % interval |", "|---|---|---|---|---|---|"]
    for judge, row in rows.items():
        low, high = row["bootstrap"]
        counts = f"{row['wins']} | {row['losses']} | {row['ties']}"
        table.append(f"| {judge.replace('|', '/')} | {counts} | {row['rate_with_ties']:.3f} | {low:.3f} to {high:.3f} |")
    return [
        "## Evaluation",
        f"{evaluation['prompts']} prompts that took no part in training, {len(evaluation['items'])} outputs of each model, the "
        "same seeds. A tie counts half; intervals are bootstrapped over prompts.",
        "\n".join(table),
        f"Mean score of {evaluation['judge']['name']}: base {_with_interval(base)}, this model {_with_interval(aligned)}.",
    ]


def _with_interval(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['mean']:.4g} ({low:.4g} to {high:.4g})"


def _grid(samples: Path, name: str, items: Sequence[Mapping[str, Any]], target: Path) -> list[str]:
    """Write the grid, and return its prompts; nothing where outputs are no pictures."""
    shown: dict[str, str] = {}
    for index, item in enumerate(items):
        shown.setdefault(str(item["prompt"]), f"{index:05d}.png")
    columns = dict(list(shown.items())[:SHOWN])
    rows = [[samples / side / file for file in columns.values()] for side in ("base", name)]
    if not all(path.is_file() for row in rows for path in row):
        return []
    cells = []
    for path in (path for row in rows for path in row):
        with Image.open(path) as picture:
            cell = picture.convert("RGB")
        cell.thumbnail((CELL, CELL))
        cells.append(cell)
    width, height = max(cell.width for cell in cells) + 2, max(cell.height for cell in cells) + 2
    grid = Image.new("RGB", (width * len(columns), height * 2), "white")
    for place, cell in enumerate(cells):
        grid.paste(cell, (place % len(columns) * width + 1, place // len(columns) * height + 1))
    grid.save(target)
    return list(columns)
