"""One picture of what an alignment changed, for a README: base above, aligned below, same prompts, same seeds.

    python -m polyalign.evaluation.before_after runs/quickstart-seed1 before_after.png

Only comparisons whose score changed are shown, wins and losses in proportion and spread evenly over the evaluation; if any
was lost, at least one loss is among them, and the line below says how many of each there were and how many were tied.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.evaluation.report.comparison import gain
from polyalign.evaluation.report.pictures import CRISP_UP_TO, read

Item = Mapping[str, Any]

CELL = 192
"""Pixels that a small picture is enlarged towards; twice what a column of eight has on a web page, for sharp screens."""

FRAME, GAP, MARGIN = 4, 14, 18
TEXT_SIZE = 22
LINES = 4
"""Lines of a prompt; what is longer is cut."""

PAPER, INK, QUIET, GOOD, BAD = (255, 255, 255), (28, 30, 34), (98, 104, 112), (34, 139, 74), (200, 48, 44)


def before_after(run_folder: Path, destination: Path, count: int = 8) -> Path:
    """Write the picture as PNG and return its path.

    A frame is green where the judge calls the output right and red where it does not; a judge that does not say from which
    score an output is right (``judge.right_from``) has the higher-scored of the two framed green, and the picture says so.

    Raises:
        UserError: no evaluation, nothing that changed, a picture that is absent or unreadable, or fewer than two columns.
    """
    if count < 2:
        raise UserError(f"count is {count}; a picture of before and after has at least 2 columns, for a win and a loss")
    evaluation = _evaluation(run_folder)
    items = evaluation["items"]
    shown = choose(items, count)
    if not shown:
        raise UserError(f"{run_folder}: the judge's score changed in none of {len(items)} comparisons, so nothing can be shown")
    columns = [[_enlarged(run_folder, item, side) for side in ("base", "aligned")] for item in shown]
    limit = (evaluation.get("judge") or {}).get("right_from")
    sheet = _drawn(columns, shown, [_right(item, limit) for item in shown], _caption(evaluation, shown, limit))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    atomic_write(destination, stream.getvalue())
    return destination


def choose(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` items whose score changed: wins, then losses, each evenly over the order of the evaluation."""
    won, lost = [item for item in items if gain(item) > 0], [item for item in items if gain(item) < 0]
    wins, losses = shares(len(won), len(lost), count)
    return evenly(won, wins) + evenly(lost, losses)


def shares(wins: int, losses: int, count: int) -> tuple[int, int]:
    """How many wins and losses ``count`` >= 2 columns hold: in proportion, and at least one of each kind that exists."""
    if wins + losses <= count:
        return wins, losses
    lost = round(count * losses / (wins + losses))
    lost = min(max(lost, min(losses, 1)), count - min(wins, 1))
    return count - lost, lost


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """The middles of ``count`` equal stretches of the list."""
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def _evaluation(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder whose stage evaluate is finished")
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the stage evaluate again") from error
    if not isinstance(evaluation, dict) or not evaluation.get("items"):
        raise UserError(f"{path} holds no comparisons of single outputs (items), so there is nothing to show")
    return evaluation


def _enlarged(run_folder: Path, item: Item, side: str) -> Image.Image:
    """Small pictures 4 to 6 times as large, pixel by pixel; others as they are, at most 256 pixels."""
    name = item.get(f"{side}_image")
    image = read(run_folder, name) if isinstance(name, str) else None
    if image is None:
        raise UserError(f"{run_folder}: the {side} picture of {item['prompt']!r}, {name}, is absent or cannot be read")
    longest = max(image.size)
    factor = min(6, max(4, CELL // longest)) if longest <= CRISP_UP_TO else 1
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _right(item: Item, limit: float | None) -> tuple[bool, bool]:
    """Whether base and aligned get a green frame."""
    scores = float(item["base_score"]), float(item["aligned_score"])
    if limit is not None:
        return scores[0] >= limit, scores[1] >= limit
    return scores[0] > scores[1], scores[1] > scores[0]


def _caption(evaluation: Mapping[str, Any], shown: Sequence[Item], limit: float | None) -> str:
    gains, kept = [gain(item) for item in evaluation["items"]], [gain(item) for item in shown]
    won, lost, tied = sum(g > 0 for g in gains), sum(g < 0 for g in gains), sum(g == 0 for g in gains)
    judge = (evaluation.get("judge") or {}).get("name", "the judge")
    frames = "green: right, red: not" if limit is not None else "green: the higher score, red: the lower"
    return (
        f"Same prompt and seed in each column. Shown: {sum(g > 0 for g in kept)} of {won} won and {sum(g < 0 for g in kept)} "
        f"of {lost} lost; {tied} tied are not shown. Judge: {judge} ({frames})."
    )


def _drawn(
    columns: Sequence[Sequence[Image.Image]], items: Sequence[Item], right: Sequence[tuple[bool, bool]], caption: str
) -> Image.Image:
    """The sheet: labels at the left, two rows of framed pictures, prompts under the columns, the caption below all."""
    font = ImageFont.load_default(size=TEXT_SIZE)
    line = round(1.25 * TEXT_SIZE)
    left = MARGIN + round(max(font.getlength(label) for label in ("base", "aligned"))) + GAP
    width = max(image.width for column in columns for image in column)
    height = max(image.height for column in columns for image in column)
    prompts = [wrapped(str(item["prompt"]), font, width + 2 * FRAME, LINES) for item in items]
    across, down = width + 2 * FRAME + GAP, height + 2 * FRAME + GAP
    full = left + len(columns) * across - GAP + MARGIN
    below = wrapped(caption, font, full - 2 * MARGIN, LINES)
    words = MARGIN + 2 * down
    foot = words + max(map(len, prompts)) * line + GAP
    sheet = Image.new("RGB", (full, foot + len(below) * line + MARGIN), PAPER)
    brush = ImageDraw.Draw(sheet)
    for row, label in enumerate(("base", "aligned")):
        brush.text((MARGIN, MARGIN + row * down + FRAME + height / 2), label, INK, font, anchor="lm")
    for place, (column, marks, prompt) in enumerate(zip(columns, right, prompts, strict=True)):
        x = left + place * across
        for row, (image, good) in enumerate(zip(column, marks, strict=True)):
            y = MARGIN + row * down
            framed = Image.new("RGB", (image.width + 2 * FRAME, image.height + 2 * FRAME), GOOD if good else BAD)
            framed.paste(image, (FRAME, FRAME))
            sheet.paste(framed, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        for number, words_of_line in enumerate(prompt):
            brush.text((x, words + number * line), words_of_line, INK, font)
    for number, words_of_line in enumerate(below):
        brush.text((MARGIN, foot + number * line), words_of_line, QUIET, font)
    return sheet


def wrapped(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """The text in at most ``lines`` lines no wider than ``width`` pixels; longer words are broken, what is left is cut."""
    made = [""]
    for word in words.split():
        grown = f"{made[-1]} {word}".strip()
        if font.getlength(grown) <= width:
            made[-1] = grown
            continue
        if made[-1]:
            made.append("")
        for letter in word:
            if made[-1] and font.getlength(made[-1] + letter) > width:
                made.append("")
            made[-1] += letter
    if len(made) > lines:
        last = made[lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        made = [*made[: lines - 1], f"{last.rstrip()}..."]
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.before_after", description="A picture of what an alignment changed."
    )
    parser.add_argument("run_folder", type=Path, help="a run whose stage evaluate is finished")
    parser.add_argument("destination", type=Path, help="the PNG to write")
    parser.add_argument("--count", type=int, default=8, help="how many prompts are shown (default 8)")
    asked = parser.parse_args(arguments)
    try:
        before_after(asked.run_folder, asked.destination, asked.count)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(asked.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
